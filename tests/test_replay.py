"""Answers of the scorer, made again from the audit log: for models with steps, with a history, and with neither."""

import base64
import zlib
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import jax
import msgspec
import numpy as np
import pytest
from tiny_bundle import COLUMNS, FEATURES, FIELDS, Linear, tiny_weights
from typer.testing import CliRunner

from fraudlab.features.encoding import Encoding
from fraudlab.features.sequences import Inputs
from fraudlab.governance.audit_log import AuditLog, read
from fraudlab.governance.signing import create_key
from fraudlab.models.contract import Model
from fraudlab.models.zoo.gru import Gru
from fraudlab.monitoring.replay import find, records_before, replay
from fraudlab.serving.bundle import load, tokens_of, write
from fraudlab.serving.rollout import ANCHOR, Caller, Plan, Rollout, record
from fraudlab.serving.scorer import NO_STATE, Scorer
from fraudlab.serving.state import COUNT, memory_name

START = datetime(2026, 1, 1, tzinfo=UTC)
PARTS = {"features": FEATURES.to_dict(), "fields": FIELDS, "lineage": {}, "evaluation": {}, "buckets": (1, 8)}


@dataclass(frozen=True)
class Now(Model):
    """A logistic model of the payment alone."""

    columns: tuple = COLUMNS
    history: int = 0

    def score(self, weights, inputs):
        return jax.nn.sigmoid(inputs.rows @ weights["now"] + weights["bias"])


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Real bundles: with steps, with a history, with neither."""
    folder = tmp_path_factory.mktemp("bundles")
    keys, gru = create_key(folder / "keys"), Gru(COLUMNS, width=8, layers=1)
    one = tokens_of(np.zeros(2, np.int64), np.zeros((2, sum(c.width for c in COLUMNS)), np.float32), 2)
    weights = {k: np.asarray(w) for k, w in gru.init(Inputs(*(x[None] for x in one)), 0).items()} | {"judge.bias": np.zeros((), np.float32)}
    models = {"steps": (gru, weights), "history": (Linear(), tiny_weights()), "now": (Now(), tiny_weights())}
    paths = {name: write(folder / name, *model, private_key=keys.private, **PARTS) for name, model in models.items()}
    return {name: load(path, keys.public) for name, path in paths.items()}, keys


def payment(i: int, payer: str = "anna", minutes: float | None = None, **changes) -> dict:
    fields = {"channel": ("web", "shop", None)[i % 3], "distance": float(i), "note": None, "opened": None, "abroad": None}
    at = START + timedelta(minutes=i if minutes is None else minutes)
    core = {"payment_id": f"p{i}", "event_time": at, "payer_id": payer, "payee_id": f"shop{i % 4}", "amount": 10.0 + i, "currency": "EUR"}
    return core | fields | changes


class Service:
    """A scorer whose answers are logged, at times that a test may choose."""

    def __init__(self, bundle, folder, state="sqlite::memory:"):
        self.scorer, self.count = Scorer(bundle, state, tokens=lambda id: [f"t-{id}"]), 0
        self.log = AuditLog(folder, create_key(folder.parent / f"key-{np.random.default_rng().integers(1 << 62)}", ed25519=True).private)

    def records(self, payments: list[dict], kind: str = "answer") -> list[dict]:
        self.count += 1
        made = [record(kind, s, Caller(f"r{self.count}")) for s in self.scorer.score(payments)]
        return [msgspec.to_builtins(msgspec.structs.replace(r, at=10**15 + self.count * 10**7)) for r in made]

    def answer(self, *payments: dict, kind: str = "answer"):
        for r in self.records(list(payments), kind):
            self.log.append(r)


def served(bundle, folder, n: int = 24) -> Service:
    """Payments of three payers, some at one instant, some late."""
    service = Service(bundle, folder)
    minutes = np.repeat(np.arange(n // 2), 2) * 7.0
    minutes[5::6] -= 20
    for i in range(n):
        service.answer(payment(i, ("anna", "ben", "cleo")[i % 3], minutes[i]))
    return service


@pytest.mark.parametrize("name", ["steps", "history", "now"])
def test_every_answer_is_the_same_again(bundles, tmp_path, name):
    bundle = bundles[0][name]
    served(bundle, tmp_path / "log").log.close()
    again = [replay(tmp_path / "log", bundle, f"p{i}") for i in range(24)]
    assert all(r.exact and r.equal for r in again)
    assert len({r.score for r in again}) > 20
    assert max(r.earlier for r in again) == (0 if name == "now" else 7)
    assert replay(tmp_path / "log", bundle, "r3")._replace(request_id="") == again[2]._replace(request_id="")


@pytest.mark.parametrize("name", ["steps", "history"])
def test_payments_of_one_request_are_replayed_one_by_one(bundles, tmp_path, name):
    bundle = bundles[0][name]
    service = Service(bundle, tmp_path / "log")
    service.answer(*(payment(i) for i in range(6)))
    service.log.close()
    assert all(replay(tmp_path / "log", bundle, f"p{i}").equal for i in range(6))
    with pytest.raises(ValueError, match=r"request of several payments.*p0, p1"):
        replay(tmp_path / "log", bundle, "r1")


@pytest.mark.parametrize("name", ["steps", "history"])
def test_a_memory_that_was_there_before_the_log_is_its_anchor(bundles, tmp_path, name):
    bundle = bundles[0][name]
    state = f"sqlite:{tmp_path / 'state'}"
    first = Service(bundle, tmp_path / "first", state)
    for i in range(5):
        first.answer(payment(i))
    first.log.close()
    first.scorer.close()
    service = Service(bundle, tmp_path / "second", state)
    service.count = 10
    (with_anchor,) = service.records([payment(5)])
    blob = service.scorer.state.store.get_many([k for page in service.scorer.state.store.pages(b"=past=") for k, _ in page])[0][COUNT:]
    service.log.append(with_anchor)
    (record,) = service.records([payment(6)])
    anchored = record | {"anchor": base64.b64encode(zlib.compress(blob)).decode()}  # at n = 6, with no record before it in this folder
    service.log.append(anchored)
    service.answer(payment(7))
    service.log.close()
    with pytest.raises(ValueError, match="n = 4 is not in"):
        replay(tmp_path / "second", bundle, "p5")
    for one, earlier in (("p6", 0), ("p7", 1)):
        again = replay(tmp_path / "second", bundle, one)
        assert again.exact
        assert again.earlier == earlier
    (tmp_path / "both").mkdir()
    for name in ("first", "second"):
        (tmp_path / name).rename(tmp_path / "both" / name)
    assert replay(tmp_path / "both", bundle, "p5").exact  # of several folders


def test_a_payment_sent_again_is_answered_by_its_first_record(bundles, tmp_path):
    bundle = bundles[0]["steps"]
    service = served(bundle, tmp_path / "log")
    service.answer(payment(20, "cleo", 70.0), kind="repeat")
    service.log.close()
    again = replay(tmp_path / "log", bundle, f"r{service.count}")
    assert again.exact
    assert (again.payment_id, again.request_id) == ("p20", "r21")
    repeat = [r for r in read(tmp_path / "log", having="p20") if "row" not in r]
    with AuditLog(tmp_path / "only", create_key(tmp_path / "k", ed25519=True).private) as log:
        for r in repeat:
            log.append(r)
    with pytest.raises(ValueError, match="was sent again"):
        replay(tmp_path / "only", bundle, "p20")


def test_without_a_state_the_memory_is_empty_and_what_came_later_is_found(bundles, tmp_path):
    bundle = bundles[0]["steps"]
    service = Service(bundle, tmp_path / "log")
    service.answer(payment(0))
    service.scorer.breaker.trip()
    service.scorer.breaker.until += 1000
    service.answer(payment(1))
    service.scorer.breaker.until = 0
    service.scorer.missed.clear()
    (late,) = service.records([payment(1)], kind="missed")  # as the service logs it once the store is back
    late["answer"]["fallback"] = NO_STATE
    service.log.append(late)
    service.answer(payment(2))
    service.log.close()
    alone, after = (replay(tmp_path / "log", bundle, one) for one in ("p1", "p2"))
    assert alone.exact
    assert (alone.earlier, alone.logged["fallback"]) == (0, NO_STATE)
    assert after.exact
    assert after.earlier == 2


def test_anchors_bound_what_is_read_and_what_a_gap_spoils(bundles, tmp_path):
    bundle = bundles[0]["steps"]
    service = Service(bundle, tmp_path / "log")
    for i in range(ANCHOR + 6):
        for r in service.records([payment(i)]):
            if i != 3:
                service.log.append(r)
    service.log.close()
    for i in (ANCHOR, ANCHOR + 5):
        again = replay(tmp_path / "log", bundle, f"p{i}")
        assert again.exact
        assert again.earlier == i - ANCHOR
    with pytest.raises(ValueError, match="n = 3 is not in"):
        replay(tmp_path / "log", bundle, f"p{ANCHOR - 1}")


def test_what_a_rollout_answers_is_replayed(bundles, tmp_path):
    """A challenger in the shadow takes over, the model is switched off, its memory goes on, and it is switched on again."""
    made = {name: bundles[0][name] for name in ("steps", "history")}

    def opened(name, rollout):
        return Scorer(made[name], rollout.state(made[name], f"sqlite:{tmp_path / name}"), tokens=lambda id: [f"t-{id}"])

    rollout = Rollout(opened, tmp_path / "plan", AuditLog(tmp_path / "log", create_key(tmp_path / "k", ed25519=True).private))
    plans = [Plan("history", challenger="steps"), Plan("steps", challenger="history"), Plan("steps", killed=True), Plan("steps")]
    answers = []
    for k, plan in enumerate(plans):
        rollout.begin(rollout.prepare(plan))
        for i in range(4 * k, 4 * k + 4):
            answers += rollout.score([payment(i, amount=100.0 * i)], Caller(f"r{i}"), explain=False)
            while rollout.shadow_one():
                pass
    rollout.close()
    answered_by = [next(b for b in made.values() if b.version == a.bundle) for a in answers]
    again = [replay(tmp_path / "log", bundle, f"p{i}") for i, bundle in enumerate(answered_by)]
    assert all(r.exact for r in again)
    assert [r.earlier for r in again] == [*range(8), 0, 0, 0, 0, *range(12, 16)]
    assert [r.score is None for r in again] == [i // 4 == 2 for i in range(16)]
    assert len({r.decision for r in again}) > 1


def test_bundles_with_one_memory_share_it_and_others_do_not(bundles, tmp_path):
    one = bundles[0]["steps"]
    other = replace(one, card=one.card | {"version": "with another policy"})
    names = [memory_name(b) for b in (one, other, bundles[0]["history"])]
    assert names[0] == names[1] != names[2]
    state = f"sqlite:{tmp_path / 'state'}"
    for k, bundle in enumerate((one, other)):
        service = Service(bundle, tmp_path / "log", state)
        service.count = 10 * k
        for i in range(3):
            service.answer(payment(3 * k + i))
        service.log.close()
        service.scorer.close()
    shadow = Service(bundles[0]["history"], tmp_path / "log")  # the same payer in another memory
    shadow.count = 5
    for i in range(5):
        shadow.answer(payment(20 + i), kind="shadow")
    shadow.log.close()
    again = replay(tmp_path / "log", other, "p5")
    assert again.exact
    assert again.earlier == 5
    with pytest.raises(ValueError, match=f"answered by bundle {one.version}"):
        replay(tmp_path / "log", other, "p0")


@pytest.mark.parametrize("name", ["steps", "history"])
def test_under_a_new_key_for_tokens_the_log_begins_with_an_anchor(bundles, tmp_path, name):
    bundle = bundles[0][name]
    service = Service(bundle, tmp_path / "log")
    for i in range(6):
        if i == 3:
            service.scorer.tokens = lambda id: [f"new-{id}", f"t-{id}"]
        service.answer(payment(i))
    service.log.close()
    again = [replay(tmp_path / "log", bundle, f"p{i}") for i in range(6)]
    assert all(r.exact for r in again)
    assert [r.earlier for r in again] == [0, 1, 2, 0, 1, 2]


def test_a_state_that_began_anew_has_its_own_run(bundles, tmp_path):
    bundle = bundles[0]["steps"]
    for k in range(2):
        service = Service(bundle, tmp_path / "log")
        service.count = 10 * k
        for i in range(4):
            service.answer(payment(4 * k + i))
        service.log.close()
    for i in range(8):
        again = replay(tmp_path / "log", bundle, f"p{i}")
        assert again.exact
        assert again.earlier == i % 4
        assert [r["payment"]["payment_id"] for r in records_before(tmp_path / "log", bundle, find(tmp_path / "log", f"p{i}"))] == [
            f"p{j}" for j in range(i // 4 * 4, i + 1)
        ]


def test_a_clock_set_back_changes_nothing(bundles, tmp_path):
    bundle = bundles[0]["steps"]
    service = Service(bundle, tmp_path / "log")
    for i, count in enumerate((10, 11, 2, 3, 4)):
        service.count = count
        service.answer(payment(i))
    service.log.close()
    again = [replay(tmp_path / "log", bundle, f"p{i}") for i in range(5)]
    assert all(r.exact for r in again)
    assert [r.earlier for r in again] == [0, 1, 2, 3, 4]


def test_changed_and_missing_records_are_told(bundles, tmp_path):
    bundle = bundles[0]["steps"]
    service = Service(bundle, tmp_path / "log")
    for i in range(6):
        service.answer(payment(i))
    service.log.close()
    whole = list(read(tmp_path / "log"))

    def rewritten(folder, change):
        with AuditLog(tmp_path / folder, create_key(tmp_path / f"{folder} key", ed25519=True).private) as log:
            for i, r in enumerate(whole):
                if changed := change(i, r):
                    log.append(changed)
        return tmp_path / folder

    gap = rewritten("gap", lambda i, r: r if i != 2 else None)
    assert replay(gap, bundle, "p1").exact
    for one in ("p3", "p5"):
        with pytest.raises(ValueError, match="n = 2 is not in"):
            replay(gap, bundle, one)
    row = base64.b64encode(np.full(len(Encoding.from_dict(bundle.columns).columns), 3, np.float32)).decode()
    other = rewritten("row", lambda i, r: r | {"row": row} if i == 2 else r)
    assert not replay(other, bundle, "p2").equal
    assert not replay(other, bundle, "p5").exact
    decision = rewritten("decision", lambda i, r: r | {"answer": r["answer"] | {"decision": "approve"}} if i == 5 else r)
    assert not replay(decision, bundle, "p5").equal
    score = rewritten("score", lambda i, r: r | {"answer": r["answer"] | {"score": r["answer"]["score"] + 2e-6}} if i == 5 else r)
    assert not replay(score, bundle, "p5").equal
    near = rewritten("near", lambda i, r: r | {"answer": r["answer"] | {"score": r["answer"]["score"] + 5e-7}} if i == 5 else r)
    assert replay(near, bundle, "p5").equal
    assert not replay(near, bundle, "p5").exact
    with pytest.raises(ValueError, match="No answer to 'p9'"):
        replay(gap, bundle, "p9")
    with pytest.raises(FileNotFoundError):
        replay(tmp_path / "nowhere", bundle, "p1")


def test_command(bundles, tmp_path):
    from fraudlab.cli import app

    made, keys = bundles
    served(made["steps"], tmp_path / "log").log.close()

    def ask(one: str, name: str):
        where = ["--log", str(tmp_path / "log"), "--bundle", str(made[name].folder), "--public-key", str(keys.public)]
        return CliRunner().invoke(app, ["replay", one, *where])

    told = ask("p11", "steps")
    assert told.exit_code == 0
    assert "bit for bit" in told.output
    other = ask("p11", "history")
    assert other.exit_code == 1
    assert "was answered by bundle" in other.output
