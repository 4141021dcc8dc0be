"""The offline and the online engine against the reference, on inputs that hypothesis makes: ties, nulls, bursts, late events."""

import itertools
import re
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest
from features_reference import ALL, EVERYTHING, MIXED, SPANS, assert_close, examples, reference, tables, together
from hypothesis import given, settings
from hypothesis import strategies as st

from fraudlab.features.definitions import DAY, Decay, FeatureSet, Risk, Row, Since, Velocity, Window
from fraudlab.features.offline import Offline, compute, compute_parts
from fraudlab.features.online import STATUS, Memory, Online, OtherCurrency

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


def test_between_parts_only_payments_that_a_window_still_needs_are_held():
    payments, labels = together(examples(60))
    engine = Offline(SOME, labels)
    reach = {"payer": 37, "payer+payee": 7, "device": 7}  # days: the longest delay + length
    most, seen = dict.fromkeys(reach, 0), 0
    for part in payments.iter_slices(50):
        engine.add(part)
        seen += len(part)
        for entity, days in reach.items():
            times = engine.held[entity].E[:, 0]
            assert (times >= part["event_time"].to_physical()[-1] - days * DAY).all()
            assert engine.held[entity].starts[-1] == len(times) == len(engine.held[entity].W)
            most[entity] = max(most[entity], len(times))
    assert all(0 < n < seen / 2 for n in most.values()), (most, seen)


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
    memory, store = Memory(engine, entities=1), {}
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
    memory = Memory(engine)
    first, last = payments.row(0, named=True), payments.row(0, named=True) | {"payment_id": "last"}
    last["event_time"] += timedelta(days=3)
    assert memory.update(last)[1] == "new"
    values, what = memory.update(first)
    assert what == "too late"
    assert np.isnan(values).all()
    again, _ = memory.update(last | {"payment_id": "next", "event_time": last["event_time"] + timedelta(hours=1)})
    assert again[SOME.names.index("all")] == last["amount"]


MEANS = FeatureSet(
    (Window("count", "payee", "count", "1d"), Window("mean", "payer", "mean", "1d"), Decay("sum", "payer+payee", "sum", "1d"))
)
EUROS = {
    "payment_id": "1",
    "event_time": datetime(2026, 1, 1, tzinfo=UTC),
    "payer_id": "a",
    "payee_id": "x",
    "amount": 1.0,
    "currency": "EUR",
}


def paid(hour: float, **changes) -> dict:
    return EUROS | {"payment_id": f"at {hour}", "event_time": EUROS["event_time"] + timedelta(hours=hour)} | changes


@pytest.mark.parametrize("hour", [0, -1, -30, 2])  # a duplicate's time, late, too late, new
def test_an_amount_in_another_currency_is_refused_and_changes_nothing(hour):
    engine = Online(MEANS)
    memory, store = Memory(engine), {}

    def stored(p):
        mine = engine.keys(p)
        values, states, what = engine.update([store.get(k) for k in mine], p)
        store.update(zip(mine, states, strict=True))
        return values, what

    for p in (paid(-40, currency=None), paid(0), paid(1, payer_id="b", currency="JPY"), paid(1.5, payer_id="c", currency=None)):
        assert (
            stored(p)[1] == memory.update(p)[1] == "new"
        )  # another payer may pay the same payee in yen: nothing of the payee's is added up
    before, held = dict(store), [memory.states(k) for k in range(3)]
    for update in (memory.update, stored):
        says = rf"Payment 'at {hour}' is in JPY, and the earlier ones of its payer are in EUR: 'mean' adds .*'payer\+currency'"
        with pytest.raises(OtherCurrency, match=says):
            update(paid(hour, payee_id="new", currency="JPY"))
    assert store == before
    assert [memory.states(k) for k in range(3)] == held
    values, _ = memory.update(paid(3))
    assert np.array_equal(values, stored(paid(3))[0])
    assert values[1] == 1


def test_a_replay_refuses_an_amount_in_another_currency():
    payments = pl.DataFrame([paid(h, currency=c) for h, c in enumerate(("EUR", None, "EUR", "JPY", "EUR"))])
    memory = Memory(Online(MEANS))
    with pytest.raises(OtherCurrency, match=r"Payment 'at 3' is in JPY.* are in EUR"):
        memory.replay(payments)
    assert memory.update(paid(5))[0][0] == 3  # those before it are there


BAD = [
    ("amount", "10.00", "a number, of less than"),
    ("amount", None, "not null"),
    ("amount", float("nan"), "not null"),
    ("amount", float("inf"), r"less than 9\.2e\+14"),
    ("amount", 1e15, "less than"),
    ("event_time", None, "not null"),
    ("event_time", "2026-01-01T00:00:00Z", "a datetime with a zone"),
    ("event_time", datetime(2026, 1, 1), "a datetime with a zone"),
    ("event_time", 1767225600.0, "a datetime with a zone"),
    ("payer_id", None, "not null; give it, or use a feature set without payers and payees"),
    ("payee_id", 1.5, "text, an integer, or true or false"),
    ("payment_id", None, "not null"),
    ("device", ["phone"], "text, an integer, or true or false, or null"),
    ("distance", "far", "a number, of less than"),
    ("lat", "north", "a number"),
    ("currency", "Euro", "three capital letters"),
]


