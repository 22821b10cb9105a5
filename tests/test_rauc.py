import copy
import math
import pickle

import numpy as np
import pandas as pd
import pytest
import reference_rauc as slow
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mto_analysis.rauc import (
    LARGEST_RATIO,
    area,
    area_difference,
    crossings,
    curve_points,
    epochs_to_score,
    final_gap,
    monotone_bounds,
    rauc,
    reference_for,
    score_at,
    share_saved,
)

MAE = ([100, 200, 300, 400], [60.0, 66.0, 69.0, 70.0])
MTO = ([100, 200, 300, 400], [61.0, 68.0, 70.5, 71.0])

scores = st.floats(0, 100, allow_subnormal=False)


@st.composite
def curves(draw):
    """Two curves over one window, logged at epochs of their own in between."""
    start, width = draw(st.integers(0, 300)), draw(st.integers(2, 500))
    inside = st.sets(st.integers(start + 1, start + width - 1), max_size=8)
    pair = []
    for _ in range(2):
        epochs = [start, *sorted(draw(inside)), start + width]
        pair.append((epochs, draw(st.lists(scores, min_size=len(epochs), max_size=len(epochs)))))
    return (*pair, start, start + width)


def test_rauc__is_what_the_audit_of_table_2_says():
    printed = {
        "MAE ViT-L": ([68.5, 72.7], [72.8, 74.1], 2.36, 1.20, 56.35),
        "MAE ViT-B": ([57.4, 63.9], [63.6, 64.8], 2.09, 1.23, 45.22),
        "ConMIM": ([32.2, 39.2], [38.7, 40.3], 2.09, 1.20, 16.70),
    }
    for one, two, computed, ratio, reference in printed.values():
        baseline, target = ([400, 800], one), ([400, 800], two)
        assert round(rauc(baseline, target, 400, 800), 2) == computed
        needed = reference_for(ratio, baseline, target, 400, 800)
        assert round(needed, 2) == reference
        assert rauc(baseline, target, 400, 800, reference=needed) == pytest.approx(ratio)


def test_rauc__agrees_with_a_closed_form_of_straight_lines():
    # Baseline rises by a, target by b from the same point: the areas are triangles.
    ratio = rauc(([0, 10], [50.0, 54.0]), ([0, 10], [50.0, 57.0]), 0, 10)
    assert (ratio, ratio.numerator, ratio.denominator, ratio.reference) == (7 / 4, 35.0, 20.0, 50.0)


def test_rauc__of_identical_curves_is_exactly_one():
    assert rauc(MAE, MAE, 100, 400) == 1.0


def test_rauc__takes_a_reference_and_interpolates_only_on_request():
    assert rauc(MAE, MTO, 100, 400, reference=50.0) == pytest.approx(slow.rauc(MAE, MTO, 100, 400, 50.0))
    assert rauc(MAE, MTO, 150, 350, interpolate=True) == pytest.approx(slow.rauc(MAE, MTO, 150, 350))
    with pytest.raises(ValueError, match="between the logged 100 and 200"):
        rauc(MAE, MTO, 150, 400)


@pytest.mark.parametrize("window", [(50, 400), (100, 500)])
def test_rauc__never_extrapolates(window):
    with pytest.raises(ValueError, match="nothing is extrapolated"):
        rauc(MAE, MTO, *window, interpolate=True)


@pytest.mark.parametrize(
    ("baseline", "reason"),
    [
        ([70.0, 70.0, 70.0], "not positive"),
        ([70.0, 69.0, 68.0], "not positive"),
        ([70.0, 70.0 + 1e-9, 70.0 + 1e-9], "within noise of zero"),
        ([70.0, 70.001, 70.001], "within noise of zero"),
    ],
)
def test_rauc__without_a_gain_of_the_baseline_is_undefined_with_a_reason(baseline, reason):
    ratio = rauc(([0, 1, 2], baseline), ([0, 1, 2], [70.0, 75.0, 78.0]), 0, 2)
    assert math.isnan(ratio)
    assert reason in ratio.reason


def test_rauc__noise_is_the_callers_choice():
    assert rauc(MAE, MTO, 100, 400, noise=1.0) > 1
    assert "within noise" in rauc(MAE, MTO, 100, 400, noise=50.0).reason


def test_ratio__survives_copying_and_pickling():
    for again in (copy.copy(rauc(MAE, MTO, 100, 400)), pickle.loads(pickle.dumps(rauc(MAE, MTO, 100, 400)))):
        assert (again, again.denominator) == (rauc(MAE, MTO, 100, 400), rauc(MAE, MTO, 100, 400).denominator)


@pytest.mark.parametrize(
    "form",
    [
        lambda e, s: (e, s),
        lambda e, s: (np.array(e[::-1]), np.array(s[::-1])),
        lambda e, s: pd.DataFrame({"method": "x", "epoch": e, "score": s}),
        lambda e, s: {"epoch": e, "score": s},
        lambda e, s: dict(zip(e, s, strict=True)),
    ],
)
def test_curve_points__takes_arrays_frames_and_mappings(form):
    assert rauc(form(*MAE), form(*MTO), 100, 400) == rauc(MAE, MTO, 100, 400)


