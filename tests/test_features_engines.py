"""The offline and the online engine against the reference, on inputs that hypothesis makes: ties, nulls, bursts, late events."""

import itertools
from datetime import timedelta

import numpy as np
import polars as pl
import pytest
from features_reference import ALL, EVERYTHING, MIXED, SPANS, assert_close, examples, reference, tables, together
from hypothesis import given, settings
from hypothesis import strategies as st

from fraudlab.features.definitions import Decay, FeatureSet, Risk, Since, Velocity, Window
from fraudlab.features.offline import Offline, compute, compute_parts
from fraudlab.features.online import STATUS, Memory, Online

# every kind and take once, in few entities: each is compiled
SOME = FeatureSet(
    (
        *(Window(f"{take}_{length}_{closed}", "payer", take, length, delay=delay, closed=closed) for take, (length, delay, closed) in
          zip(("count", "sum", "mean", "std", "min", "max", "zscore", "ratio"), [*SPANS[:3], *SPANS[1:]], strict=True)),
        Window("all", "payer", "mean", ALL),
        Window("extreme", "payer", "max", ALL),
        Window("distinct", "payer", "distinct", "7d", "device", closed="right"),
        Window("share", "payer", "share", ALL, "device", "phone", delay="1d"),
        Window("distance", "payer", "std", "7d", "distance"),
        Risk("frauds", "payer+payee", "frauds", "7d", closed="right"),
        Risk("rate", "payer+payee", "rate", "6d", "1d", 0.02, 10.0),
        Decay("fading", "payer", "mean", "1h", "distance"),
        Decay("faded", "payer", "sum", "7d"),
        Since("last", "payer", "last"),
        Since("first", "payer", "first"),
        Since("same", "payer", "same", "device"),
        Velocity("velocity", "payer", "lat", "lon"),
        Window("device", "device", "sum", "7d", closed="right"),
    )
)  # fmt: skip


@pytest.fixture(scope="module")
def engine():
    return Online(SOME, lateness="2d")


def frame(payments: pl.DataFrame, values: np.ndarray, features: FeatureSet) -> pl.DataFrame:
    return pl.DataFrame({"payment_id": payments["payment_id"]} | {name: values[:, k] for k, name in enumerate(features.names)})


def test_offline_equals_the_reference_for_every_kind():
    payments, labels = together(examples(200))
    assert_close(compute(EVERYTHING, payments, labels), reference(EVERYTHING, payments, labels))


@settings(max_examples=80, deadline=None)
@given(tables())
def test_engines_equal_the_reference(engine, pair):
    payments, labels = pair
    expected = reference(SOME, payments, labels)
    assert_close(compute(SOME, payments, labels), expected, SOME)
    engine.currency = None
    values, status = Memory(engine, entities=1).replay(payments, labels)
    assert set(status) <= {0}
    assert_close(frame(payments, values, SOME), expected, SOME)


@settings(max_examples=30, deadline=None)
@given(tables(), st.lists(st.integers(0, 20), max_size=4))
def test_a_table_in_parts_equals_the_whole(pair, cuts):
    payments, labels = pair
    cuts = [0, *sorted(min(c, len(payments)) for c in cuts), len(payments)]
    parts = [payments[a:b] for a, b in itertools.pairwise(cuts)]
    assert_close(pl.concat(compute_parts(SOME, parts, labels)), compute(SOME, payments, labels), SOME)


def test_parts_of_many_payers_equal_the_whole():
    payments, labels = together(examples(120))
    parts = list(payments.iter_slices(100))
    engine = Offline(EVERYTHING, labels)
    assert_close(pl.concat([engine.add(part) for part in parts]), compute(EVERYTHING, payments, labels))


def test_mixed_currencies():
    for payments, labels in examples(5, mixed=True):
        expected = reference(MIXED, payments, labels)
        assert_close(compute(MIXED, payments, labels), expected, MIXED)


