"""Both engines against a reference that is slow and obviously right, on inputs that hypothesis makes: ties, bursts, late labels."""

from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from fraudlab.features.definitions import DAY, FeatureSet, Window
from fraudlab.features.offline import compute, fraud_known
from fraudlab.features.online import NO_EVENTS, add, event, features_at, horizon, microseconds

START = datetime(2018, 2, 27, tzinfo=UTC)
FEATURES = FeatureSet(
    tuple(
        Window(f"{entity}_{take}_{days}_{delay}_{closed}", entity, take, days, delay, closed)
        for entity in ("payer", "payee")
        for take in ("count", "mean_amount", "fraud_share")
        for days, delay in ((0.5, 0), (2, 0), (2, 1))
        for closed in ("left", "right")
    )
)


def reference(w: Window, rows: list[dict], i: int) -> float:
    """The definition, word for word."""
    now = rows[i]
    end, start = now["time"] - w.delay_days * DAY, now["time"] - (w.delay_days + w.days) * DAY
    seen = []
    for j, row in enumerate(rows):
        if row[w.entity] != now[w.entity]:
            continue
        if w.closed == "left" and start <= row["time"] < end:
            seen.append(row)
        if w.closed == "right" and start < row["time"] <= end and (w.delay_days or j <= i):
            seen.append(row)
    if w.take == "count" or not seen:
        return float(len(seen))
    if w.take == "mean_amount":
        return sum(round(row["amount"] * 10_000) for row in seen) / 10_000 / len(seen)
    return sum(row["known"] < now["time"] or (w.closed == "right" and row["known"] == now["time"]) for row in seen) / len(seen)


payment = st.tuples(
    st.integers(0, 24),  # sixths of a day: many ties, and a month's end
    st.sampled_from("ab"),
    st.sampled_from("xyz"),
    st.integers(0, 1_000_000).map(lambda m: m / 10_000),
    st.none() | st.integers(0, 12),  # sixths of a day until a fraud is known
)


def tables(rows: list[tuple]) -> tuple[pl.DataFrame, pl.DataFrame]:
    at = lambda sixths: START + timedelta(hours=4 * sixths)  # noqa: E731
    payments = {"payment_id": [str(i) for i in range(len(rows))], "event_time": [at(r[0]) for r in rows]}
    payments |= {"payer_id": [r[1] for r in rows], "payee_id": [r[2] for r in rows], "amount": [r[3] for r in rows]}
    labels = {
        "payment_id": payments["payment_id"],
        "is_fraud": [r[4] is not None for r in rows],
        "known_at": [at(r[0] + (r[4] or 0)) for r in rows],
    }
    time = pl.Datetime("us", "UTC")
    schema = {"payment_id": pl.String, "event_time": time, "payer_id": pl.String, "payee_id": pl.String, "amount": pl.Float64}
    return pl.DataFrame(payments, schema), pl.DataFrame(labels, {"payment_id": pl.String, "is_fraud": pl.Boolean, "known_at": time})


@settings(max_examples=60, deadline=None)
@given(st.lists(payment, min_size=1, max_size=25).map(lambda rows: sorted(rows, key=lambda r: r[0])))
def test_offline_and_online_equal_the_reference(rows):
    payments, labels = tables(rows)
    known = fraud_known(payments, labels).tolist()
    plain = [
        {"time": microseconds(p["event_time"]), "payer": p["payer_id"], "payee": p["payee_id"], "amount": p["amount"], "known": k}
        for p, k in zip(payments.iter_rows(named=True), known, strict=True)
    ]
    offline = compute(FEATURES, payments, labels)
    state = {}
    for i, (p, row) in enumerate(zip(payments.iter_rows(named=True), plain, strict=True)):
        for entity in ("payer", "payee"):
            key = entity, row[entity]
            state[key] = add(state.get(key, NO_EVENTS), event(row["time"], row["amount"], row["known"]), horizon(FEATURES, entity))
        online = features_at(FEATURES, p["event_time"], {entity: state[entity, row[entity]] for entity in ("payer", "payee")})
        for w in FEATURES.features:
            expected = np.float32(reference(w, plain, i))
            assert offline[w.name][i] == expected, (w, "offline")
            # a delayed right-closed window, seen online, cannot hold ties of a later place: they have not come yet
            assert online[w.name] == expected, (w, "online")


def test_a_late_payment_sees_its_own_windows():
    window = Window("count", "payer", "count", 1)
    events, features = NO_EVENTS, FeatureSet((window,))
    hours = lambda h: microseconds(START) + h * 3_600_000_000  # noqa: E731
    for h in (0, 1, 2, 27):
        events = add(events, event(hours(h), 1.0), horizon(features, "payer"))
    late = add(events, event(hours(3), 1.0), horizon(features, "payer"))
    assert features_at(features, START + timedelta(hours=3), {"payer": late}) == {"count": 3.0}


@settings(max_examples=40, deadline=None)
@given(st.lists(payment, min_size=2, max_size=20).map(lambda rows: sorted(rows, key=lambda r: r[0])), st.data())
def test_what_is_seen_at_a_time_does_not_move_when_the_future_changes(rows, data):
    """The first law: payments at or after `t` go, come or change, and so do labels known then: nothing before `t` moves."""
    cut = data.draw(st.integers(0, 24))
    payments, labels = tables(rows)
    start = START + timedelta(hours=4 * cut)
    future = data.draw(st.lists(payment, max_size=5).map(lambda rows: sorted([(max(r[0], cut), *r[1:]) for r in rows], key=lambda r: r[0])))
    other, other_labels = tables([*(r for r in rows if r[0] < cut), *future])
    seen = payments.filter(pl.col("event_time") < start)
    known = labels.join(seen, on="payment_id", how="semi").filter(pl.col("known_at") < start)
    known = pl.concat([known, other_labels.filter(pl.col("known_at") >= start)]).unique("payment_id", keep="first")
    left = FeatureSet(tuple(w for w in FEATURES.windows if w.closed == "left"))
    before = payments["event_time"] < start
    assert compute(left, payments, labels).filter(before).equals(compute(left, other, known).head(int(before.sum())))