@pytest.mark.parametrize(
    ("curve", "message"),
    [
        (([1, 1], [2.0, 3.0]), "epoch 1 comes twice"),
        (([1, 2], [2.0, math.nan]), r"scores\[1\] is nan"),
        (([1, math.inf], [2.0, 3.0]), r"epochs\[1\] is inf"),
        (([1, 2], [2.0, 1e200]), r"sane size, scores\[1\] is 1e\+200"),
        (([1, 2], [2.0]), "as many scores as epochs"),
        (([], []), "as many scores as epochs"),
        (([1], [2], [3]), "3 parts"),
        (pd.DataFrame({"epoch": [1]}), "score missing"),
    ],
)
def test_curve_points__names_what_is_wrong(curve, message):
    with pytest.raises(ValueError, match=message):
        curve_points(curve)


def test_window__must_have_a_length():
    with pytest.raises(ValueError, match="start must be below end"):
        area(MAE, 200, 200)


def test_companions__by_hand():
    assert score_at(MAE, 200) == 66.0
    assert area_difference(MAE, MTO, 100, 400) == pytest.approx(450.0)
    assert final_gap(MAE, MTO, 400) == 1.0
    assert epochs_to_score(MTO, 70.0) == pytest.approx(280.0)
    assert share_saved(280.0, 400) == pytest.approx(0.3)
    assert share_saved(279.0, 399, origin=-1) == pytest.approx(0.3)
    assert crossings(MAE, MTO, 100, 400) == []


def test_epochs_to_score__knows_never_and_from_the_start():
    assert epochs_to_score(MAE, 80.0) is None
    assert epochs_to_score(MAE, 50.0) == 100.0
    assert epochs_to_score(MAE, 69.9, end=350) is None
    assert epochs_to_score(MAE, 69.4, end=350) == pytest.approx(340.0)


def test_crossings__touching_is_no_change_of_hands():
    flat = ([0, 1, 2], [5.0, 5.0, 5.0])
    assert crossings(flat, ([0, 1, 2], [6.0, 5.0, 6.0]), 0, 2) == []
    assert crossings(flat, ([0, 1, 2], [4.0, 6.0, 4.0]), 0, 2) == [0.5, 1.5]


def test_monotone_bounds__of_two_points_have_no_upper_end():
    low, high = monotone_bounds(([0, 1], [0.0, 1.0]), ([0, 1], [0.5, 1.0]), 0, 1)
    assert (low, high) == (0.5, None)


def test_reference_for__refuses_one():
    with pytest.raises(ValueError, match="ratio must differ from 1"):
        reference_for(1.0, MAE, MTO, 100, 400)


def check_properties(case, shift, factor, better):
    one, two, start, end = case
    ratio = rauc(one, two, start, end)
    if ratio.reason:
        assert math.isnan(ratio)
        return
    assert abs(ratio) <= LARGEST_RATIO * (1 + 1e-9)
    assert ratio == pytest.approx(slow.rauc(one, two, start, end), rel=1e-6, abs=1e-6)
    assert rauc(one, one, start, end) == 1.0
    low, high = monotone_bounds(one, two, start, end)
    assert low is None or low <= ratio + 1e-9 * max(1, abs(ratio))
    assert high is None or ratio <= high + 1e-9 * max(1, abs(ratio))
    moved = [(epochs, [shift + factor * score for score in values]) for epochs, values in (one, two)]
    again = rauc(*moved, start, end)
    # Shifting far away costs digits: the gain must stand out of the rounding of the shifted scores.
    assume(ratio.denominator / (end - start) * factor > 1e-6 * (abs(shift) + 100 * factor))
    assert again == pytest.approx(ratio, rel=1e-5, abs=1e-5)
    lifted = rauc(one, (two[0], [score + more for score, more in zip(two[1], better, strict=False)]), start, end)
    assert lifted.reason or lifted >= ratio - 1e-9 * max(1, abs(ratio))


properties = given(
    curves(), st.floats(-1000, 1000), st.floats(0.01, 100), st.lists(st.floats(0, 50), min_size=10, max_size=10)
)


@settings(max_examples=300, deadline=None)
@properties
def test_rauc__properties(case, shift, factor, better):
    check_properties(case, shift, factor, better)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@properties
def test_rauc__properties_in_full(case, shift, factor, better):
    check_properties(case, shift, factor, better)


@settings(max_examples=50, deadline=None)
@given(curves())
def test_epochs_to_score__agrees_with_a_search(case):
    one, two, _, end = case
    final = score_at(one, end)
    found, searched = epochs_to_score(two, final, end=end), slow.first_epoch_with(two, final, end, steps=2000)
    if searched is not None:
        assert found is not None
        assert found <= searched + 1e-9
        assert (
            searched - found <= (end - two[0][0]) / 2000 + 1e-6
            or score_at(two, found, interpolate=True) >= final - 1e-6
        )
