"""Contributions are Shapley values by their literal definition, add up to the score's log-odds, and hold no value of the payment."""

import json
import re
from functools import cache
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_bundle import COLUMNS, tiny_bundle, tiny_weights

from fraudlab.core.registry import resolve
from fraudlab.evaluation.calibration import log_odds
from fraudlab.features.encoding import Column, Encoding
from fraudlab.features.sequences import Dataset, inputs, plan
from fraudlab.features.sets.handbook import handbook_strict
from fraudlab.governance import reason_texts
from fraudlab.governance.reason_texts import DEFAULT, HISTORY, MOST, Text, Texts, code_of, groups, ordinary
from fraudlab.models.contract import to_dict
from fraudlab.models.steps import make_stepper
from fraudlab.serving.bundle import load, tokens_of
from fraudlab.serving.reasons import Reasons, coalitions, shapley

ROOT = Path(__file__).parents[1]
SETS = sorted(p.stem for p in (ROOT / "fraudlab/features/sets").glob("[!_]*.py"))
STEPS = {
    "decoder": {"width": 16, "heads": 2, "key_heads": 1, "window": 4},
    "recurrent": {"width": 16, "layers": 2},
    "gru": {"width": 8, "layers": 1},
}
WIDE = (
    Column("amount", "amount", fill=50.0),
    Column("event_time", "calendar"),
    *(Column(name) for name in handbook_strict.names),
    Column("channel", "categorical", ("web", "shop")),
    Column("note", "text", size=30, width=3),
)
F = sum(c.width for c in WIDE)


def literal(values: dict[frozenset, float], players: int) -> list[float]:
    """The mean over all orders of what each adds when it comes."""
    orders, found = list(permutations(range(players))), np.zeros(players)
    for order in orders:
        for n, player in enumerate(order):
            found[player] += values[frozenset(order[: n + 1])] - values[frozenset(order[:n])]
    return (found / len(orders)).tolist()


@given(st.integers(1, 5), st.integers(0, 10**6))
def test_values_are_the_mean_over_all_orders(players, seed):
    value = np.random.default_rng(seed).normal(size=2**players)
    by_set = {frozenset(np.flatnonzero(who).tolist()): v for who, v in zip(coalitions(players), value, strict=True)}
    np.testing.assert_allclose(shapley(players) @ value, literal(by_set, players), atol=1e-12)


@pytest.mark.parametrize("players", range(MOST + 1))
def test_the_axioms(players):
    value, matrix, inside = np.random.default_rng(1).normal(size=2**players), shapley(players), coalitions(players)
    assert matrix.shape == (players, 2**players)
    assert (matrix @ value).sum() == pytest.approx(value[-1] - value[0])
    for player in range(players):
        useless = value[(np.arange(2**players) & ~(1 << player))]
        assert (matrix @ useless)[player] == pytest.approx(0, abs=1e-12)
        only = inside[:, player].astype(float)
        np.testing.assert_allclose(matrix @ only, np.eye(players)[player], atol=1e-12)


