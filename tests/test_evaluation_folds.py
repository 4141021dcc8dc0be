"""Metrics over folds and seeds: means, spreads and intervals, against plain loops."""

import numpy as np
import polars as pl
import pytest

from fraudlab.evaluation import folds, intervals
from fraudlab.evaluation.metrics import ap, auc, simulate_scores


def trials(*skills: float, weeks: int = 3) -> folds.Trials:
    return [[simulate_scores(3000, 300, skill=skill, seed=week) for skill in skills] for week in range(weeks)]


def test_one_fold_and_one_seed_are_as_ever():
    scores = simulate_scores(3000, 300)
    assert folds.summary(folds.measure([[scores]], draws=20, budget=7)) == intervals.evaluate(scores, draws=20, budget=7)
    better = simulate_scores(3000, 300, skill=3.5)
    difference = folds.difference(folds.measure([[better]], draws=20), folds.measure([[scores]], draws=20))
    expected = intervals.compare(better, scores, draws=20)
    assert difference.keys() == expected.keys()
    np.testing.assert_allclose(list(difference.values()), list(expected.values()), atol=1e-12)


def test_means_and_spreads_are_those_of_the_trainings():
    given = trials(2.8, 3.0, 3.4)
    found = folds.summary(folds.measure(given, draws=10))
    for name, metric in (("auc", auc), ("ap", ap)):
        each = np.array([[metric(scores) for scores in seeds] for seeds in given])
        assert found[name] == pytest.approx(each.mean(), abs=1e-12)
        assert found[f"{name}.std"] == pytest.approx(each.std(ddof=1), abs=1e-12)
        assert found[f"{name}.std_seeds"] == pytest.approx(each.mean(0).std(ddof=1), abs=1e-12)
        assert found[f"{name}.low"] < found[name] < found[f"{name}.high"]


def test_spreads_are_told_where_there_is_something_to_spread():
    assert not any(".std" in name for name in folds.summary(folds.measure(trials(3.0, weeks=1), draws=5)))
    over_folds = folds.summary(folds.measure(trials(3.0), draws=5))
    assert "ap.std" in over_folds
    assert "ap.std_seeds" not in over_folds


def test_an_interval_of_the_mean_is_narrower_than_that_of_a_fold():
    """Four weeks whose payers are drawn apart: about half as wide as one week's."""

    def width(found):
        return found["ap.high"] - found["ap.low"]

    weeks = [folds.summary(folds.measure([week], draws=200)) for week in trials(3.0, weeks=4)]
    together = folds.summary(folds.measure(trials(3.0, weeks=4), draws=200))
    assert 0.3 < width(together) / np.mean([width(week) for week in weeks]) < 0.75


def test_seeds_are_averaged_on_the_same_draw():
    """The same scores three times over have the interval of one: seeds must not make it narrower."""
    one, three = (folds.summary(folds.measure(trials(*[3.0] * n), draws=50)) for n in (1, 3))
    assert one["ap.low"] == pytest.approx(three["ap.low"], abs=1e-12)
    assert three["ap.std_seeds"] == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "no seeds"),
        ([[]], "0 seeds"),
        (trials(3.0, 3.1, weeks=1) + trials(3.0, weeks=1), "2, 1 seeds"),
        ([[simulate_scores(300, 30), simulate_scores(300, 30, seed=1)]], "Two seeds were tested on different payments"),
    ],
)
def test_what_is_no_table_of_folds_and_seeds_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        folds.measure(wrong, draws=2)


def test_models_measured_otherwise_have_no_difference():
    one = folds.measure(trials(3.0, weeks=1), draws=5)
    for other in (folds.measure(trials(3.0, weeks=2), draws=5), folds.measure(trials(3.0, weeks=1), draws=6)):
        with pytest.raises(ValueError, match="same folds with the same options"):
            folds.difference(one, other)


def test_groups_hold_their_payers_and_are_judged_where_frauds_are_enough():
    more = {"seen": pl.col("payer_id") < "c00200", "earlier": pl.int_range(pl.len()).over("payer_id")}
    given = [[scores.with_columns(**more) for scores in seeds] for seeds in trials(3.0)]
    found = folds.groups(given)
    assert list(found) == ["seen", "new", "cold"]
    assert (folds.counts(found["seen"]) + folds.counts(found["new"])).tolist() == folds.counts(given).tolist()
    assert all((scores["earlier"] < 5).all() for seeds in found["cold"] for scores in seeds)
    frauds = folds.counts(given)[:, 1].sum()
    assert folds.judgeable(given, frauds)
    assert not folds.judgeable(given, frauds + 1)
    one_kind = [*given, [given[0][0].filter(~pl.col("is_fraud"))]]
    assert not folds.judgeable(one_kind)
    assert folds.groups([[scores.with_columns(payer_id=pl.lit(None, pl.String)) for scores in given[0]]]) == {}
