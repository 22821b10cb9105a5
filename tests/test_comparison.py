import numpy as np
import pandas as pd
import pytest
import reference_rauc as slow
from scipy import stats

from mto_analysis.errors import DataError
from mto_analysis.rauc import curve_points, rauc
from mto_analysis.rauc.comparison import common_window, compare, compare_methods, mean_curve, window_grid
from mto_analysis.rauc.curves import read_curves
from mto_analysis.rauc.intervals import fieller, paired_moments

EPOCHS = np.arange(100.0, 801.0, 100.0)


def runs(top, pace, seeds, spread=0.1, start=0):
    rng = np.random.default_rng(start)
    base = top - (top - 80) * np.exp(-(EPOCHS - 50) / pace)
    return {
        str(seed): (EPOCHS, base + rng.normal(0, spread) + rng.normal(0, spread / 3, EPOCHS.size))
        for seed in range(start, start + seeds)
    }


MAE, MTO = runs(83.6, 250, 5), runs(84.0, 150, 5)
#: With other luck in every run, under the seeds of MAE.
OTHER = dict(zip(MAE, runs(84.0, 150, 5, start=7).values(), strict=True))


def test_compare__one_run_each_is_eq_6_without_an_interval():
    result = compare(MAE["0"], MTO["0"], 100, 400)
    assert result.rauc == pytest.approx(slow.rauc(MAE["0"], MTO["0"], 100, 400))
    assert (result.rauc, result.numerator) == (rauc(MAE["0"], MTO["0"], 100, 400), result.rauc * result.denominator)
    assert str(result.interval) == str(result.bootstrap) == "no interval: one seed"


def test_compare__over_seeds_is_the_ratio_of_means_with_fiellers_interval():
    result = compare(MAE, MTO, 100, 400, pairing="seed")
    numerators = [slow.integral(MTO[s], 100, 400, slow.at(MAE[s], 100)) for s in MAE]
    denominators = [slow.integral(MAE[s], 100, 400, slow.at(MAE[s], 100)) for s in MAE]
    assert result.rauc == pytest.approx(np.mean(numerators) / np.mean(denominators))
    expected = fieller(paired_moments(numerators, denominators))
    assert (result.interval.low, result.interval.high) == pytest.approx((expected.low, expected.high))
    assert result.paired
    assert result.bootstrap.kind == "bounded"


def test_compare__identical_runs_give_exactly_one():
    assert compare(MAE, MAE, 100, 800).rauc == 1.0


def test_compare__seeds_pair_by_label_not_by_order():
    shuffled = {seed: MTO[seed] for seed in reversed(MTO)}
    first, second = (compare(MAE, target, 100, 400, pairing="seed") for target in (shuffled, MTO))
    assert first.interval == second.interval


def test_compare__equal_names_of_seeds_are_no_evidence_that_runs_pair():
    result = compare(MAE, MTO, 100, 400)
    assert (result.paired, result.pairing) == (False, "none (equal names only)")
    assert "--pairing seed" in result.notes[0]
    unpaired = compare(MAE, {f"other {seed}": run for seed, run in MTO.items()}, 100, 400)
    assert result.interval == unpaired.interval


def test_compare__runs_that_start_from_the_same_score_pair_by_themselves():
    def from_one_start(runs, shifts):
        return {
            seed: (np.append(0.0, epochs), np.append(shift, scores))
            for (seed, (epochs, scores)), shift in zip(runs.items(), shifts, strict=True)
        }

    starts = [43.01, 42.7, 43.5, 42.9, 43.2]
    one, two = from_one_start(MAE, starts), from_one_start(MTO, starts)
    result = compare(one, two, 0, 400)
    assert (result.paired, result.pairing) == (True, "by seed (runs of a seed start from the same score)")
    assert result.interval == compare(one, two, 0, 400, pairing="seed").interval
    assert not compare(one, from_one_start(MTO, starts[::-1]), 0, 400).paired
    at_chance = [10.0, 10.0, 10.0, 11.0, 10.0]
    assert not compare(from_one_start(MAE, at_chance), from_one_start(MTO, at_chance), 0, 400).paired


def test_compare__intervals_of_gap_and_lead_are_those_of_t_tests():
    one, two = (np.array([scores[-1] for _, scores in runs.values()]) for runs in (MAE, OTHER))
    for pairing, test in (
        ("seed", stats.ttest_rel(two, one)),
        ("none", stats.ttest_ind(two, one, equal_var=False)),
    ):
        result = compare(MAE, OTHER, 100, 800, pairing=pairing, confidence=0.9)
        expected = test.confidence_interval(0.9)
        assert (result.final_gap_interval.low, result.final_gap_interval.high) == pytest.approx(tuple(expected))
    leads = [(slow.integral(OTHER[s], 100, 800, 0) - slow.integral(MAE[s], 100, 800, 0)) / 700 for s in MAE]
    paired = compare(MAE, OTHER, 100, 800, pairing="seed")
    expected = stats.t.interval(0.95, 4, np.mean(leads), stats.sem(leads))
    assert (paired.mean_lead_interval.low, paired.mean_lead_interval.high) == pytest.approx(expected)