def rows_of(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    numbers = rng.lognormal(3, 1, (n, 1 + len(handbook_strict.names)))
    ids = [rng.integers(0, 4, (n, 1)), rng.integers(0, 31, (n, 3))]
    rows = np.concatenate([numbers[:, :1], rng.uniform(0, 168, (n, 1)), numbers[:, 1:], *ids], axis=1).astype(np.float32)
    place = dict(zip([c.name for c in WIDE], range(len(WIDE)), strict=True))
    rows[:, [place["weekend"], place["night"], place["payee_risk_1d"], place["payee_risk_7d"]]] = rng.integers(0, 2, (n, 4))
    return rows


@cache
def explained(name: str) -> Reasons:
    """Of an untrained network, whose scores are made to lie around a half."""
    rows, times = rows_of(60, 0), np.sort(np.random.default_rng(0).integers(10**9, 10**9 + 10**6, 60)) * 1_000_000
    data = Dataset(rows, WIDE, pl.Series([1] * 60), pl.Series(times).cast(pl.Datetime("us", "UTC")))
    model = resolve("model", name)(WIDE, **STEPS[name])
    weights = model.init(inputs(data, plan(data, np.arange(60), 30, 64), np.arange(1)), seed=0)
    weights = {k: np.asarray(w) for k, w in weights.items()} | {"judge.bias": np.zeros((), np.float32)}
    weights["judge.kernel"] = weights["judge.kernel"] * 3
    stepper = make_stepper(name, to_dict(model)["options"], WIDE, weights)
    return Reasons(bundle(stepper=stepper, history=model.history))


def bundle(columns=WIDE, features=handbook_strict, texts=DEFAULT, **more) -> SimpleNamespace:
    card = {"columns": Encoding(columns).to_dict(), "features": features.to_dict(), "reasons": reason_texts.to_dict(texts), "history": 0}
    return SimpleNamespace(**card | {"stepper": None} | more)


def paid(reasons: Reasons, seed: int, n: int) -> tuple[np.ndarray, np.ndarray, int]:
    """A payer's memory after `n` payments; its next payment's row and time."""
    rows, times = rows_of(n + 1, seed), np.cumsum(np.random.default_rng(seed).integers(0, 10**12, n + 1))
    memory = reasons.bundle.stepper.empty()
    for row, time in zip(rows[:n], times[:n].tolist(), strict=True):
        reasons.bundle.stepper.step(memory, row, time)
    return memory, rows[n], int(times[n])


@pytest.mark.parametrize("name", STEPS)
def test_all_adds_up_to_the_score_of_the_step(name):
    reasons = explained(name)
    moved = set()
    for seed in range(12):
        memory, row, time = paid(reasons, seed, n=seed)
        before = memory.copy()
        found = reasons.explain(row, memory, time=time)
        assert (memory == before).all(), "the payer's memory is not changed"
        score = reasons.bundle.stepper.step(memory, row, time)[0]
        assert found.log_odds == pytest.approx(log_odds(score), abs=1e-4)
        assert list(found.contributions) == list(DEFAULT.codes), "all groups are there, for the record"
        assert (found.contributions[HISTORY] == 0) == (seed == 0)
        moved |= {code for code, value in found.contributions.items() if abs(value) > 1e-3}
        base = reasons.bundle.stepper.step(reasons.bundle.stepper.empty(), reasons.reference, time)[0]
        assert found.base == pytest.approx(log_odds(base), abs=1e-4)
    assert moved == set(DEFAULT.codes)


@pytest.mark.parametrize("name", STEPS)
def test_a_models_contributions_are_the_literal_ones(name):
    """Three groups that differ from the ordinary payment, and the memory: each coalition stepped by itself."""
    reasons = explained(name)
    memory, row, time = paid(reasons, 5, n=6)
    codes, step = ["amount", "payee_risk", "details", HISTORY], reasons.bundle.stepper.step
    keep = np.any([mask for code, mask in zip(reasons.own, reasons.masks, strict=True) if code in codes], axis=0)
    row = np.where(keep, row, reasons.reference)

    def value(known: frozenset) -> float:
        there = [mask for code, mask in zip(reasons.own, reasons.masks, strict=True) if code in {codes[i] for i in known}]
        seen = np.where(np.any([*there, np.zeros(F, bool)], axis=0), row, reasons.reference)
        return log_odds(step((memory if 3 in known else reasons.bundle.stepper.empty()).copy(), seen, time)[0])

    sets = {frozenset(np.flatnonzero(who).tolist()) for who in coalitions(4)}
    expected = literal({s: value(s) for s in sets}, 4)
    found = reasons.explain(row, memory, time=time)
    np.testing.assert_allclose([found.contributions[code] for code in codes], expected, atol=1e-5)
    assert all(value == 0 for code, value in found.contributions.items() if code not in codes), "what is ordinary adds nothing"


def test_a_regressions_contributions_are_weight_times_distance():
    w = np.random.default_rng(0).normal(0, 0.05, F)

    def score(given):
        return (1 / (1 + np.exp(-(given.rows[:, -1] @ w - 1)))).astype(np.float32)

    reasons = Reasons(bundle(score=score))
    for row in rows_of(20, 3) / 8:
        found = reasons.explain(row)
        expected = {code: ((row - reasons.reference) * w)[mask].sum() for code, mask in zip(reasons.own, reasons.masks, strict=True)}
        if abs(found.log_odds) < 5:  # a score as float32 says little more of those
            assert found.contributions == pytest.approx(expected, abs=1e-3)
    assert HISTORY not in found.contributions


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder, keys = tiny_bundle(tmp_path_factory.mktemp("lab"))
    return load(folder, keys.public)


def past_of(n: int, seed: int) -> np.ndarray:
    rng, past = np.random.default_rng(seed), np.zeros(n, [("time", "i8"), ("row", "f4", len(COLUMNS))])
    past["time"], past["row"] = np.sort(rng.integers(10**9, 10**9 + 5, n)) * 1_000_000, rng.normal(0, 20, (n, len(COLUMNS)))
    return past


@pytest.mark.parametrize("n", [0, 1, 3, 9])
def test_a_program_is_explained_with_the_past_that_it_is_shown(served, n):
    reasons, past, time = Reasons(served), past_of(n, n), (10**9 + 9) * 1_000_000
    row = np.random.default_rng(n).normal(20, 20, len(COLUMNS)).astype(np.float32)
    found = reasons.explain(row, past=past, time=time)
    shown = tokens_of(np.append(past["time"], time), np.concatenate([past["row"], row[None]]), served.history + 1)
    assert found.log_odds == pytest.approx(log_odds(float(served.score(type(shown)(*(x[None] for x in shown)))[0])), abs=1e-4)
    weights = tiny_weights()
    earlier = (past["row"][-served.history :] @ weights["earlier"]).sum()
    assert found.contributions[HISTORY] == pytest.approx(earlier, abs=1e-3)
    alone = reasons.explain(row, past=None, time=time)
    assert alone.contributions[HISTORY] == 0
    assert found.contributions["amount"] == pytest.approx(float((row[0] - 50) * weights["now"][0]), abs=1e-3)


def test_reasons_are_what_speaks_most_for_fraud_in_reviewed_words():
    reasons, words = explained("gru"), {code: t.text for code, t in DEFAULT.codes.items()}
    for seed in range(20):
        memory, row, time = paid(reasons, seed, n=5)
        found = reasons.explain(row, memory, time=time)
        first = sorted((v for v in found.contributions.values() if v >= reasons.least), reverse=True)[:3]
        assert [r["contribution"] for r in found.reasons] == [round(v, 4) for v in first]
        for r in found.reasons:
            assert r.keys() == {"code", "text", "contribution"}
            assert r["text"] == words[r["code"]]
        json.dumps([found.base, found.contributions, found.reasons])
    assert not any(re.search(r"\d", text) for text in words.values())


def test_an_ordinary_payment_has_no_reason():
    reasons = explained("decoder")
    found = reasons.explain(reasons.reference.copy(), reasons.bundle.stepper.empty(), time=10**15)
    assert found.reasons == []
    assert set(found.contributions.values()) == {0.0}
    assert found.log_odds == found.base


def test_no_score_is_no_explanation():
    reasons = Reasons(bundle(score=lambda given: np.full(len(given.rows), np.nan, np.float32)))
    with pytest.raises(ArithmeticError, match="not a number"):
        reasons.explain(rows_of(1, 0)[0])


@pytest.mark.parametrize("name", SETS)
def test_every_feature_has_a_reason(name):
    features = resolve("features", name)
    columns = (Column("amount"), Column("event_time", "calendar"), Column("payer_id", "entity", size=9), *map(Column, features.names))
    found = groups(DEFAULT, columns, features.to_dict(), history=True)
    assert (sum(of.astype(int) for of in found.values()) == 1).all(), "each number belongs to one group"
    assert len(found) <= MOST


@pytest.mark.parametrize(
    ("feature", "code"),
    [
        ({"kind": "Row", "take": "log_amount"}, "amount"),
        ({"kind": "Row", "take": "night"}, "timing"),
        ({"kind": "Window", "entity": "payer", "take": "count"}, "timing"),
        ({"kind": "Window", "entity": "payer+payee", "take": "mean"}, "payer_habit"),
        ({"kind": "Since", "entity": "payer", "take": "last"}, "timing"),
        ({"kind": "Since", "entity": "payer", "take": "same"}, "payer_habit"),
        ({"kind": "Velocity", "entity": "payer", "take": "velocity"}, "timing"),
        ({"kind": "Risk", "entity": "payer", "take": "rate"}, "payer_habit"),
        ({"kind": "Risk", "entity": "payee", "take": "frauds"}, "payee_risk"),
        ({"kind": "Risk", "entity": "device", "take": "rate"}, "details"),
        ({"kind": "Encoded", "of": "payee", "take": "fraud_rate"}, "payee_risk"),
        ({"kind": "Encoded", "of": "payee", "take": "frequency"}, "payee_history"),
        ({"kind": "Encoded", "of": "country", "take": "fraud_rate"}, "details"),
        ({"kind": "Decay", "entity": "payee+currency", "take": "sum"}, "payee_history"),
    ],
)
def test_the_group_follows_from_the_definition(feature, code):
    assert code_of("x", feature) == code


def text(**changes) -> Text:
    return Text(**{"text": "A sentence that is fixed.", "reviewed_by": "payments risk", "version": 1} | changes)


def test_columns_can_be_divided_otherwise():
    texts = Texts("", DEFAULT.codes | {"night": text(columns=("night", "weekend"))})
    columns = tuple(c for c in WIDE if c.name not in ("channel", "note"))
    found = groups(texts, columns, handbook_strict.to_dict(), history=True)
    assert [c.name for c, mine in zip(columns, found["night"], strict=True) if mine] == ["weekend", "night"]
    assert not (found["night"] & found["timing"]).any()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (Texts("", {"amount": text(), HISTORY: text()}), "There is no reason 'timing' for column 'event_time'"),
        (Texts("", {k: v for k, v in DEFAULT.codes.items() if k != HISTORY}), "There is no reason 'history' for the model's memory"),
        (Texts("", DEFAULT.codes | {"amount": text(columns=("nigth",))}), "Did you mean 'night'"),
        (Texts("", DEFAULT.codes | {c: text(columns=("night",)) for c in ("amount", "details")}), "leave it in one"),
        (Texts("", DEFAULT.codes | {"night": text(columns=("night",))}), "8 reasons"),
        (Texts("", DEFAULT.codes | {HISTORY: text(columns=("night",))}), "no column of this model"),
        (Texts("", DEFAULT.codes, (1.0, 2.0)), f"2 numbers, and a row {F}"),
    ],
)
def test_texts_that_do_not_fit_are_refused(texts, message):
    with pytest.raises(ValueError, match=message):
        groups(texts, WIDE, handbook_strict.to_dict(), history=True)


