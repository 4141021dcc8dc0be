"""What the service remembers, on every kind of store: all or nothing, by several processes, after labels, and from the offline tables."""

import os
import signal
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import jax.numpy as jnp
import msgspec
import numpy as np
import polars as pl
import pytest
from test_stores import address, redis, server  # noqa: F401
from tiny_bundle import ANSWERS

from fraudlab.features import online
from fraudlab.features.definitions import FeatureSet, Risk, Window
from fraudlab.features.encoding import Column, Encoding
from fraudlab.features.offline import compute
from fraudlab.features.sequences import Dataset, inputs, plan
from fraudlab.features.stores import StoreError, open_store
from fraudlab.models.contract import Model, score_all, to_dict
from fraudlab.models.layers import both_ways
from fraudlab.models.steps import make_stepper
from fraudlab.models.walk import make_trees
from fraudlab.models.zoo.decoder import Decoder
from fraudlab.models.zoo.forest import Forest
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


@dataclass(frozen=True)
class Total(Model):
    """Sums up all that a payment is shown: a window of it and `T` earlier ones."""

    columns: tuple[Column, ...]
    history: int = T
    windows = True

    def score(self, weights, inputs):
        shown = both_ways(inputs)[:, 0] & (inputs.sequence > 0)[:, None]
        values = inputs.rows.sum(2) + inputs.gap / 1e5 + (inputs.time % 86_400).astype(jnp.float32) / 1e4
        return jnp.einsum("bij,bj->bi", shown.astype(jnp.float32), values)


def total(given) -> np.ndarray:
    """The same of the last token, without JAX."""
    return ((given.rows.sum(2) + given.gap / 1e5 + given.time % 86_400 / 1e4) * (given.sequence > 0)).sum(1)


def made(n=400, days=60):
    """Payments, labels, encoded rows, a bundle that sums up what it is shown, and the scores of the table."""
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
    encoding = Encoding.fit(frame[:200], [Column(name) for name in ("amount", *FEATURES.names)])
    data = Dataset(encoding.encode(frame), encoding.columns, payments["payer_id"], payments["event_time"])
    about = {"features": FEATURES.to_dict(), "columns": encoding.to_dict(), "history": T, "stepper": None}
    about |= ANSWERS
    bundle, offline = SimpleNamespace(**about, score=total), score_all(Total(data.columns), {}, data, np.arange(n))
    return SimpleNamespace(bundle=bundle, payments=payments, labels=labels, rows=data.rows, offline=offline, times=times, data=data)


@pytest.fixture(scope="module")
def world():
    return made()


@pytest.fixture(scope="module")
def stepping(world):
    """The same world, scored by the steps of a decoder that looks back less far than payers go."""
    data = world.data
    model = Decoder(data.columns, width=16, layers=2, heads=2, key_heads=1, window=8)
    weights = model.init(inputs(data, plan(data, np.arange(200), 9, 64), np.arange(3)), 0)
    weights = {k: np.asarray(v) for k, v in weights.items()} | {"judge.bias": np.zeros((), np.float32)}
    stepper = make_stepper("decoder", to_dict(model)["options"], data.columns, weights)
    bundle = SimpleNamespace(**vars(world.bundle) | {"stepper": stepper, "memory": "decoder 1", "history": model.history, "score": None})
    offline = score_all(model, weights, data, np.arange(len(data)))
    assert offline.std() > 1e-2  # a score moves with what was seen
    return SimpleNamespace(**vars(world) | {"bundle": bundle, "offline": offline})


@pytest.fixture(scope="module")
def trees(world):
    """The same world, scored by a forest that walks a payment's own row."""
    model, known = Forest(world.data.columns, trees=20, smallest_leaf=5), world.labels["is_fraud"].to_numpy()[:200]
    weights = model.fit(world.rows[:200], known)
    bundle = SimpleNamespace(**vars(world.bundle) | {"stepper": make_trees("forest", model.columns, weights), "memory": "forest 1"})
    offline = score_all(model, weights, world.data, np.arange(len(world.data)))
    assert offline.std() > 1e-2
    return SimpleNamespace(**vars(world) | {"bundle": bundle, "offline": offline})


@pytest.fixture
def way(request, world, stepping, trees):
    """A world and how near its online scores are to the offline ones, by how its model reads a payer's past."""
    alone = SimpleNamespace(**vars(world.bundle) | {"history": 0, "score": lambda shown: shown.rows.sum((1, 2))})
    rows = SimpleNamespace(**vars(world) | {"bundle": alone, "offline": world.rows.sum(1)})
    return {"rows": (rows, 1e-4), "windows": (world, 1e-4), "steps": (stepping, 1e-4), "trees": (trees, 1e-6)}[request.param]


