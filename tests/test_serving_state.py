"""What the service remembers, on every kind of store: all or nothing, by several processes, after labels, and from the offline tables."""

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from test_stores import address, redis, server  # noqa: F401

from fraudlab.features import online
from fraudlab.features.definitions import FeatureSet, Risk, Window
from fraudlab.features.encoding import Encoding
from fraudlab.features.offline import compute
from fraudlab.features.sequences import Dataset
from fraudlab.features.stores import StoreError, open_store
from fraudlab.serving import state as states
from fraudlab.serving.scorer import Scorer
from fraudlab.serving.state import Conflict, State, backfill, copy_state

FEATURES = FeatureSet(
    (
        Window("payer_count", "payer", "count", "7d"),
        Window("pair_mean", "payer+payee", "mean", "30d"),
        Window("device_people", "device", "distinct", "3d", of="payer"),
        Risk("payee_rate", "payee", "rate", "20d", delay="2d"),
    )
)
T, START = 4, datetime(2026, 1, 1, tzinfo=UTC)


def made(n=400, days=60):
    """A bundle that sums up what it is shown, the payments, the labels, the encoded rows and the offline scores."""
    rng = np.random.default_rng(0)
    times = np.sort(rng.integers(0, days * 24, n)) * 3_600_000_000 + int(START.timestamp() * 1e6)
    payments = pl.DataFrame(
        {
            "payment_id": [f"id-{i}" for i in range(n)],
            "event_time": pl.Series(times).cast(pl.Datetime("us", "UTC")),
            "payer_id": rng.integers(0, 12, n).astype(str),
            "payee_id": rng.integers(0, 6, n).astype(str),
            "amount": rng.uniform(0, 200, n).round(2),
            "currency": "EUR",
            "device": pl.Series([None if d == 0 else f"d{d}" for d in rng.integers(0, 5, n)]),
        }
    )
    known = pl.col("event_time") + pl.duration(hours=pl.Series(rng.integers(1, 24 * 14, n)))
    labels = payments.select("payment_id", is_fraud=pl.Series(rng.random(n) < 0.3), known_at=known)
    frame = payments.join(compute(FEATURES, payments, labels), on="payment_id", maintain_order="left")
    encoding = Encoding.fit(frame[:200], ["amount", *FEATURES.names])
    data = Dataset(encoding.encode(frame), encoding.columns, payments["payer_id"], payments["event_time"])
    score = lambda x: x.rows.sum(1) + (x.history.sum(2) * x.mask).sum(1) + x.elapsed.sum(1) / 1e5  # noqa: E731
    bundle = SimpleNamespace(features=FEATURES.to_dict(), columns=encoding.to_dict(), history=T, score=score)
    return SimpleNamespace(
        bundle=bundle, payments=payments, labels=labels, rows=data.rows, offline=score(data.inputs(np.arange(n), T)), times=times
    )


@pytest.fixture(scope="module")
def world():
    return made()


def moment(time) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=int(time))


def replay(scorer: Scorer, world, start: int, stop: int) -> list[float]:
    """Scores of the payments from `start` to `stop`, in lists of 1 to 8, with the reports as they come."""
    rng, at, scores = np.random.default_rng(start), start, []
    reported = moment(world.times[start])
    while at < stop:
        batch = world.payments[at : min(stop, at + rng.integers(1, 9))].to_dicts()
        now = batch[-1]["event_time"]  # a report counts from its known_at on, however early it is sent
        due = world.labels.filter(pl.col("is_fraud") & (pl.col("known_at") >= reported) & (pl.col("known_at") < now))
        scorer.report(due.to_dicts())
        reported = now
        scores += scorer.score(batch)
        at += len(batch)
    return scores


def test_backfilled_and_continued_it_gives_the_offline_scores(world, address):  # noqa: F811
    half = int(np.searchsorted(world.times, world.times[200]))
    state = State(world.bundle, address)
    assert backfill(state, world.payments, world.labels, world.rows, int(world.times[half])) == half
    with pytest.raises(StoreError, match="is not empty"):
        backfill(state, world.payments, world.labels, world.rows, int(world.times[half]))
    state.close()
    scorer = Scorer(world.bundle, address)
    np.testing.assert_allclose(replay(scorer, world, half, 300), world.offline[half:300], rtol=1e-6)
    scorer.state.close()
    again = Scorer(world.bundle, address)  # as if the service had been started anew
    np.testing.assert_allclose(replay(again, world, 300, 400), world.offline[300:], rtol=1e-6)
    again.state.close()


def test_several_services_share_one_state(world, redis):  # noqa: F811
    scorers = [Scorer(world.bundle, redis.address) for _ in range(3)]
    scores = [scorers[i % 3].score([p])[0] for i, p in enumerate(world.payments[:120].to_dicts())]
    alone = Scorer(world.bundle, "sqlite::memory:")
    np.testing.assert_allclose(scores, alone.score(world.payments[:120].to_dicts()), rtol=1e-6)


def everything(scorer: Scorer) -> dict[bytes, bytes]:
    return dict(item for page in scorer.state.store.pages() for item in page)