@pytest.mark.parametrize(
    "wrong", [{"text": "The amount is {amount}."}, {"text": "No stop at the end"}, {"text": "Hm."}, {"reviewed_by": " "}, {"version": 0}]
)
def test_a_text_is_one_fixed_sentence_that_somebody_has_read(wrong):
    with pytest.raises(ValueError, match="text"):
        text(**wrong)
    plain = reason_texts.to_dict(DEFAULT)
    plain["codes"]["amount"] |= wrong
    with pytest.raises(ValueError, match="text"):
        reason_texts.from_dict(plain)


def test_the_ordinary_payment_is_the_median_one():
    rows = rows_of(101, 0)
    rows[:60, -4] = 3
    found = np.array(ordinary(WIDE, rows))
    np.testing.assert_array_equal(found[:-4], np.median(rows, axis=0)[:-4].astype(np.float32))
    assert found[-4:].tolist() == [3, 0, 0, 0], "the most frequent category; no words"
    fitted = ordinary(WIDE)
    assert fitted[:2] == (50, 84)
    assert fitted[-4:] == (2, 0, 0, 0)


def test_a_bundle_keeps_the_texts_and_the_ordinary_payment(tmp_path):
    rows = np.abs(np.random.default_rng(0).normal(30, 5, (50, len(COLUMNS)))).astype(np.float32)
    rows[:, -1] = 3
    texts = Texts("mine", DEFAULT.codes, ordinary(COLUMNS, rows))
    folder, keys = tiny_bundle(tmp_path, reasons=texts)
    reasons = Reasons(load(folder, keys.public))
    np.testing.assert_array_equal(reasons.reference, np.float32(texts.reference))
    with pytest.raises(ValueError, match="1 numbers, and a row"):
        tiny_bundle(tmp_path / "other", reasons=Texts("", DEFAULT.codes, (1.0,)))