def moment(time) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=int(time))


def scored(scorer: Scorer, payments: list[dict]) -> list[float]:
    return [x.answer.score for x in scorer.score(payments)]


def replay(scorer: Scorer, world, start: int, stop: int, most: int = 8) -> list[float]:
    """Scores of the payments from `start` to `stop`, in lists of 1 to `most`, with the reports as they come."""
    rng, at, scores = np.random.default_rng(start), start, []
    reported = moment(world.times[start])
    while at < stop:
        batch = world.payments[at : min(stop, at + rng.integers(1, most + 1))].to_dicts()
        now = batch[-1]["event_time"]  # a report counts from its known_at on, however early it is sent
        due = world.labels.filter(pl.col("is_fraud") & (pl.col("known_at") >= reported) & (pl.col("known_at") < now))
        scorer.report(due.to_dicts())
        reported = now
        scores += scored(scorer, batch)
        at += len(batch)
    return scores


@pytest.mark.parametrize("way", ["rows", "windows", "steps", "trees"], indirect=True)
def test_backfilled_and_continued_it_gives_the_offline_scores(way, address):  # noqa: F811
    world, near = way
    half = int(np.searchsorted(world.times, world.times[200]))
    state = State(world.bundle, address)
    assert backfill(state, world.payments, world.labels, world.rows, int(world.times[half])) == half
    with pytest.raises(StoreError, match="is not empty"):
        backfill(state, world.payments, world.labels, world.rows, int(world.times[half]))
    state.close()
    scorer = Scorer(world.bundle, address)
    np.testing.assert_allclose(replay(scorer, world, half, 300), world.offline[half:300], rtol=1e-6, atol=near)
    scorer.state.close()
    again = Scorer(world.bundle, address)  # as if the service had been started anew
    np.testing.assert_allclose(replay(again, world, 300, 400), world.offline[300:], rtol=1e-6, atol=near)
    again.state.close()


def test_what_backfill_leaves_is_what_the_service_would_have_left(stepping, tmp_path):
    """A payer's memory to the last bit; and the scores, which payments that are sent again get."""
    live, filled = (Scorer(stepping.bundle, f"sqlite:{tmp_path}/{name}") for name in ("live", "filled"))
    scores = replay(live, stepping, 0, 400, most=1)
    backfill(filled.state, stepping.payments, stepping.labels, stepping.rows, int(stepping.times[-1]) + 1)
    memories = [{k: v[states.COUNT :] for k, v in everything(s).items() if k.startswith(b"=past=")} for s in (live, filled)]
    assert memories[0].keys() == memories[1].keys()
    assert len(memories[0]) == 12
    assert {len(blob) for blob in memories[0].values()} == {stepping.bundle.stepper.size}
    assert memories[0] == memories[1]
    remembered = lambda: {k: v for k, v in everything(filled).items() if not k.startswith(b"=payment=")}  # noqa: E731
    before = remembered()
    np.testing.assert_allclose(scored(filled, stepping.payments[380:].to_dicts()), scores[380:], atol=1e-6)
    assert remembered() == before
    assert scored(filled, stepping.payments[380:].to_dicts()) == pytest.approx(scores[380:], abs=1e-6)


def test_a_payment_sent_again_gets_its_score_and_changes_nothing(stepping, address):  # noqa: F811
    scorer = Scorer(stepping.bundle, address)
    payments = stepping.payments[:60].to_dicts()
    scores = scored(scorer, payments)
    before = everything(scorer)
    assert scored(scorer, payments[10:20]) == scores[10:20]  # though their payers have paid since
    scorer.report([{"payment_id": "id-11", "is_fraud": True, "known_at": payments[-1]["event_time"]}])
    assert scored(scorer, [payments[11]]) == [scores[11]]
    scorer.report([{"payment_id": "id-11", "is_fraud": False, "known_at": payments[-1]["event_time"]}])
    scorer.close()
    scorer = Scorer(stepping.bundle, address)
    assert scored(scorer, [payments[5], payments[59], payments[5]]) == [scores[5], scores[59], scores[5]]
    after = everything(scorer)
    assert {k for k in after if after[k] != before.get(k)} <= {k for k in after if k.startswith(b"payee=")}  # where the report was
    scorer.close()