@pytest.mark.parametrize(("name", "value", "rule"), BAD)
def test_a_field_that_cannot_be_read_is_named_and_changes_nothing(engine, name, value, rule):
    good = tables_of_one()[0].row(0, named=True)
    memory = Memory(engine)
    memory.update(good)
    held = [memory.states(k) for k in range(len(engine.plans))]
    bad = good | {"payment_id": "bad", name: value}
    for read in (memory.update, lambda p: engine.update([None] * len(engine.plans), p)):
        with pytest.raises(ValueError, match=f"^{name} is {re.escape(repr(value))}: it must be .*{rule}"):
            read(bad)
        with pytest.raises(ValueError, match=f"The payment has no '{name}'") if name != "currency" else nullcontext():
            read({k: v for k, v in bad.items() if k != name})
    if name in ("payer_id", "device"):
        with pytest.raises(ValueError, match=f"The payment has no '{name}'"):
            engine.keys({k: v for k, v in bad.items() if k != name})
    if name != "currency":
        assert [memory.states(k) for k in range(len(engine.plans))] == held


def test_features_of_the_payment_alone_refuse_what_they_cannot_read():
    alone = Memory(Online(FeatureSet((Row("log", "log_amount"), Row("exponent", "currency_exponent")))))
    assert alone.update(EUROS)[0].tolist() == [np.float32(np.log(2)), 2]
    for bad in ({"amount": "1"}, {"amount": float("nan")}, {"amount": None}, {"currency": ["EUR"]}):
        with pytest.raises(ValueError, match=f"^{next(iter(bad))} is "):
            alone.update(EUROS | bad)


def test_a_replay_refuses_what_a_table_may_not_hold(engine):
    payments, labels = tables_of_one()
    for change, says in (
        (pl.lit(None, pl.Float64).alias("amount"), "amount is null or NaN in 1 of 1"),
        (pl.lit("x").alias("lat"), "'lat' is String"),
    ):
        with pytest.raises(ValueError, match=says):
            Memory(engine).replay(payments.with_columns(change), labels)


def test_one_currency_is_asked_only_of_entities_whose_amounts_are_added():
    assert [[f.name for f in fs] for fs in Online(MEANS).adding] == [[], ["mean"], ["sum"]]  # payee, payer, payer+payee
    apart = FeatureSet(tuple(replace(f, entity=f"{f.entity}+currency") for f in MEANS.features))
    assert not any(Online(apart).adding)


def recoded(payments: pl.DataFrame, kind) -> pl.DataFrame:
    """Device, payer and payee as `kind`: number them, and read the numbers as text, integers, truths or categories."""
    names = ["device", "payer_id", "payee_id"]
    if kind is pl.Boolean:
        return payments.with_columns(pl.col(n).rank("dense") > 1 for n in names)
    numbers = payments.with_columns(pl.col(n).rank("dense").cast(pl.Int64) - 1 for n in names)
    return numbers if kind is pl.Int64 else numbers.with_columns(pl.col(names).cast(pl.String).cast(kind))


@pytest.mark.parametrize("kind", [pl.Int64, pl.Boolean, pl.Categorical(), pl.Enum([str(i) for i in range(40)])], ids=str)
def test_keys_and_categories_of_any_type_count_as_their_text(kind):
    payments, labels = together(examples(12))
    payments = recoded(payments, kind)
    value = "true" if kind is pl.Boolean else "0"
    features = FeatureSet(tuple(replace(f, value=value) if f.take == "share" else f for f in SOME.features))
    texts = payments.with_columns(pl.col("device", "payer_id", "payee_id").cast(pl.String))
    expected = compute(features, texts, labels)
    assert expected["share"].drop_nans().n_unique() > 2
    assert_close(compute(features, payments, labels), expected, features)
    assert_close(pl.concat(compute_parts(features, payments.iter_slices(50), labels)), expected, features)
    engine = Online(features)
    assert_close(frame(payments, Memory(engine).replay(payments, labels)[0], features), expected, features)
    memory, other, known = Memory(engine), Memory(engine), labels.head(0)
    memory.replay(payments[:20], known)
    for p, q in zip(payments[:20].to_dicts(), texts[:20].to_dicts(), strict=True):
        assert np.array_equal(memory.update(p)[0], other.update(q)[0], equal_nan=True)  # a duplicate: the same codes
        assert memory.update(q)[1] == "duplicate"
        assert engine.keys(p) == engine.keys(q)


def tables_of_one():
    payments, labels = examples(1)[0]
    return payments.head(1).with_columns(device=pl.lit("web")), labels


def test_state_continues_a_table_without_gap_or_double_count(engine):
    """Backfill with the first half, go on with the second: payments, and the reports that come meanwhile."""
    payments, labels = together(examples(60))
    paid = labels.join(payments.select("payment_id", "event_time"), on="payment_id")
    labels = paid.filter(pl.col("known_at") > pl.col("event_time")).drop("event_time")
    memory, half = Memory(engine), len(payments) // 2
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
