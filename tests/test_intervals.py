import numpy as np
import pytest
import reference_rauc as slow
from scipy import stats

from mto_analysis.rauc.intervals import (
    bca_paired,
    bca_unpaired,
    difference_interval,
    fieller,
    mean_interval,
    paired_moments,
    unpaired_moments,
)

Y = [4.0, 5.0, 6.0, 5.5, 4.8]
X = [2.0, 2.5, 2.9, 2.8, 2.4]


def test_fieller__agrees_with_trying_every_ratio():
    interval = fieller(paired_moments(Y, X))
    low, high = slow.fieller_by_search(Y, X, stats.t.ppf(0.975, 4), 1.0, 3.0)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-5)
    assert (interval.kind, interval.runs) == ("bounded", 5)


def test_fieller__says_when_the_set_has_no_end():
    outside = fieller(paired_moments([4.0, 5.0, 6.0], [-1.0, 0.1, 1.2]))
    assert outside.kind == "outside"
    assert "cannot be told from zero" in outside.reason
    everything = fieller(paired_moments([4.0, -5.0, 1.0], [-1.0, 0.1, 1.2]))
    assert (everything.kind, str(everything)) == ("everything", "unbounded")


def test_fieller__without_spread_is_the_point():
    interval = fieller(paired_moments([6.0, 6.0], [4.0, 4.0]))
    assert (interval.low, interval.high) == (1.5, 1.5)


def test_fieller__gets_wider_with_confidence_and_ignores_units():
    narrow, wide = (fieller(paired_moments(Y, X), level) for level in (0.8, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high
    scaled = fieller(paired_moments(np.multiply(Y, 100), np.multiply(X, 100)), 0.8)
    assert (scaled.low, scaled.high) == pytest.approx((narrow.low, narrow.high))


def test_unpaired_moments__carry_the_covariance_of_the_shared_reference():
    rng = np.random.default_rng(0)
    two, one, level = rng.normal(9, 1, 6), rng.normal(5, 1, 4), rng.normal(1, 1, 4)
    moments = unpaired_moments(two, one, level)
    assert moments.var_numerator == pytest.approx(two.var(ddof=1) / 6 + level.var(ddof=1) / 4)
    assert moments.var_denominator == pytest.approx((one - level).var(ddof=1) / 4)
    assert moments.covariance == pytest.approx(-np.cov(level, one - level)[0, 1] / 4)
    assert 3 <= moments.freedom <= 8


def test_unpaired_moments__of_a_fixed_reference_have_no_covariance():
    assert unpaired_moments([9.0, 8.0], [5.0, 6.0], [1.0, 1.0]).covariance == 0.0


def test_unpaired_moments__match_a_simulation():
    rng = np.random.default_rng(1)
    level = rng.normal(1, 1, (20000, 4))
    one, two = level + rng.normal(4, 0.5, (20000, 4)), rng.normal(9, 1, (20000, 6))
    numerators, denominators = two.mean(1) - level.mean(1), (one - level).mean(1)
    found = np.mean(
        [unpaired_moments(*sample).covariance for sample in zip(two[:2000], one[:2000], level[:2000], strict=True)]
    )
    assert found == pytest.approx(np.cov(numerators, denominators)[0, 1], abs=0.01)


def test_mean_interval__is_students():
    low, high = mean_interval(X, 0.9)
    assert (low, high) == pytest.approx(stats.t.interval(0.9, 4, np.mean(X), stats.sem(X)))


def test_bca_paired__resamples_whole_pairs():
    # Ratios of the pairs are all 2, however the pairs are resampled; apart they would not be.
    pairs = bca_paired(np.multiply(X, 2.0) + 1e-9 * np.arange(5), X, np.random.default_rng(0))
    assert (pairs.low, pairs.high) == pytest.approx((2.0, 2.0), abs=1e-7)


def test_bca_unpaired__keeps_each_reference_with_its_run():
    # The baseline's gain is 4 in every run only if its own reference is taken off.
    level = np.array([1.0, 5.0, 2.0, 9.0, 3.0, 4.0])
    kept = bca_unpaired(level.mean() + np.full(6, 8.0), level + 4.0, level, np.random.default_rng(0))
    assert kept.low < 2.0 < kept.high
    assert kept.high - kept.low < 3.0


def test_bca_unpaired__covers_the_point_and_is_repeatable():
    rng = np.random.default_rng(2)
    samples = rng.normal(9, 1, 7), rng.normal(5, 0.3, 6), rng.normal(1, 0.3, 6)
    first, second = (bca_unpaired(*samples, np.random.default_rng(0)) for _ in range(2))
    assert first == second
    assert first.low < (samples[0].mean() - samples[2].mean()) / (samples[1] - samples[2]).mean() < first.high


def test_bca__needs_five_runs_and_a_gain():
    assert bca_paired(Y[:4], X[:4], np.random.default_rng(0)).kind == "none"
    assert bca_unpaired(Y, X[:4], [0.0] * 4, np.random.default_rng(0)).kind == "none"
    assert bca_paired(Y, [-2.0, 2.0, 0.1, -0.5, 0.6], np.random.default_rng(0)).kind in ("everything", "none")


@pytest.mark.parametrize(
    "call",
    [
        lambda: paired_moments([1.0], [1.0]),
        lambda: paired_moments([1.0, 2.0], [1.0]),
        lambda: unpaired_moments([1.0], [1.0, 2.0], [0.0, 0.0]),
        lambda: mean_interval([1.0]),
        lambda: fieller(paired_moments(Y, X), 1.0),
    ],
)
def test_intervals__refuse_what_has_no_spread(call):
    with pytest.raises(ValueError, match="must"):
        call()


def test_interval__prints_in_words():
    assert str(fieller(paired_moments(Y, X))) == "[1.95, 2.06]"
    assert str(bca_paired(Y[:2], X[:2], np.random.default_rng(0))) == "no interval: 2 pairs, 5 needed"


def test_intervals__of_scores_beyond_all_measure_overflow_to_no_number():
    huge = [1e99, -1e100, 3e98]
    moments = unpaired_moments(huge, [0.0, 1e-300, 0.0], [0.0, 0.0, 0.0])
    assert moments.freedom >= 2
    interval = fieller(moments)
    assert all(end is None or np.isfinite(end) for end in (interval.low, interval.high))
    assert difference_interval(huge, [1.0, 2.0, 3.0], paired=False).kind == "bounded"


@pytest.mark.parametrize("seeds", [(3, 5), (4, 4)])
def test_difference_interval__has_welchs_degrees_of_freedom(seeds):
    rng = np.random.default_rng(3)
    two, one = rng.normal(5, 2, seeds[0]), rng.normal(4, 0.5, seeds[1])
    interval = difference_interval(two, one, paired=False, confidence=0.9)
    expected = stats.ttest_ind(two, one, equal_var=False).confidence_interval(0.9)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    same = difference_interval([2.0, 2.0], [1.0, 1.0, 1.0], paired=False)
    assert (same.low, same.high) == (1.0, 1.0)
