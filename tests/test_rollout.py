"""Champion, challenger, canary and kill switch, with real scorers, states and an audit log."""

import errno
import os
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_bundle import ANSWERS

from fraudlab.core.runs import text_hash
from fraudlab.features.definitions import FeatureSet, Window
from fraudlab.features.encoding import Column, Encoding
from fraudlab.governance.audit_log import AuditError, AuditLog, read
from fraudlab.governance.signing import create_key
from fraudlab.serving import rollout as rollouts
from fraudlab.serving.rollout import Caller, Plan, Rollout, Tally, broken_guardrail, in_canary, read_plan
from fraudlab.serving.scorer import Scorer
from fraudlab.serving.state import Conflict

START = datetime(2026, 1, 1, tzinfo=UTC)
COUNT = FeatureSet((Window("count", "payer", "count", "7d"),))
MEAN = FeatureSet((Window("mean", "payer", "mean", "7d"),))


class Line:
    """A stepper whose score is `start` and a hundredth of the second number of a row; without memory, or counting in it."""

    def __init__(self, start, size=0):
        self.start, self.size, self.numbers = start, size, 2

    def empty(self):
        return np.zeros(self.size, np.uint8)

    def step(self, memory, row, time):
        seen = 0
        if self.size:
            seen, memory[0] = int(memory[0]), memory[0] + 1
        return self.start + 0.01 * float(row[1]) + 0.001 * seen, np.zeros(0)


def bundle(name, start, features=COUNT, size=0):
    columns = Encoding((Column("amount"), Column(features.names[0]))).to_dict()
    about = {"features": features.to_dict(), "columns": columns, "history": size, "stepper": Line(start, size), "memory": name}
    return SimpleNamespace(**ANSWERS | about | {"name": name, "version": name})


@pytest.fixture
def bundles():
    return {
        "a": bundle("a", 0.01),
        "b": bundle("b", 0.02),
        "mean": bundle("mean", 0.03, MEAN),
        "deep": bundle("deep", 0.04, size=8),
        "suspicious": bundle("suspicious", 0.45),
    }


@pytest.fixture
def service(bundles, tmp_path):
    """A function that opens a rollout as a worker does; `stores` is where states are."""

    def scorer(name, rollout):
        if name not in bundles:
            raise ValueError(f"There is no bundle {name}.")
        of = bundles[name]
        made = text_hash(repr((of.features, of.columns, of.stepper.size and name)))[:8]
        return Scorer(of, rollout.state(of, f"sqlite:{tmp_path}/{made}"))

    def opened(plan):
        rollout = Rollout(scorer, tmp_path / "plan.json", AuditLog(tmp_path / "audit", keys.private))
        rollout.begin(rollout.prepare(plan))
        rollout.write()
        return rollout

    keys = create_key(tmp_path / "keys", ed25519=True)
    return opened


def pay(i, payer="anna", amount=30.0, **changes):
    at = START + timedelta(minutes=i)
    p = {"payment_id": f"{payer}-{i}", "event_time": at, "payer_id": payer, "payee_id": "shop", "amount": amount, "currency": "EUR"}
    return p | changes


def told(rollout, *payments, **options):
    return rollout.score(list(payments), Caller("r", "somebody"), **{"explain": False} | options)


def drained(rollout):
    while rollout.shadow_one():
        pass


def logged(tmp_path, kind):
    return [r for r in read(tmp_path / "audit") if r["kind"] == kind]


def test_bundles_that_share_a_state_are_swapped_without_forgetting(service):
    rollout = service(Plan("a"))
    assert [a.score for i in range(3) for a in told(rollout, pay(i))] == pytest.approx([0.01, 0.02, 0.03])
    rollout.begin(rollout.prepare(Plan("b")))
    assert told(rollout, pay(3))[0].score == pytest.approx(0.05)
    assert len(rollout.states) == 1
    rollout.close()


def test_a_bundle_that_is_refused_changes_nothing(service):
    rollout = service(Plan("a"))
    told(rollout, pay(0))
    for plan, why in (
        (Plan("none"), "There is no bundle"),
        (Plan("b", challenger="none"), "There is no bundle"),
        (Plan("mean"), "has seen no payment"),
        (Plan("deep"), "has seen no payment"),
    ):
        with pytest.raises(ValueError, match=why):
            rollout.prepare(plan)
    assert told(rollout, pay(1))[0].bundle == "a"
    assert len(rollout.states) == 1
    rollout.begin(rollout.prepare(Plan("mean", cold=True)))
    assert told(rollout, pay(2))[0].score == pytest.approx(0.03)
    rollout.close()