def test_payments_of_one_payer_in_one_list_are_as_one_after_the_other(stepping):
    at, later = START + timedelta(days=90), START + timedelta(days=91)
    several = [
        stepping.payments.row(0, named=True) | {"payer_id": "p", "payment_id": name, "event_time": time, "amount": amount}
        for name, time, amount in (("a", at, 5.0), ("b", at, 150.0), ("c", later, 20.0), ("d", later, 20.0), ("e", later, 21.0))
    ]
    apart, together, swapped, alone = (Scorer(stepping.bundle, "sqlite::memory:") for _ in range(4))
    one_by_one = [score for p in several for score in scored(apart, [p])]
    assert scored(together, several) == one_by_one
    assert everything(together) == everything(apart)
    a, b = scored(swapped, several[1::-1])
    np.testing.assert_allclose([b, a], one_by_one[:2], atol=1e-6)  # of one instant, they do not see one another
    assert scored(alone, [several[2]])[0] != one_by_one[2]  # what came before is seen
    assert one_by_one[2] == one_by_one[3]


def test_a_list_whose_last_payment_fails_leaves_memories_as_they_were(stepping, address):  # noqa: F811
    scorer = Scorer(stepping.bundle, address)
    payments, stepper = stepping.payments[:30].to_dicts(), scorer.stepper
    scored(scorer, payments[:20])
    before, left = everything(scorer), iter(range(9))

    def step(memory, row, time):
        if next(left, None) is None:
            raise ArithmeticError
        return stepper.step(memory, row, time)

    scorer.stepper = SimpleNamespace(step=step, empty=stepper.empty, size=stepper.size)
    with pytest.raises(ArithmeticError):
        scored(scorer, payments[20:])
    assert next(left, None) is None
    scorer.stepper = SimpleNamespace(step=lambda memory, row, time: (float("nan"), row), empty=stepper.empty, size=stepper.size)
    with pytest.raises(ArithmeticError, match="not a number"):
        scored(scorer, payments[20:21])
    scorer.stepper = stepper
    with pytest.raises(Conflict):
        scored(scorer, [*payments[20:], payments[0] | {"amount": 1.0}])
    assert everything(scorer) == before
    np.testing.assert_allclose(scored(scorer, payments[20:]), stepping.offline[20:30], atol=1e-4)
    scorer.close()


def test_several_services_share_one_state(world, redis):  # noqa: F811
    scorers = [Scorer(world.bundle, redis.address) for _ in range(3)]
    scores = [scored(scorers[i % 3], [p])[0] for i, p in enumerate(world.payments[:120].to_dicts())]
    alone = Scorer(world.bundle, "sqlite::memory:")
    np.testing.assert_allclose(scores, scored(alone, world.payments[:120].to_dicts()), rtol=1e-6)


def everything(scorer: Scorer) -> dict[bytes, bytes]:
    return dict(item for page in scorer.state.store.pages() for item in page)


@pytest.mark.parametrize("fault", [ArithmeticError, KeyboardInterrupt])
def test_a_request_that_fails_is_forgotten_as_a_whole(world, address, fault):  # noqa: F811
    scorer = Scorer(world.bundle, address)
    first, second = world.payments[:5].to_dicts(), world.payments[5:9].to_dicts()
    scored(scorer, first)
    before = everything(scorer)

    def fail(inputs):
        raise fault

    score, scorer.bundle = scorer.bundle, SimpleNamespace(**vars(scorer.bundle) | {"score": fail})
    with pytest.raises(fault):
        scored(scorer, second)
    scorer.bundle = score
    with pytest.raises(Conflict):
        scored(scorer, [*second, first[0] | {"amount": 1.0}])
    label = {"payment_id": "id-0", "is_fraud": True, "known_at": first[0]["event_time"] + timedelta(days=1)}
    with pytest.raises(Conflict, match="known_at is before the payment"):
        scorer.report([label, label | {"payment_id": "id-1", "known_at": START - timedelta(days=1)}])
    assert everything(scorer) == before
    scorer.state.close()


def test_a_report_twice_and_taken_back_is_as_if_it_had_never_been(world, address):  # noqa: F811
    scorer = Scorer(world.bundle, address)
    payments = world.payments[:100].to_dicts()
    scored(scorer, payments)
    late = payments[-1] | {"payment_id": "late", "event_time": payments[-1]["event_time"] + timedelta(days=3)}
    judged = [p for p in payments if p["payee_id"] == late["payee_id"]][-3:]
    labels = [{"payment_id": p["payment_id"], "is_fraud": True, "known_at": payments[-1]["event_time"]} for p in judged]
    assert scorer.report([*labels, *labels, labels[0] | {"payment_id": "unknown"}]) == 6
    once = [scorer.report(labels), scored(scorer, [late])]  # of one instant, the late ones do not see one another
    assert scorer.report([x | {"is_fraud": False} for x in labels]) == 3
    assert scored(scorer, [late | {"payment_id": "later"}]) != once[1]
    assert scorer.report(labels) == 3
    assert scored(scorer, [late | {"payment_id": "latest"}]) == once[1]
    scorer.state.close()