@settings(max_examples=60, deadline=None)
@given(tables(max_size=10), st.randoms(use_true_random=False))
def test_late_payments_duplicates_and_late_reports(engine, pair, random):
    """In any order of arrival, a payment's features are the reference's over what has come by then; packed states are those in memory."""
    payments, labels = pair
    rows = payments.to_dicts()
    arrivals = sorted(range(len(rows)), key=lambda i: (rows[i]["event_time"] + timedelta(hours=random.choice([0, 0, 30, 47])), i))
    known = {r["payment_id"]: r["known_at"] for r in labels.to_dicts() if r["is_fraud"]}
    engine.currency, memory, store = None, Memory(engine, entities=1), {}
    come, told = [], []
    for i in arrivals:
        for name in [p["payment_id"] for p in come if p["payment_id"] in known and p["payment_id"] not in told and random.random() < 0.5]:
            told.append(name)  # a report may come before the payments of its time: it counts from `known_at` on
            p = next(p for p in come if p["payment_id"] == name)
            memory.report(p, known[name])
            mine = engine.keys(p)
            states = engine.report([store.get(k) for k in mine], p, known[name])
            store.update((k, s) for k, s in zip(mine, states, strict=True) if k)
        come = sorted([*come, rows[i]], key=lambda p: p["event_time"])  # stable: the later comer is after its equals
        at = next(n for n, p in enumerate(come) if p is rows[i])
        reported = labels.filter(pl.col("payment_id").is_in(told))
        expected = reference(SOME, pl.DataFrame(come, payments.schema), reported)[at]
        for _ in range(2):  # once more: a duplicate
            values, what = memory.update(rows[i])
            mine = engine.keys(rows[i])
            packed, states, same = engine.update([store.get(k) for k in mine], rows[i])
            store.update((k, s) for k, s in zip(mine, states, strict=True) if k)
            assert what == same in STATUS
            assert np.array_equal(values, packed, equal_nan=True)
            assert_close(frame(expected, values[None], SOME), expected, SOME)
        assert what == "duplicate"


def test_too_late_is_not_added(engine):
    payments, _ = tables_of_one()
    engine.currency, memory = None, Memory(engine)
    first, last = payments.row(0, named=True), payments.row(0, named=True) | {"payment_id": "last"}
    last["event_time"] += timedelta(days=3)
    assert memory.update(last)[1] == "new"
    values, what = memory.update(first)
    assert what == "too late"
    assert np.isnan(values).all()
    again, _ = memory.update(last | {"payment_id": "next", "event_time": last["event_time"] + timedelta(hours=1)})
    assert again[SOME.names.index("all")] == last["amount"]


def tables_of_one():
    payments, labels = examples(1)[0]
    return payments.head(1).with_columns(device=pl.lit("web")), labels


def test_state_continues_a_table_without_gap_or_double_count(engine):
    """Backfill with the first half, go on with the second: payments, and the reports that come meanwhile."""
    payments, labels = together(examples(60))
    paid = labels.join(payments.select("payment_id", "event_time"), on="payment_id")
    labels = paid.filter(pl.col("known_at") > pl.col("event_time")).drop("event_time")
    engine.currency, memory, half = None, Memory(engine), len(payments) // 2
    start = payments["event_time"][half]
    memory.replay(payments[:half], labels.filter(pl.col("known_at") < start))
    by_id = {p["payment_id"]: p for p in payments.to_dicts()}
    reports = [(r["known_at"], 0, by_id[r["payment_id"]]) for r in labels.filter("is_fraud", pl.col("known_at") >= start).to_dicts()]
    values = []
    for at, is_payment, p in sorted(reports + [(p["event_time"], 1, p) for p in payments[half:].to_dicts()], key=lambda c: c[:2]):
        if is_payment:
            values.append(memory.update(p)[0])
        else:
            memory.report(p, at)
    assert_close(frame(payments[half:], np.stack(values), SOME), compute(SOME, payments, labels)[half:], SOME)
