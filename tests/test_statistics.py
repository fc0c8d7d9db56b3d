"""Bootstrap intervals and the detectable effect, against closed forms and a loop in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from visearch.statistics import (
    curve_at,
    curve_reach,
    mean_interval,
    minimum_detectable_effect,
    paired_interval,
    ratio_interval,
    resample,
    worth_interval,
)


def test_interval_matches_the_normal_theory():
    values = np.random.default_rng(3).normal(2.0, 1.5, size=400)
    interval = mean_interval(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.02)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.02)
    assert interval.clusters == 400


def test_repeating_every_value_in_its_cluster_changes_nothing():
    values = np.random.default_rng(4).normal(size=50)
    labels = [f"prompt {i}" for i in range(50)]
    once = mean_interval(values, labels)
    thrice = mean_interval(np.repeat(values, 3), np.repeat(labels, 3).tolist())
    assert (thrice.mean, thrice.low, thrice.high) == pytest.approx((once.mean, once.low, once.high))
    naive = mean_interval(np.repeat(values, 3))
    assert naive.high - naive.low < 0.7 * (thrice.high - thrice.low)


def test_coverage_of_the_paired_interval():
    """The interval must hold the true difference in about 95 % of repetitions; prompts share a random effect."""
    rng = np.random.default_rng(5)
    covered = 0
    for repetition in range(200):
        effect = np.repeat(rng.normal(size=60), 4)
        a = 0.3 + effect + rng.normal(size=240)
        b = np.repeat(rng.normal(size=60), 4)
        interval = paired_interval(a, b, np.repeat(np.arange(60), 4).tolist(), draws=400, seed=repetition)
        covered += interval.low <= 0.3 <= interval.high
    assert 180 <= covered <= 198


def test_paired_interval_uses_the_pairs():
    rng = np.random.default_rng(6)
    difficulty = rng.normal(scale=10, size=300)
    paired = paired_interval(difficulty + 0.5 + 0.1 * rng.normal(size=300), difficulty)
    assert 0.45 < paired.low < paired.mean < paired.high < 0.55


def test_equal_seeds_give_equal_intervals():
    values = np.random.default_rng(7).normal(size=30)
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1) != mean_interval(values, seed=2)


def test_ratios_leave_out_draws_that_say_nothing():
    found = ratio_interval(np.array([1.0, 3.0]), np.array([0.0, 4.0]))
    assert found.mean == 1.0 and (found.low, found.high) == (0.75, 1.0)  # 6 / 8 and 4 / 4; 2 / 0 is left out
    assert f"{found:.2f}" == "1.00 [0.75, 1.00]"
    with pytest.raises(ValueError, match="denominator sums to 0"):
        ratio_interval(np.ones(2), np.zeros(2))


def test_resample_draws_as_many_rows_as_there_are():
    totals = resample(np.array([[1.0, 1], [10, 1], [100, 1]]), np.random.default_rng(0), 500)
    assert totals.shape == (500, 2)
    assert (totals[:, 1] == 3).all()
    assert set(totals[:, 0]) == {a + b + c for a in (1, 10, 100) for b in (1, 10, 100) for c in (1, 10, 100)}


@given(st.integers(1, 9), st.floats(0, 1), st.integers(0, 2**16))
def test_a_curve_reaches_what_it_is_at(size, share, seed):
    curves = np.random.default_rng(seed).uniform(0.1, 1, (2, 3, size)).cumsum(-1)
    n = 1 + share * (size - 1)
    np.testing.assert_allclose(curve_reach(curves, curve_at(curves, n)), n, atol=1e-4)
    np.testing.assert_array_equal(curve_at(curves, np.full((2, 3), n)), curve_at(curves, n))


def test_curves_end_where_their_pool_does():
    curve = np.array([1.0, 2.0, 2.0, 4.0])
    assert [float(curve_at(curve, n)) for n in (0, 1, 1.5, 3.5, 4, 9)] == [1, 1, 1.5, 3, 4, 4]
    assert [float(curve_reach(curve, v)) for v in (0, 1, 1.5, 2, 3, 4, 9)] == [1, 1, 1.5, 2, 3.5, 4, 4]


def test_worth_by_hand():
    curve = np.tile([1.0, 2.0, 3.0], (5, 1))
    found = worth_interval(np.full(5, 2.5), np.full(5, 2.0), curve)
    assert found.mean == found.low == found.high == 1.25 and found.clusters == 5  # best of 2.5, for the price of 2


def test_minimum_detectable_effect_has_the_stated_power():
    rng = np.random.default_rng(8)
    pilot = rng.normal(size=100)
    effect = minimum_detectable_effect(pilot)
    assert effect == pytest.approx((1.959964 + 0.841621) * pilot.std(ddof=1) / 10, rel=1e-5)
    true_effect = minimum_detectable_effect(pilot / pilot.std(ddof=1))
    trials = rng.normal(true_effect, 1, size=(4000, 100))
    z = trials.mean(axis=1) / (trials.std(axis=1, ddof=1) / 10)
    assert np.mean(np.abs(z) > 1.96) == pytest.approx(0.8, abs=0.03)


def test_minimum_detectable_effect_respects_clusters():
    values = np.random.default_rng(9).normal(size=80)
    labels = np.repeat(np.arange(80), 5).tolist()
    clustered = minimum_detectable_effect(np.repeat(values, 5), labels)
    assert clustered == pytest.approx(minimum_detectable_effect(values))
    assert minimum_detectable_effect(np.repeat(values, 5)) < 0.5 * clustered


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([]), "values has shape"),
        (lambda: mean_interval([1.0, math.nan]), "not finite"),
        (lambda: mean_interval([1.0, 2.0], ["a"]), "clusters has 1 labels for 2"),
        (lambda: mean_interval([1.0, 2.0], level=95), "level is 95"),
        (lambda: mean_interval([1.0, 2.0], draws=0), "draws is 0"),
        (lambda: paired_interval([1.0, 2.0], [1.0]), "pair results"),
        (lambda: minimum_detectable_effect([1.0, 2.0], ["a", "a"]), "1 cluster"),
        (lambda: minimum_detectable_effect([1.0, 2.0], power=1.0), "power is 1.0"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