def test_what_is_too_old_to_matter_is_let_go(world, monkeypatch):
    monkeypatch.setattr(states, "LOOKS", 16)
    scorer = Scorer(world.bundle, "sqlite::memory:")
    payments = world.payments.to_dicts()
    for p in payments:
        scored(scorer, [p])
    kept = {key for key in everything(scorer) if key.startswith(b"=payment=")}
    needed = {
        b"=payment=" + p["payment_id"].encode() for p in payments if p["event_time"] >= payments[-1]["event_time"] - timedelta(days=31)
    }
    assert needed <= kept
    assert len(kept) < 1.5 * len(needed) < 400


def test_entities_of_which_nothing_counts_are_let_go(world, monkeypatch):
    monkeypatch.setattr(states, "LOOKS", 16)
    scorer = Scorer(world.bundle, "sqlite::memory:")
    scored(scorer, world.payments[:100].to_dicts())
    prefixes = tuple(scorer.state.engine.prefixes)
    entities = lambda: {key for key in everything(scorer) if key.startswith(prefixes)}  # noqa: E731
    assert len(entities()) > 50
    end = world.payments["event_time"][-1] + timedelta(days=100)
    recent = world.payments.row(0, named=True) | {"payment_id": "r", "payer_id": "recent", "payee_id": "shop", "device": "phone"}
    recent["event_time"] = end - timedelta(days=20)
    scored(scorer, [recent])
    for i in range(120):
        last = recent | {"payment_id": str(i), "payer_id": "last", "payee_id": "bar", "device": "web", "event_time": end}
        scored(scorer, [last])
    kept = {b"payee=shop", b"payer+payee=recent\x1fshop"}  # in windows of 22 and 30 days; not the payer's of 7, the device's of 3
    assert entities() == kept | set(scorer.state.engine.keys(last))
    scorer.close()


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


def test_memories_of_another_model_and_older_states_are_refused(stepping, world, tmp_path):
    address = f"sqlite:{tmp_path}/state"  # noqa: F811
    State(stepping.bundle, address).close()
    with pytest.raises(StoreError, match=r"memories of payers are those of another model, or of other weights\. Delete it and backfill"):
        State(SimpleNamespace(**vars(stepping.bundle) | {"memory": "decoder 2"}), address)
    with pytest.raises(StoreError, match="was made for other features, columns or another length"):
        State(world.bundle, address)
    State(stepping.bundle, address).close()
    old = open_store(f"sqlite:{tmp_path}/old")
    state = State(world.bundle, "sqlite::memory:")
    old.put_many([(b"=state", msgspec.msgpack.encode([state.made.features, state.made.columns, T, True]))])  # as it was before memories
    old.close()
    with pytest.raises(StoreError, match=r"made by another version of fraudlab\. Delete it and backfill"):
        State(world.bundle, f"sqlite:{tmp_path}/old")


def test_of_trees_nothing_is_kept_but_scores_and_other_trees_may_go_on(trees, stepping, world, address):  # noqa: F811
    scorer = Scorer(trees.bundle, address)
    payments = trees.payments[:40].to_dicts()
    scores = scored(scorer, payments[:20])
    np.testing.assert_allclose(scores, trees.offline[:20], atol=1e-6)
    assert not [key for key in everything(scorer) if key.startswith(b"=past=")]
    scorer.close()
    scorer = Scorer(SimpleNamespace(**vars(trees.bundle) | {"memory": "forest 2"}), address)
    assert scored(scorer, payments[:20]) == scores  # sent again
    np.testing.assert_allclose(scored(scorer, payments[20:]), trees.offline[20:40], atol=1e-6)
    scorer.close()
    for other in (stepping, SimpleNamespace(bundle=SimpleNamespace(**vars(world.bundle) | {"history": 0}))):
        with pytest.raises(StoreError, match="are those of another model"):
            State(other.bundle, address)