def test_compare__saved_share_is_what_a_t_test_at_each_epoch_keeps():
    result = compare(MAE, OTHER, 100, 800, pairing="seed")
    epochs = np.linspace(100, 800, 70_001)
    finals = np.array([scores[-1] for _, scores in MAE.values()])
    lead = np.array([np.interp(epochs, *run) for run in OTHER.values()]) - finals[:, None]
    kept = epochs[np.abs(lead.mean(axis=0)) <= stats.t.ppf(0.975, 4) * stats.sem(lead)]
    interval = result.share_saved_interval
    # Between logged epochs the ends run along straight lines, a t test along curves: equal to a fraction of a step.
    assert (interval.high, interval.low) == pytest.approx((1 - kept[0] / 800, 1 - kept[-1] / 800), abs=0.005)
    assert interval.low < result.share_saved < interval.high


def test_compare__a_lead_that_is_not_sure_at_the_end_leaves_the_saved_share_without_a_lower_end():
    behind = {seed: (epochs, scores - 0.5) for seed, (epochs, scores) in MTO.items()}
    interval = compare(MAE, behind, 100, 800).share_saved_interval
    assert (interval.kind, interval.low) == ("below", None)
    never = {seed: (epochs, scores - 9) for seed, (epochs, scores) in MTO.items()}
    assert "not reached" in str(compare(MAE, never, 100, 800).share_saved_interval)
    ahead = {seed: (epochs, scores + 9) for seed, (epochs, scores) in MTO.items()}
    first = compare(MAE, ahead, 100, 800).share_saved_interval
    assert (first.kind, first.low, first.high) == ("above", 1 - 100 / 800, None)


def test_compare__seeds_that_do_not_pair_use_the_unpaired_interval():
    other = runs(84.0, 150, 4, start=7)
    result = compare(MAE, other, 100, 400)
    assert not result.paired
    assert result.interval.method == "Fieller, unpaired"
    assert "seeds do not pair" in result.notes[0]
    assert compare(MAE, MTO, 100, 400, pairing="none").rauc == pytest.approx(compare(MAE, MTO, 100, 400).rauc)


def test_compare__pairing_on_demand_drops_the_rest_and_says_so():
    result = compare(MAE, runs(84.0, 150, 5, start=3), 100, 400, pairing="seed")
    assert result.seeds_baseline == ("3", "4")
    assert "6 runs without a partner" in result.notes[0]
    with pytest.raises(ValueError, match="no seed pairs"):
        compare(MAE, runs(84.0, 150, 2, start=7), 100, 400, pairing="seed")


def test_compare__one_side_with_one_seed_has_no_interval():
    assert "one side has one seed" in str(compare(MAE, MTO["0"], 100, 400).interval)


def test_compare__a_gain_within_the_noise_of_seeds_is_undefined():
    flat = {str(s): ([0, 1, 2], [70.0, 70.0 + d, 70.0 + d]) for s, d in enumerate([-1.0, 1.5, 0.1])}
    better = {s: ([0, 1, 2], [71.0, 74.0, 75.0]) for s in flat}
    result = compare(flat, better, 0, 2)
    assert result.rauc is None
    assert "within noise of zero over 3 seeds" in result.reason
    assert str(result.interval).startswith("unbounded")
    assert result.denominator > 0


def test_compare__takes_tidy_frames():
    frame = pd.concat(
        [
            pd.DataFrame({"method": name, "epoch": e, "score": s, "seed": seed})
            for name, group in (("MAE", MAE), ("MTO", MTO))
            for seed, (e, s) in group.items()
        ]
    )
    result = compare(frame[frame["method"] == "MAE"], frame[frame["method"] == "MTO"], 100, 400)
    assert result == compare(MAE, MTO, 100, 400)


def test_compare__companions_follow_the_mean_curve():
    result = compare(MAE, MTO, 100, 800)
    one, two = (mean_curve({s: curve_points(run) for s, run in group.items()}) for group in (MAE, MTO))
    reached = slow.first_epoch_with(two, one.scores[-1], 800)
    assert result.epochs_to_final == pytest.approx(reached, abs=0.01)
    assert result.share_saved == pytest.approx(1 - reached / 800, abs=1e-4)
    assert result.final_gap == pytest.approx(two.scores[-1] - one.scores[-1])
    assert result.mean_lead * 700 == pytest.approx(result.area_difference)
    assert result.bounds[0] < result.rauc < result.bounds[1]


