import numpy as np
import pandas as pd
import pytest
from scipy import stats

from examples.comparison.differences import (
    Difference,
    difference,
    differences,
    holm,
    mean_interval,
)


def test_the_mean_and_interval_of_1_to_5_are_those_computed_by_hand():
    # The standard error is sqrt(2.5/5). The 0.975 quantile of t with 4 degrees of freedom is
    # 2.7764.
    assert mean_interval([1, 2, 3, 4, 5]) == pytest.approx((3.0, 2.7764 * 0.5**0.5), rel=1e-4)
    assert mean_interval([7.0]) == pytest.approx((7.0, np.nan), nan_ok=True)


def test_a_difference_is_that_computed_by_hand():
    # Logarithms differ by 1, 2 and 3. Their mean is 2, its standard error 1/sqrt(3), and t 3.4641.
    # The 0.975 quantile of t is 4.3027.
    baseline = pd.Series([1.0, 10.0, 0.1])
    compared = difference(baseline * np.exp([1.0, 2.0, 3.0]), baseline)
    assert compared.seeds == 3
    assert compared.ratio == pytest.approx(np.exp(2))
    assert np.log([compared.low, compared.high]) == pytest.approx([-0.4842, 4.4842], abs=1e-3)
    assert compared.p == pytest.approx(0.0742, abs=1e-4)


def test_a_difference_equals_scipys_and_is_paired_by_seed():
    generator = np.random.default_rng(1)
    baseline = pd.Series(generator.lognormal(size=6), index=range(6))
    values = baseline * 0.9 * np.exp(generator.normal(0, 0.02, 6))
    shuffled = values.sample(frac=1, random_state=0)
    compared = difference(shuffled, baseline)
    test = stats.ttest_rel(np.log(values), np.log(baseline))
    assert compared.p == pytest.approx(test.pvalue)
    assert np.log([compared.low, compared.high]) == pytest.approx(
        list(test.confidence_interval(0.95))
    )
    # Without pairs, the spread of the seeds would hide the difference.
    assert compared.p < 1e-3 < stats.ttest_ind(np.log(values), np.log(baseline)).pvalue


def test_only_seeds_of_both_methods_are_compared():
    values = pd.Series([1.0, 2.0, np.nan, 4.0], index=[0, 1, 2, 3])
    baseline = pd.Series([2.0, 16.0, 100.0, np.nan], index=[0, 1, 2, 3])
    compared = difference(values, baseline)
    assert compared.seeds == 2
    assert compared.ratio == pytest.approx(0.25)


def test_holms_correction_is_that_computed_by_hand():
    # The products are 4 x 0.005, 3 x 0.01, 2 x 0.03 and 1 x 0.04. The last is raised to 0.06, the
    # product before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("ratio", "low", "high", "p", "p_corrected", "verdict"),
    [
        (0.9, 0.85, 0.95, 0.001, 0.01, "lower"),
        (1.1, 1.05, 1.15, 0.001, 0.01, "higher"),
        (0.9, 0.7, 1.1, 0.3, 0.6, "inside the noise"),
        (0.9, 0.85, 0.99, 0.04, 0.12, "inside the noise of 3 comparisons"),
    ],
)
def test_the_p_values_decide_the_verdict(ratio, low, high, p, p_corrected, verdict):
    compared = Difference(5, ratio, low, high, p, p_corrected, comparisons=3)
    assert compared.verdict == verdict
    assert compared.is_significant == (verdict in ("lower", "higher"))


def test_without_a_test_the_verdict_says_why():
    one = pd.Series([1.0, 2.0])
    assert difference(one, one).verdict == "identical"
    assert difference(one[:1], 2 * one[:1]).verdict == "one seed: unknown"
    assert difference(one[:1], one[1:]).verdict == "no seed in common"


def test_many_comparisons_need_more_evidence():
    generator = np.random.default_rng(2)
    baseline = np.ones(5)
    wavering = np.exp(generator.normal(0, 0.3, (5, 9)))
    lower = np.exp([-0.02, -0.08, -0.05, -0.09, -0.01])
    few = pd.DataFrame({"baseline": baseline, "lower": lower})
    many = few.assign(**{f"other{i}": wavering[:, i] for i in range(9)})
    assert differences(few, "baseline")["lower"].verdict == "lower"
    assert differences(many, "baseline")["lower"].verdict == "inside the noise of 10 comparisons"