def test_a_payment_in_another_currency_is_a_conflict_after_a_restart_too(world, address):  # noqa: F811
    scorer = Scorer(world.bundle, address)
    first, second = world.payments[:2].to_dicts()
    scored(scorer, [first])
    scorer.close()
    scorer = Scorer(world.bundle, address)
    before, yen = everything(scorer), first | {"payment_id": "in yen", "currency": "JPY"}
    with pytest.raises(Conflict, match="currency is another one than that of earlier payments") as refused:
        scored(scorer, [second, yen])
    assert refused.value.field == "currency"
    assert everything(scorer) == before
    scored(scorer, [second, yen | {"payee_id": "nobody before"}])  # of the pair the mean is taken, and it is new
    scorer.close()


def test_a_state_that_is_laid_out_in_another_way_is_refused(world, tmp_path, monkeypatch):
    address = f"sqlite:{tmp_path}/state"  # noqa: F811
    scorer = Scorer(world.bundle, address)
    payment = world.payments.row(0, named=True)
    scored(scorer, [payment])
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
    scored(scorer, world.payments[:50].to_dicts())
    if address.startswith("lmdb"):
        scorer.state.close()  # a process opens an LMDB file once
    copy_state(address, f"sqlite:{tmp_path}/to/copy")
    original, copied = (Scorer(world.bundle, a) for a in (address, f"sqlite:{tmp_path}/to/copy"))
    rest = world.payments[50:70].to_dicts()
    assert scored(original, rest) == scored(copied, rest)
    assert everything(original) == everything(copied)
    original.state.close()
    with pytest.raises(StoreError, match="is not empty"):
        copy_state(f"sqlite:{tmp_path}/to/copy", f"sqlite:{tmp_path}/to/copy")
    assert sum(map(len, open_store(f"sqlite:{tmp_path}/to/copy").pages())) == len(everything(copied))


# ---------------------------------------------------------------- a store that is slow or gone


def test_while_the_store_stands_still_payments_are_scored_from_their_own_fields_and_caught_up_later(stepping, redis):  # noqa: F811
    payments = stepping.payments[:40].to_dicts()
    alone = Scorer(stepping.bundle, "sqlite::memory:")
    usual = scored(alone, payments)
    scorer = Scorer(stepping.bundle, redis.address)
    assert scored(scorer, payments[:20]) == usual[:20]
    os.kill(redis.process.pid, signal.SIGSTOP)
    try:
        answers = [scorer.score([p])[0].answer for p in payments[20:30]]
        assert {a.fallback for a in answers} == {"no_state"}
        new = Scorer(stepping.bundle, "sqlite::memory:")
        assert [a.score for a in answers[:1]] == scored(new, payments[20:21])  # as if nobody had paid before
    finally:
        os.kill(redis.process.pid, signal.SIGCONT)
    time.sleep(scorer.breaker.pause)
    scorer.score(payments[30:31])
    scorer.score(payments[31:32])
    assert not scorer.missed
    assert [s.answer for s in scorer.caught_up] == answers
    assert [x.answer for x in scorer.score(payments[20:30])] == answers  # told as they were
    np.testing.assert_allclose(scored(scorer, payments[32:]), usual[32:], atol=1e-6)


def test_a_payers_past_is_let_go_when_it_expires(stepping, monkeypatch):
    monkeypatch.setattr(states, "LOOKS", 16)
    payments = stepping.payments.to_dicts()
    scorer = Scorer(stepping.bundle, State(stepping.bundle, "sqlite::memory:", expiry="20d"))
    scored(scorer, [payments[0] | {"payer_id": "gone"}])
    for p in payments[1:]:
        scored(scorer, [p])
    kept = {key.decode() for key in everything(scorer) if key.startswith(b"=past=")}
    assert kept == {f"=past={p['payer_id']}" for p in payments[-100:]}


def test_a_new_key_for_tokens_loses_nothing(stepping, tmp_path):
    payments = stepping.payments[:60].to_dicts()
    usual = scored(Scorer(stepping.bundle, "sqlite::memory:"), payments)
    keys = ["k1"]
    scorer = Scorer(stepping.bundle, f"sqlite:{tmp_path}/state", tokens=lambda id: [f"{key}.{id}" for key in keys])
    assert scored(scorer, payments[:30]) == usual[:30]
    keys.insert(0, "k2")
    # distinct payers are told apart by their tokens, and count twice while both are in a window
    again = scored(scorer, payments[20:30])
    assert again == usual[20:30]
    for p in payments[30:]:
        assert np.isfinite(scored(scorer, [p])[0])
    names = {key for key in everything(scorer) if key.startswith((b"=past=", b"payer="))}
    old = {p["payer_id"] for p in payments[:30]} - {p["payer_id"] for p in payments[20:]}
    assert {n.split(b".")[1].decode() for n in names if b"k1." in n} <= old
