"""Metrics against literal, slow definitions and against published payments."""

from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fraudlab.evaluation.metrics import (
    auc,
    card_precision,
    ece,
    metrics,
    precision_at_budget,
    rank,
    recall_at_budget,
    simulate_scores,
    value_detected,
)

HANDBOOK = Path(__file__).parents[2] / "shared" / "data" / "handbook_raw.parquet"
SEVENTH = pl.col("payment_id") == "p000007"


def days_of(scores: pl.DataFrame) -> list[list[dict]]:
    "Payments of each UTC day, the queue's order: highest score, then earliest, first."
    scores = scores.sort("score", "event_time", "payment_id", descending=[True, False, False])
    rows = scores.with_columns(day=pl.col("event_time").dt.date()).to_dicts()
    return [[r for r in rows if r["day"] == day] for day in sorted({r["day"] for r in rows})]


def literal_card_precision(scores: pl.DataFrame, k: int) -> float:
    "The book's definition, payer by payer."
    found, daily = set(), []
    for rows in days_of(scores):
        best, compromised = {}, set()
        for r in rows:
            if r["payer_id"] not in found:
                best[r["payer_id"]] = max(best.get(r["payer_id"], -np.inf), r["score"])
                compromised |= {r["payer_id"]} if r["is_fraud"] else set()
        called = sorted(best, key=best.get, reverse=True)[:k]  # stable: payers of equal score in the order of the queue
        hits = [p for p in called if p in compromised]
        found.update(hits)
        daily.append(len(hits) / k)
    return sum(daily) / len(daily)


def literal_value_detected(scores: pl.DataFrame, ratio: float) -> float:
    rows = scores.to_dicts()
    genuine = [r["score"] for r in rows if not r["is_fraud"]]
    lost = sum(r["amount"] for r in rows if r["is_fraud"])
    allowed = [t for t in {r["score"] for r in rows} if sum(s >= t for s in genuine) <= ratio * len(genuine)]
    return sum(r["amount"] for r in rows if r["is_fraud"] and r["score"] >= min(allowed)) / lost if allowed else 0.0


payments = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 3 * 24 - 1), st.booleans(), st.integers(0, 8), st.integers(1, 90)),
    min_size=2,
    max_size=40,
).filter(lambda rows: len({fraud for _, _, fraud, _, _ in rows}) == 2)


def frame(rows) -> pl.DataFrame:
    return pl.DataFrame(
        [(f"p{i}", f"c{payer}", fraud, score / 8, float(amount), hour) for i, (payer, hour, fraud, score, amount) in enumerate(rows)],
        schema=["payment_id", "payer_id", "is_fraud", "score", "amount", "hour"],
        orient="row",
    ).with_columns(event_time=(pl.datetime(2024, 3, 1, time_zone="UTC") + pl.duration(hours="hour")).cast(pl.Datetime("us", "UTC")))


@settings(max_examples=150, deadline=None)
@given(payments, st.integers(1, 6))
def test_card_precision_is_the_literal_definition(rows, k):
    assert card_precision(frame(rows), k) == pytest.approx(literal_card_precision(frame(rows), k))


@settings(max_examples=100, deadline=None)
@given(payments, st.integers(1, 6))
def test_budget_is_the_literal_definition(rows, budget):
    scores = frame(rows)
    alerts = [r for day in days_of(scores) for r in day[:budget]]
    frauds = sum(r["is_fraud"] for r in alerts)
    assert precision_at_budget(scores, budget) == pytest.approx(frauds / len(alerts))
    assert recall_at_budget(scores, budget) == pytest.approx(frauds / scores["is_fraud"].sum())


@settings(max_examples=100, deadline=None)
@given(payments, st.sampled_from([0.0, 0.01, 0.1, 0.25, 1 / 3, 0.5, 1.0]))
def test_value_detected_is_the_literal_definition(rows, ratio):
    assert value_detected(frame(rows), ratio) == pytest.approx(literal_value_detected(frame(rows), ratio))


@settings(max_examples=60, deadline=None)
@given(payments, st.randoms(use_true_random=False))
def test_no_metric_depends_on_the_order_of_rows(rows, random):
    scores = frame(rows)
    order = list(range(len(scores)))
    random.shuffle(order)
    for name, metric in metrics.items():
        assert metric(scores) == pytest.approx(metric(scores[order]), abs=1e-12), name