@pytest.mark.parametrize("fault", [ArithmeticError, KeyboardInterrupt])
def test_a_request_that_fails_is_forgotten_as_a_whole(world, address, fault):  # noqa: F811
    scorer = Scorer(world.bundle, address)
    first, second = world.payments[:5].to_dicts(), world.payments[5:9].to_dicts()
    scorer.score(first)
    before = everything(scorer)

    def fail(inputs):
        raise fault

    score, scorer.bundle = scorer.bundle, SimpleNamespace(**vars(scorer.bundle) | {"score": fail})
    with pytest.raises(fault):
        scorer.score(second)
    scorer.bundle = score
    with pytest.raises(Conflict):
        scorer.score([*second, first[0] | {"amount": 1.0}])
    label = {"payment_id": "id-0", "is_fraud": True, "known_at": first[0]["event_time"] + timedelta(days=1)}
    with pytest.raises(Conflict, match="known_at is before the payment"):
        scorer.report([label, label | {"payment_id": "id-1", "known_at": START - timedelta(days=1)}])
    assert everything(scorer) == before
    scorer.state.close()


def test_a_report_twice_and_taken_back_is_as_if_it_had_never_been(world, address):  # noqa: F811
    scorer = Scorer(world.bundle, address)
    payments = world.payments[:100].to_dicts()
    scorer.score(payments)
    late = payments[-1] | {"payment_id": "late", "event_time": payments[-1]["event_time"] + timedelta(days=3)}
    judged = [p for p in payments if p["payee_id"] == late["payee_id"]][-3:]
    labels = [{"payment_id": p["payment_id"], "is_fraud": True, "known_at": payments[-1]["event_time"]} for p in judged]
    assert scorer.report([*labels, *labels, labels[0] | {"payment_id": "unknown"}]) == 6
    once = [scorer.report(labels), scorer.score([late])]
    assert scorer.report([x | {"is_fraud": False} for x in labels]) == 3
    assert scorer.score([late]) != once[1]
    assert scorer.report(labels) == 3
    assert scorer.score([late]) == once[1]
    scorer.state.close()


def test_what_is_too_old_to_matter_is_let_go(world, monkeypatch):
    monkeypatch.setattr(states, "LOOKS", 16)
    scorer = Scorer(world.bundle, "sqlite::memory:")
    payments = world.payments.to_dicts()
    for p in payments:
        scorer.score([p])
    kept = {key for key in everything(scorer) if key.startswith(b"=payment=")}
    needed = {
        b"=payment=" + p["payment_id"].encode() for p in payments if p["event_time"] >= payments[-1]["event_time"] - timedelta(days=31)
    }
    assert needed <= kept
    assert len(kept) < 1.5 * len(needed) < 400


def test_a_state_of_another_model_or_half_a_state_is_refused(world, tmp_path, monkeypatch):
    address = f"lmdb:{tmp_path}/state"  # noqa: F811
    State(world.bundle, address).close()
    for other in ({"history": 5}, {"features": FEATURES.to_dict()[:2]}, {"columns": world.bundle.columns[:2]}):
        with pytest.raises(StoreError, match="was made for other features, columns or another length"):
            State(SimpleNamespace(**vars(world.bundle) | other), address)
    state = State(world.bundle, address)
    monkeypatch.setattr(states, "_histories", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        backfill(state, world.payments, world.labels, world.rows, int(world.times[-1]))
    state.close()
    with pytest.raises(StoreError, match="its backfill was interrupted"):
        State(world.bundle, address)


def test_a_payment_in_another_currency_is_a_conflict_after_a_restart_too(world, address):  # noqa: F811
    scorer = Scorer(world.bundle, address)
    first, second = world.payments[:2].to_dicts()
    scorer.score([first])
    scorer.close()
    scorer = Scorer(world.bundle, address)
    before, yen = everything(scorer), first | {"payment_id": "in yen", "currency": "JPY"}
    with pytest.raises(Conflict, match="currency is another one than that of earlier payments") as refused:
        scorer.score([second, yen])
    assert refused.value.field == "currency"
    assert everything(scorer) == before
    scorer.score([second, yen | {"payee_id": "nobody before"}])  # of the pair the mean is taken, and it is new
    scorer.close()


def test_a_state_that_is_laid_out_in_another_way_is_refused(world, tmp_path, monkeypatch):
    address = f"sqlite:{tmp_path}/state"  # noqa: F811
    scorer = Scorer(world.bundle, address)
    payment = world.payments.row(0, named=True)
    scorer.score([payment])
    keys = scorer.state.engine.keys(payment)
    packed = scorer.state.store.get_many(keys)
    scorer.close()
    monkeypatch.setattr(online, "LAYOUT", online.LAYOUT + 1)
    with pytest.raises(StoreError, match="was made for other features"):
        State(world.bundle, address)
    with pytest.raises(ValueError, match="made for another feature set, or by another version"):
        online.Online(FEATURES).update(packed, payment)


def test_a_copy_goes_on_as_the_original_does(world, tmp_path, address):  # noqa: F811
    scorer = Scorer(world.bundle, address)
    scorer.score(world.payments[:50].to_dicts())
    if address.startswith("lmdb"):
        scorer.state.close()  # a process opens an LMDB file once
    copy_state(address, f"sqlite:{tmp_path}/to/copy")
    original, copied = (Scorer(world.bundle, a) for a in (address, f"sqlite:{tmp_path}/to/copy"))
    rest = world.payments[50:70].to_dicts()
    assert original.score(rest) == copied.score(rest)
    assert everything(original) == everything(copied)
    original.state.close()
    with pytest.raises(StoreError, match="is not empty"):
        copy_state(f"sqlite:{tmp_path}/to/copy", f"sqlite:{tmp_path}/to/copy")
    assert sum(map(len, open_store(f"sqlite:{tmp_path}/to/copy").pages())) == len(everything(copied))
