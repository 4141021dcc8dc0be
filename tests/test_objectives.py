"""Every registered objective: what it learns from, what it must not see, and what it leaves behind."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import polars as pl
import pytest

from fraudlab.core.registry import discover, resolve
from fraudlab.features.encoding import Column
from fraudlab.features.sequences import Dataset, inputs, plan
from fraudlab.models.contract import example
from fraudlab.training import heads
from fraudlab.training.loop import aims, batch, train
from fraudlab.training.objectives.contrastive import Contrastive, halves
from fraudlab.training.objectives.masked import Masked
from fraudlab.training.objectives.mixture import Mixture
from fraudlab.training.objectives.next_payment import NextPayment, next_place
from fraudlab.training.recipe import Recipe

DATA, FRAUD = example(800)
UNKNOWN = pl.Series([None] * len(DATA), dtype=pl.Boolean)
TINY = {"width": 8, "layers": 1, "heads": 1, "key_heads": 1, "pieces": 4}
PLANNED = plan(DATA, np.arange(len(DATA)), 30, 64)
OPTIONS = {"mixture": {"parts": {"fraud": 1.0, "masked": 0.1}}, "contrastive": {"least": 4}}


def model_for(name: str):
    """A small model that the objective can train."""
    return resolve("model", "seq2seq" if name == "denoising" else "decoder")(DATA.columns, **TINY)


@cache
def first_weights(model) -> dict:
    return model.init(a_batch()[0], 0)


def a_batch(scored: bool = True, known: bool = True) -> tuple:
    """The last four rows of the plan, which have fillers at their ends."""
    rows = np.arange(len(PLANNED))[-4:]
    given, targets = batch(DATA, PLANNED, rows, np.ones(4, bool), aims(DATA, PLANNED, FRAUD, np.full(len(DATA), known)))
    return given, targets._replace(scored=targets.scored & scored, known=targets.known & scored)


@pytest.fixture(scope="module", params=sorted(discover("objective")))
def case(request):
    name = request.param
    objective = discover("objective")[name](**OPTIONS.get(name, {}))
    model = model_for(name)
    weights = {**first_weights(model), **objective.init(model, 0)}
    return name, objective, model, weights, jax.jit(jax.value_and_grad(lambda weights, *given: objective(model, weights, *given)))


def test_the_objectives_are_found():
    assert {"fraud", "masked", "next_payment", "contrastive", "mixture"} <= set(discover("objective"))


def test_it_has_a_loss_and_gradients_that_are_numbers(case):
    _, objective, _, weights, value = case
    loss, gradient = value(weights, *a_batch(), jax.random.key(0))
    assert loss.shape == ()
    assert 0 < loss < 5
    assert all(np.isfinite(g).all() for g in gradient.values())
    assert any((np.asarray(g) != 0).any() for key, g in gradient.items() if not key.startswith("fixed."))
    assert hash(objective) == hash(replace(objective))


def test_its_own_layers_are_heads(case):
    _, objective, model, *_ = case
    assert all(key.startswith("head.") for key in objective.init(model, 0))


def test_nothing_is_learned_from_payments_that_do_not_count(case):
    *_, weights, value = case
    loss, gradient = value(weights, *a_batch(scored=False), jax.random.key(0))
    assert loss == 0
    assert all((np.asarray(g) == 0).all() for g in gradient.values())


def test_what_fillers_hold_moves_no_loss(case):
    *_, weights, value = case
    given, targets = a_batch()
    none = given.sequence == 0
    assert none.any()
    noisy = given._replace(rows=np.where(none[..., None], np.float32(77), given.rows), gap=np.where(none, np.float32(77), given.gap))
    one, other = (value(weights, these, targets, jax.random.key(0))[0] for these in (given, noisy))
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_labels_are_read_where_they_are_known_and_by_objectives_of_fraud_only(case):
    name, *_, weights, value = case
    for known in (False, True):
        given, targets = a_batch(known=known)
        losses = [value(weights, given, t, jax.random.key(0))[0] for t in (targets, targets._replace(labels=1 - targets.labels))]
        assert (losses[0] != losses[1]) == (known and name in ("fraud", "mixture")), known


def world(seed: int) -> Dataset:
    """Payers with 1 to 30 payments, many of them at one instant."""
    rng = np.random.default_rng(seed)
    payer = np.repeat(np.arange(12), rng.integers(1, 31, 12))
    time = pl.Series(rng.integers(0, 20, len(payer)) * 3_600_000_000).cast(pl.Datetime("us"))
    return Dataset(np.arange(len(payer), dtype=np.float32)[:, None], (Column("amount"),), pl.Series(payer), time)


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_next_payment_is_the_first_of_the_next_later_instant(seed, windows):
    data = world(seed)
    planned = plan(data, np.arange(len(data)), 6, 16, windows)
    given = inputs(data, planned, np.arange(len(planned)))
    place, exists = (np.asarray(a) for a in next_place(given))
    for b, row in enumerate(given.sequence):
        for i, sequence in enumerate(row):
            later = [j for j in range(i + 1, 16) if sequence and row[j] == sequence and given.time[b, j] > given.time[b, i]]
            assert exists[b, i] == bool(later)
            assert not later or place[b, i] == later[0]


def test_a_later_payment_moves_only_the_loss_of_those_whose_next_it_is():
    objective, model = NextPayment(), model_for("next_payment")
    given, _ = a_batch()
    weights = {**first_weights(model), **objective.init(model, 0)}
    weights["head.next_payment.kernel"] = np.random.default_rng(0).normal(size=weights["head.next_payment.kernel"].shape).astype(np.float32)
    later = given._replace(rows=given.rows.copy())
    later.rows[:, 30, 0] = np.where(given.rows[:, 30, 0] > 20, 0, 500)
    losses = jax.jit(lambda weights, these: objective.losses(model, weights, these))
    moved = np.abs(losses(weights, given) - losses(weights, later)).max(-1) > 1e-6
    place, exists = (np.asarray(a) for a in next_place(given))
    tells = exists & (place == 30)
    assert tells.any()
    np.testing.assert_array_equal(moved[:, :30], tells[:, :30])


def test_a_column_is_told_by_cross_entropy_in_shares_of_a_guess():
    """Against plain loops; a text, and ids of which there are too many, are not told."""
    columns = (
        Column("amount", "amount"),
        Column("words", "text", size=50, width=3),
        Column("who", "entity", size=65_536),
        Column("country", "categorical", ("FR",)),
        Column("when", "calendar"),
    )
    model = resolve("model", "decoder")(columns, **TINY)
    assert heads.sizes(model) == (4, 0, 0, 3, 168, 4)
    rng = np.random.default_rng(0)
    weights = {key: rng.normal(size=w.shape).astype(np.float32) for key, w in heads.new_head(model, "x").items()}
    hidden = rng.normal(size=(2, 3, 8)).astype(np.float32)
    truth = np.stack([rng.integers(0, n, (2, 3)) for n in (4, 3, 168, 4)], -1).astype(np.int32)
    losses = heads.column_losses(model, weights, "x", hidden, truth)
    logits = hidden.astype(np.float64) @ weights["head.x.kernel"] + weights["head.x.bias"]
    for k, (first, n) in enumerate(((0, 4), (4, 3), (7, 168), (175, 4))):
        own = np.exp(logits[..., first : first + n])
        p = np.take_along_axis(own / own.sum(-1, keepdims=True), truth[..., k, None], -1)[..., 0]
        np.testing.assert_allclose(losses[..., k], -np.log(p) / np.log(n), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", [Masked(0.3, 0.0, 0.0), Masked(0.0, 0.3, 0.0), Masked(0.0, 0.0, 0.3)])
def test_what_is_masked_is_hidden_by_value_by_payment_or_by_field(objective):
    given, _ = a_batch()
    hide = np.asarray(objective.hidden(model_for("masked"), given, jax.random.key(1)))
    assert hide.shape == (4, 64, 4)
    assert 0.1 < hide.mean() < 0.5
    assert (hide == hide[..., :1]).all() == (objective.payments > 0)
    assert (hide == hide[:, :1]).all() == (objective.fields > 0)


def test_the_masked_loss_is_the_mean_over_what_was_hidden_and_counts():
    objective, model, key = Masked(), model_for("masked"), jax.random.key(3)
    given, targets = a_batch()
    targets = targets._replace(scored=targets.scored & (np.arange(64) % 3 == 0))
    weights = {**first_weights(model), **objective.init(model, 0)}
    weights["head.masked.kernel"] = np.random.default_rng(0).normal(size=weights["head.masked.kernel"].shape).astype(np.float32)
    hide = objective.hidden(model, given, key)
    both = jax.jit(lambda weights, *of: (objective(model, weights, *of, key), objective.losses(model, weights, of[0], hide)))
    loss, losses = both(weights, given, targets)
    counts = np.asarray(hide) & targets.scored[..., None]
    np.testing.assert_allclose(loss, np.asarray(losses, np.float64)[counts].mean(), rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_halves_are_long_enough_and_do_not_see_one_another(seed):
    data = world(seed)
    planned = plan(data, np.arange(len(data)), 30, 32)
    given = inputs(data, planned, np.arange(len(planned)))
    cut, half = (jax.tree.map(np.asarray, a) for a in halves(given, planned.at >= 0, 4, jax.random.key(seed)))
    for b in range(len(planned)):
        for s in range(1, given.sequence[b].max() + 1):
            at = np.flatnonzero(given.sequence[b] == s)
            pieces = [half[b, at] == h for h in sorted(set(half[b, at].tolist()))]
            assert len(pieces) == (2 if len(at) >= 8 else 1)
            assert len(pieces) == 2 or (half[b, at] == -1).all()
            for piece in pieces:
                assert len(pieces) == 1 or piece.sum() >= 4
                assert len(set(cut.sequence[b, at[piece]].tolist())) == 1
                for i in at[piece]:
                    mine = [j for j in at[piece] if given.time[b, j] < given.time[b, i]]
                    assert cut.before[b, i] == (mine[-1] if mine else -1)
        ids = [set(cut.sequence[b, half[b] == h].tolist()) for h in range(half[b].max() + 1)]
        assert len(set.union(set(), *ids)) == len(ids)  # each half has a sequence of its own


def test_the_contrastive_loss_is_that_of_finding_the_other_half():
    objective, model, key = Contrastive(least=4), model_for("contrastive"), jax.random.key(2)
    given, targets = a_batch()
    weights = first_weights(model)
    cut, half = halves(given, np.ones((4, 64), bool), 4, key)
    both = jax.jit(lambda weights, *of: (objective(model, weights, *of, key), model.hidden(weights, cut)))
    loss, hidden = both(weights, given, targets)
    hidden, half = np.asarray(hidden, np.float64), np.asarray(half)
    embedded = np.array([hidden[b][half[b] == h].mean(0) for b in range(4) for h in range(half[b].max() + 1)])
    embedded /= np.linalg.norm(embedded, axis=1, keepdims=True)
    losses = []
    for i, one in enumerate(embedded):
        others = {j: np.exp(one @ other / 0.1) for j, other in enumerate(embedded) if j != i}
        losses.append(-np.log(others[i ^ 1] / sum(others.values())))
    np.testing.assert_allclose(loss, np.mean(losses) / np.log(len(embedded) - 1), rtol=1e-3)


def test_an_equal_mixture_is_found_again_and_another_is_not():
    parts = {"fraud": 1.0, "next_payment": 0.1}
    assert Mixture(parts) == Mixture(dict(parts))
    assert hash(Mixture(parts)) == hash(Mixture(dict(parts)))
    assert Mixture(parts) != Mixture(parts, {"fraud": {"focal": 1.0}})
    assert Mixture(parts).whole is False  # labelled payments need their windows
    assert Mixture({"masked": 1.0, "contrastive": 1.0}).whole is True


@pytest.mark.parametrize("name", ["encoder", "seq2seq"])
def test_models_that_read_both_ways_are_not_shown_what_they_are_to_tell(name):
    model = resolve("model", name)(DATA.columns)
    with pytest.raises(ValueError, match="'masked'"):
        NextPayment().init(model, 0)


def test_what_is_learned_without_labels_depends_on_no_later_payment_and_no_label():
    """Payments outside of the positions that are given to a pre-training move no bit of its weights."""
    early = np.flatnonzero(DATA.times < np.quantile(DATA.times, 0.6))
    changed = Dataset(np.where(np.isin(np.arange(len(DATA)), early)[:, None], DATA.rows, 999), DATA.columns, *payers_and_times())
    recipe = Recipe(epochs=1, tokens=256, room=64)
    learned = [
        train(model_for("next_payment"), data, early, UNKNOWN, NextPayment(), recipe, 0, None, None, None, False)
        for data in (DATA, changed)
    ]
    for key, value in learned[0].items():
        np.testing.assert_array_equal(value, learned[1][key], err_msg=key)


def payers_and_times() -> tuple[pl.Series, pl.Series]:
    payer = np.empty(len(DATA), int)
    payer[DATA.order] = DATA.start
    return pl.Series(payer), pl.Series(DATA.times).cast(pl.Datetime("us"))