@pytest.mark.parametrize("other", ["b", "mean", "deep"])
def test_the_shadow_sees_the_same_payments_and_changes_no_answer(service, tmp_path, other):
    alone = service(Plan("a"))
    usual = [a.score for i in range(5) for a in told(alone, pay(i, "eve"))]
    alone.close()
    rollout = service(Plan("a", challenger=other))
    answers = [a for i in range(5) for a in told(rollout, pay(i))]
    assert [a.score for a in answers] == usual
    drained(rollout)
    rollout._flush()
    found = logged(tmp_path, "shadow")
    assert [r["payment"]["payment_id"] for r in found] == [f"anna-{i}" for i in range(5)]
    expected = {
        "b": [0.02 + 0.01 * i for i in range(5)],
        "mean": [0.03 + 0.3 * (i > 0) for i in range(5)],
        "deep": [0.04 + 0.011 * i for i in range(5)],
    }
    assert [r["answer"]["score"] for r in found] == pytest.approx(expected[other])
    rollout.begin(rollout.prepare(Plan(other, challenger="a")))  # whose state is warm
    last = 0.33 if other == "mean" else expected[other][-1] + (0.011 if other == "deep" else 0.01)
    assert told(rollout, pay(5))[0].score == pytest.approx(last)
    rollout.close()


def test_a_challenger_that_fails_in_the_shadow_does_not_disturb(service, bundles, caplog):
    rollout = service(Plan("a", challenger="b"))
    bundles["b"].stepper.step = lambda *_: 1 / 0
    assert told(rollout, pay(0))[0].bundle == "a"
    drained(rollout)
    assert "Scoring in the shadow failed: ZeroDivisionError" in caplog.text
    rollout.close()


def test_too_many_payments_for_the_shadow_are_dropped_and_counted(service, monkeypatch):
    monkeypatch.setattr(rollouts, "SHADOWS", 3)
    rollout = service(Plan("a", challenger="b"))
    for i in range(10):
        told(rollout, pay(i))
    assert (len(rollout.shadows), rollout.dropped) == (3, 7)
    rollout.close()


def test_the_canary_is_a_share_of_payers_and_each_stays_where_it_is(service):
    rollout = service(Plan("a", challenger="b", canary=0.3))
    where = {}
    for i in range(3):
        for n in range(300):
            answer = told(rollout, pay(i, f"p{n}"))[0]
            assert where.setdefault(n, answer.bundle) == answer.bundle
            assert answer.score == pytest.approx((0.01 if answer.bundle == "a" else 0.02) + 0.01 * i)
            assert (answer.bundle == "b") == in_canary(f"p{n}", "b", 0.3)
    assert 60 < list(where.values()).count("b") < 120
    rollout.close()


def test_a_canary_that_fails_is_rolled_back_and_its_payment_answered_by_the_champion(service, bundles, tmp_path, caplog):
    rollout = service(Plan("a", challenger="b", canary=1.0))
    assert told(rollout, pay(0))[0].bundle == "b"
    bundles["b"].stepper.step = lambda *_: 1 / 0
    assert told(rollout, pay(1))[0].bundle == "a"
    assert (rollout.now.plan.canary, rollout.now.plan.challenger) == (0, "b")
    assert read_plan(tmp_path / "plan.json") == rollout.now.plan
    assert "rolled back: the challenger failed: ZeroDivisionError" in rollout.now.plan.why
    assert logged(tmp_path, "plan")[-1]["about"]["canary"] == 0
    rollout.close()


def test_a_canary_that_stops_many_more_payments_is_rolled_back(service):
    rollout = service(Plan("a", challenger="suspicious", canary=0.5))
    answered = 0
    while rollout.now.plan.canary and answered < 2000:
        told(rollout, pay(0, f"p{answered}"))
        answered += 1
    assert 2 * rollouts.LEAST <= answered < 3 * rollouts.LEAST
    assert "stops 100.00% of payments" in rollout.now.plan.why
    rollout.close()


