"""Intervals: equal to scikit-learn's weights, the same by seed, wide enough."""

import json

import numpy as np
import polars as pl
import pytest

from fraudlab.evaluation.intervals import compare, evaluate, payer_draws, weighted_ap, weighted_auc
from fraudlab.evaluation.metrics import ap, auc, metrics, rank, simulate_scores


@pytest.mark.parametrize("digits", [1, 2, 16])
@pytest.mark.parametrize("seed", range(5))
def test_fast_areas_equal_scikit_learn(digits, seed):
    "With equal scores, with payments that are not drawn, and with none at all of the highest scores drawn."
    r = rank(simulate_scores(3000, 300, seed=seed).with_columns(pl.col("score").round(digits)))
    weights = np.random.default_rng(seed).poisson(0.7, len(r)).astype(np.float64)
    weights[:3] = 0
    for fast, slow in ((weighted_auc, auc), (weighted_ap, ap)):
        assert fast(r) == pytest.approx(slow(r), abs=1e-12)
        assert fast(r, weights) == pytest.approx(slow(r, weights), abs=1e-12)


def test_a_draw_takes_whole_payers():
    r = rank(simulate_scores(3000, 300))
    draws = np.array(list(payer_draws(r, 400)))
    assert draws.shape == (400, r.cluster.max() + 1)
    assert (draws.sum(1) == draws.shape[1]).all()  # as many payers as there are
    assert abs((draws == 0).mean() - np.exp(-1)) < 0.01  # 37 % of them left out
    assert np.abs(draws.mean(0) - 1).max() < 0.3  # none favoured: 6 standard errors


def test_every_draw_can_be_measured():
    "One defrauded payer of three is left out of 30 % of draws; those are drawn again."
    scores = simulate_scores(300, 3, seed=2).with_columns(is_fraud=(pl.col("payer_id") == "c00001") & (pl.col("amount") > 60))
    result = evaluate(scores, draws=50)
    assert all(np.isfinite(v) for v in result.values())
    assert all((copies[1] > 0) for copies in payer_draws(rank(scores), 50))


def test_result_is_complete_ordered_and_plain():
    scores = simulate_scores()
    result = evaluate(scores, draws=60)
    assert list(result) == [f"{name}{end}" for name in metrics for end in ("", ".low", ".high")]
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    for name in set(metrics) - {"ece"}:
        assert result[f"{name}.low"] < result[name] < result[f"{name}.high"], name
    for name, metric in metrics.items():
        assert result[name] == pytest.approx(metric(scores), abs=1e-12)
    assert result == evaluate(scores[::-1], draws=60)
    assert result != evaluate(scores, draws=60, seed=1)
    narrow = evaluate(scores, draws=60, level=0.5)
    assert all(narrow[f"{n}.high"] - narrow[f"{n}.low"] < result[f"{n}.high"] - result[f"{n}.low"] for n in metrics)
    with pytest.raises(ValueError, match=r"level = 95"):
        evaluate(scores, draws=2, level=95)


def test_what_is_not_defined_is_left_out():
    scores = simulate_scores(3000)
    assert not any(name.startswith("cp100") for name in evaluate(scores.with_columns(payer_id=pl.lit(None, pl.String)), draws=5))
    free = evaluate(scores.with_columns(amount=pl.lit(0.0)), draws=5)
    assert "ap.low" in free
    assert "value_detected" not in free


def test_options_reach_the_metrics():
    scores = simulate_scores(3000)
    result = evaluate(scores, draws=2, budget=7, false_positive_ratio=0.2)
    assert result["recall_at_budget"] == metrics["recall_at_budget"](scores, 7)
    assert result["precision_at_budget"] == metrics["precision_at_budget"](scores, 7)
    assert result["value_detected"] == metrics["value_detected"](scores, 0.2)


def test_compare_measures_both_in_the_same_draws():
    a, b = simulate_scores(5000, 500, skill=3.2), simulate_scores(5000, 500, skill=3.0)
    difference, back = compare(a, b[::-1], draws=60), compare(b, a, draws=60)
    one, other = evaluate(a, draws=60), evaluate(b, draws=60)
    for name in metrics:
        assert difference[name] == pytest.approx(one[name] - other[name], abs=1e-12)
        assert difference[f"{name}.low"] == pytest.approx(-back[f"{name}.high"], abs=1e-12)
    assert difference["ap.high"] - difference["ap.low"] < (one["ap.high"] - one["ap.low"]) / 2  # paired: the week's luck cancels


@pytest.mark.parametrize(
    "spoil", [lambda s: s.head(900), lambda s: s.with_columns(~pl.col("is_fraud")), lambda s: s.with_columns(payer_id=pl.lit("c"))]
)
def test_compare_wants_the_same_payments(spoil):
    scores = simulate_scores(1000)
    with pytest.raises(ValueError, match="on the same payments and labels: 1000 and"):
        compare(scores, spoil(scores))