def test_compare__first_epoch_called_zero_still_counts_as_one_epoch():
    one, two = ([0, 99], [50.0, 60.0]), ([0, 49, 99], [50.0, 60.0, 62.0])
    assert compare(one, two, 0, 99, origin=-1.0).share_saved == pytest.approx(0.5)


def test_compare__says_what_makes_a_ratio_fragile():
    notes = compare(([0, 1, 2], [50, 60, 48]), ([0, 1, 2], [50, 61, 47]), 0, 2).notes
    assert any("fragile" in note for note in notes)
    assert any("falls below the baseline's final score again" in note for note in notes)
    copies = {"0": ([0, 1], [5.0, 6.0]), "1": ([0, 1], [5.0, 6.0])}
    assert any("copies of one run" in note for note in compare(copies, copies, 0, 1).notes)


def test_window_grid__agrees_with_single_windows():
    grid = window_grid(MAE, MTO)
    assert len(grid) == EPOCHS.size * (EPOCHS.size - 1) / 2
    row = grid[(grid["start"] == 200) & (grid["end"] == 600)]
    assert row["rauc"].item() == pytest.approx(compare(MAE, MTO, 200, 600).rauc)
    for paired, how in ((True, "seed"), (False, "none")):
        grid = window_grid(MAE, OTHER, paired=paired, confidence=0.9)
        found = grid[(grid["start"] == 200) & (grid["end"] == 600)].iloc[0]
        one = compare(MAE, OTHER, 200, 600, pairing=how, confidence=0.9)
        assert (found["low"], found["high"]) == pytest.approx((one.interval.low, one.interval.high))
        assert found["gain"] == pytest.approx(one.denominator / 400)
    fixed = window_grid(MAE, MTO, reference=75.0)
    assert fixed["rauc"].iloc[3] == pytest.approx(compare(MAE, MTO, 100, 500, reference=75.0).rauc)
    uneven = {seed: (np.delete(e, 3 + int(seed) % 2), np.delete(s, 3 + int(seed) % 2)) for seed, (e, s) in MTO.items()}
    grid = window_grid(MAE, uneven)
    found = grid[(grid["start"] == 200) & (grid["end"] == 800)].iloc[0]
    assert found["rauc"] == pytest.approx(compare(MAE, uneven, 200, 800).rauc)
    assert len(window_grid((np.arange(500), np.arange(500)), (np.arange(500), np.arange(500)), most=10)) == 45


def test_compare_methods__goes_over_pairs_groups_and_windows(tmp_path):
    lines = ["method,epoch,score,backbone"]
    for backbone, shift in (("ViT-B", 0), ("ViT-L", 2)):
        lines += [f"MAE,{e},{60 + shift + e},{backbone}" for e in (1, 2, 3)]
        lines += [f"MTO,{e},{61 + shift + e},{backbone}" for e in (1, 2, 3)]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    table = read_curves([tmp_path / "a.csv"], groups=["backbone"])
    results = compare_methods(table, [("MAE", "MTO")], [(1, 3), (2, 3)])
    assert [(one.group["backbone"], one.start, one.rauc) for one in results] == [
        ("ViT-B", 1.0, 2.0), ("ViT-B", 2.0, 3.0), ("ViT-L", 1.0, 2.0), ("ViT-L", 2.0, 3.0),
    ]  # fmt: skip
    with pytest.raises(DataError, match="MTO against MAE from 0 to 3: no score at 0"):
        compare_methods(table, [("MAE", "MTO")], [(0, 3)])


def test_common_window__is_the_longest_that_all_runs_logged(tmp_path):
    (tmp_path / "a.csv").write_text("method,epoch,score\nA,1,5\nA,2,6\nA,3,7\nB,2,5\nB,3,6\nB,4,7\nC,9,1\n")
    table = read_curves([tmp_path / "a.csv"], unit="percent")
    assert common_window(table, ["A", "B"]) == (2.0, 3.0)
    (tmp_path / "b.csv").write_text("method,task,epoch,score\nA,x,1,5\nA,x,2,6\nA,x,3,7\nA,y,2,5\nA,y,3,6\nA,y,4,7\n")
    groups = read_curves([tmp_path / "b.csv"], unit="percent", groups=["task"])
    assert common_window(groups, ["A"]) == (2.0, 3.0)
    with pytest.raises(DataError, match="fewer than two"):
        common_window(table, ["A", "C"])
    (tmp_path / "c.csv").write_text(
        "method,epoch,score\nA,1,5\nA,2,6\nA,2.99,7\nA,3.99,8\nB,1,5\nB,2,6\nB,3,7\nB,4,8\n"
    )
    with pytest.raises(DataError, match=r"all runs cover 1 to 3.99, but the epoch is logged .* from 1 to 2 only"):
        common_window(read_curves([tmp_path / "c.csv"], unit="percent"), ["A", "B"])