def test_guardrails_let_chance_pass():
    rng, stopped = np.random.default_rng(0), 0
    for _ in range(50):
        one, two = Tally(), Tally()
        for _ in range(1000):
            for t in (one, two):
                t.answers, t.stopped = t.answers + 1, t.stopped + (rng.random() < 0.02)
            stopped += bool(broken_guardrail(one, two))
    assert not stopped


def test_a_conflict_is_no_fault_of_the_challenger(service):
    rollout = service(Plan("a", challenger="b", canary=1.0))
    told(rollout, pay(0))
    with pytest.raises(Conflict):
        told(rollout, pay(0, amount=31.0))
    assert rollout.now.plan.canary == 1
    rollout.close()


def test_the_kill_switch_asks_no_model_and_memories_go_on(service, bundles):
    rollout = service(Plan("deep"))
    told(rollout, pay(0))
    rollout.begin(rollout.prepare(Plan("deep", killed=True)))
    step, bundles["deep"].stepper.step = bundles["deep"].stepper.step, lambda *_: 1 / 0
    answers = told(rollout, pay(1), pay(2, amount=900.0))
    assert [(a.score, a.probability, a.decision, a.fallback) for a in answers] == [
        (None, None, "approve", "kill_switch"),
        (None, None, "challenge", "kill_switch"),
    ]
    bundles["deep"].stepper.step = step
    drained(rollout)
    rollout.begin(rollout.prepare(Plan("deep")))
    assert told(rollout, pay(3))[0].score == pytest.approx(0.04 + 0.011 * 3)
    rollout.close()


def test_what_cannot_be_logged_is_not_answered(service, tmp_path, monkeypatch):
    rollout = service(Plan("a"))
    told(rollout, pay(0))
    write, full = os.write, True

    def no_room(file, data):
        if full and b'"kind"' in bytes(data):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data)

    monkeypatch.setattr(os, "write", no_room)
    for _ in range(3):
        with pytest.raises(AuditError):
            told(rollout, pay(1))
    with pytest.raises(AuditError):
        told(rollout, pay(2))
    assert rollout.trouble() == "the audit log cannot be written"
    full = False
    assert not rollout.trouble()
    assert told(rollout, pay(1))[0].score == pytest.approx(0.02)  # as it was scored when it could not be told
    assert told(rollout, pay(2))[0].score == pytest.approx(0.03)
    rollout.close()
    kinds = [(r["kind"], r["payment"]["payment_id"]) for r in read(tmp_path / "audit") if "payment" in r]
    assert kinds == [("answer", "anna-0"), ("answer", "anna-1"), ("repeat", "anna-1"), ("answer", "anna-2")]


def test_workers_follow_the_plan_in_the_file_and_a_new_one_begins_with_it(service):
    one, two = service(Plan("a")), service(Plan("a"))
    assert two.changed() is None
    one.begin(one.prepare(Plan("b", why="better")))
    one.write()
    plan = two.changed()
    assert plan == Plan("b", why="better")
    two.begin(two.prepare(plan))
    assert told(two, pay(0))[0].bundle == "b"
    assert two.changed() is None
    one.close()
    two.close()


def test_labels_reach_every_state(service, tmp_path):
    rollout = service(Plan("a", challenger="mean"))
    told(rollout, pay(0))
    drained(rollout)
    label = {"payment_id": "anna-0", "is_fraud": True, "known_at": START + timedelta(days=1)}
    assert rollout.report([label, label | {"payment_id": "unknown"}], Caller("r", "somebody")) == 1
    assert logged(tmp_path, "labels")[0]["about"]["noted"] == 1
    rollout.close()


def test_a_plan_says_what_is_wrong_with_it():
    with pytest.raises(ValueError, match="there is no challenger"):
        Plan("a", canary=0.5)


def test_what_the_kill_switch_answered_stays_answered(service, tmp_path):
    rollout = service(Plan("deep", killed=True))
    (ruled,) = told(rollout, pay(0, amount=900.0))
    drained(rollout)
    rollout.begin(rollout.prepare(Plan("deep")))
    assert told(rollout, pay(0, amount=900.0)) == [ruled]
    assert [r["kind"] for r in read(tmp_path / "audit") if "answer" in r] == ["answer", "missed", "repeat"]
    rollout.close()