@settings(max_examples=60, deadline=None)
@given(payments, st.data())
def test_a_weight_is_that_many_copies(rows, data):
    "Weights of payers give what the same metric gives for a frame in which each payer stands that many times, as other payers."
    scores = frame([(*r[:3], i, r[4]) for i, r in enumerate(rows)]).with_columns(pl.col("score") / 5)  # distinct scores, from 0 to 1
    copies = data.draw(st.fixed_dictionaries({p: st.integers(0, 3) for p in sorted(set(scores["payer_id"]))}))
    drawn = pl.concat(
        [
            scores.filter(pl.col("payer_id").replace_strict(copies, return_dtype=pl.Int64) > n).with_columns(
                pl.col("payment_id", "payer_id") + f"#{n}"
            )
            for n in range(3)
        ]
    )
    assume(drawn["is_fraud"].n_unique() == 2)
    r = rank(scores)
    weights = np.array([copies[p] for p in sorted(copies)], dtype=np.float64)[r.cluster]
    for name, metric in (metrics | {"cp2": partial(card_precision, k=2), "precision_at_2": partial(precision_at_budget, budget=2)}).items():
        if name != "ece":
            assert metric(r, weights=weights) == pytest.approx(metric(drawn), abs=1e-9), name


def test_ece_bins_hold_equal_numbers():
    "Three payments a bin, each bin's gap written out."
    score = [0.1, 0.2, 0.3, 0.6, 0.7, 0.8]
    scores = frame([(0, i, fraud, 0, 1) for i, fraud in enumerate([False, True, False, True, True, True])]).with_columns(
        score=pl.Series(score)
    )
    assert ece(scores, bins=2) == pytest.approx(0.5 * abs(1 / 3 - 0.2) + 0.5 * abs(1.0 - 0.7))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.drop("amount"), "lack amount"),
        (lambda s: s.clear(), "test period is empty"),
        (lambda s: s.filter("is_fraud"), "132 frauds among 132 payments"),
        (lambda s: s.filter(~pl.col("is_fraud")), "0 frauds among 19868 payments"),
        (lambda s: s.with_columns(pl.col("is_fraud").cast(pl.Int8)), "is_fraud is Int8: must be Boolean"),
        (lambda s: s.with_columns(pl.col("event_time").dt.replace_time_zone(None)), "event_time is Datetime"),
        (lambda s: pl.concat([s, s.head(1)]), "payment_id is there twice in 2 of 20001 rows, first in payment 'p000000'"),
        (lambda s: s.with_columns(amount=pl.when(SEVENTH).then(float("inf")).otherwise("amount")), "amount is not finite in 1 .*'p000007'"),
        (lambda s: s.with_columns(payer_id=pl.when(SEVENTH).then(None).otherwise("payer_id")), "payer_id is null in 1 of 20000 rows"),
    ],
)
def test_what_cannot_be_scored_is_refused(spoil, message):
    with pytest.raises(ValueError, match=message):
        auc(spoil(simulate_scores()))


def test_options_are_checked():
    scores = simulate_scores(2000)
    with pytest.raises(ValueError, match="k = 0"):
        card_precision(scores, 0)
    with pytest.raises(ValueError, match="budget = 0"):
        recall_at_budget(scores, 0)
    with pytest.raises(ValueError, match="scores go from 0 to 2"):
        ece(scores.with_columns(score=2.0 * pl.col("is_fraud")))
    with pytest.raises(ValueError, match="no fraud has an amount"):
        value_detected(scores.with_columns(amount=pl.lit(0.0)))


@pytest.mark.skipif(not HANDBOOK.is_file(), reason=f"needs the published file {HANDBOOK.name} in ../shared/data")
def test_published_payments_by_amount():
    "The book's test week with the amount as score: 47 compromised cards in 700 calls (a random forest finds 201, the book's .287)."
    raw = pl.scan_parquet(HANDBOOK).with_columns(day=pl.col("TX_DATETIME").dt.date())
    fraud, test = pl.col("TX_FRAUD") == 1, pl.date(2018, 8, 8)
    rows = []
    for n in range(7):
        learned = pl.col("day").is_between(pl.date(2018, 7, 25), test + pl.duration(days=n - 8))  # labels come 7 days late
        known = raw.filter(fraud & learned).select("CUSTOMER_ID")
        rows.append(raw.filter(pl.col("day") == test + pl.duration(days=n)).join(known, on="CUSTOMER_ID", how="anti"))
    scores = (
        pl.concat(rows)
        .select(
            payment_id=pl.col("TRANSACTION_ID").cast(pl.String),
            event_time=pl.col("TX_DATETIME").cast(pl.Datetime("us")).dt.replace_time_zone("UTC"),
            payer_id=pl.col("CUSTOMER_ID").cast(pl.String),
            amount=pl.col("TX_AMOUNT_CENTS") / 100,
            is_fraud=fraud,
            score=(pl.col("TX_AMOUNT_CENTS") / 100_000).cast(pl.Float64),
        )
        .collect()
    )
    assert (len(scores), scores["is_fraud"].sum()) == (58264, 385)
    assert card_precision(scores, 100) == pytest.approx(47 / 700) == literal_card_precision(scores, 100)
