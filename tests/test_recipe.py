"""Recipes: a batch in parts, less memory, every optimizer, weights of half the size; and what they leave as it was."""

import jax
import numpy as np
import pytest

from fraudlab.models.contract import example, weights_hash
from fraudlab.models.zoo.decoder import Decoder
from fraudlab.training.loop import POLICIES, aims, batch, batch_at, begin, fit, planned_for, slope
from fraudlab.training.objectives.fraud import Fraud
from fraudlab.training.objectives.mixture import Mixture
from fraudlab.training.recipe import Recipe, schedule

PAYMENTS = 600
DATA, FRAUD = example(PAYMENTS)
LABELS = np.where(np.arange(PAYMENTS) % 3 > 0, FRAUD, False)
MODEL = Decoder(DATA.columns, width=16, layers=2, heads=2, key_heads=1, window=6, pieces=4)
SMALL = {"epochs": 3, "tokens": 256, "room": 32, "checkpoint_every": 4, "log_every": 4}


def one_batch(recipe: Recipe, objective):
    """Weights, and a batch in which rows have unequal numbers of known labels."""
    planned = planned_for(MODEL, DATA, np.arange(PAYMENTS), objective, recipe)
    weights, fixed = begin(MODEL, DATA, planned, objective, recipe, 0, None)
    rows, counts = batch_at(0, len(planned), recipe.rows, 0)
    known = np.random.default_rng(0).random(PAYMENTS) < np.linspace(0, 1, PAYMENTS)
    return weights, fixed, batch(DATA, planned, rows, counts, aims(DATA, planned, FRAUD, known))


def gradient_of(recipe: Recipe, objective, weights, fixed, given):
    loss_of = lambda weights, *batch: objective.loss(MODEL, {**weights, **fixed}, *batch)  # noqa: E731
    return jax.jit(lambda weights: slope(loss_of, weights, given, jax.random.key(0), recipe))(weights)


@pytest.mark.parametrize(
    "options", [{"accumulate": 2}, {"accumulate": 8}, {"recompute": "cheap"}, {"recompute": "blocks", "accumulate": 4}]
)
@pytest.mark.parametrize("objective", [Fraud(positive_weight=3.0), Mixture({"fraud": 1.0, "next_payment": 0.3})], ids=["fraud", "mixture"])
def test_parts_and_what_is_computed_anew_do_not_change_the_gradient(objective, options):
    weights, fixed, given = one_batch(Recipe(**SMALL), objective)
    loss, gradient = gradient_of(Recipe(**SMALL), objective, weights, fixed, given)
    same_loss, same_gradient = gradient_of(Recipe(**SMALL, **options), objective, weights, fixed, given)
    np.testing.assert_allclose(same_loss, loss, rtol=1e-5)
    for key, value in gradient.items():
        np.testing.assert_allclose(same_gradient[key], value, atol=2e-5 * max(1, float(np.abs(value).max())))


def test_a_part_counts_for_as_much_as_it_has_to_learn_from():
    """The mean of the parts' means would be another number."""
    objective = Fraud()
    weights, fixed, (given, targets) = one_batch(Recipe(**SMALL), objective)
    halves = [jax.tree.map(lambda x, i=i: x[i::2], (given, targets)) for i in range(2)]
    parts = [objective.loss(MODEL, {**weights, **fixed}, *half, jax.random.key(0)) for half in halves]
    assert parts[0].count != parts[1].count
    whole, _ = gradient_of(Recipe(**SMALL), objective, weights, fixed, (given, targets))
    assert abs(float(parts[0].mean + parts[1].mean) / 2 - float(whole)) > 1e-5


def kept_bytes(recompute: str) -> int:
    """What the forward pass leaves for the backward pass, before a compiler looks at it."""
    objective, recipe = Fraud(), Recipe(**SMALL, recompute=recompute)
    weights, fixed, given = one_batch(recipe, objective)
    loss_of = lambda weights: objective.loss(MODEL, {**weights, **fixed}, *given, jax.random.key(0)).mean  # noqa: E731
    if recompute != "nothing":
        loss_of = jax.checkpoint(loss_of, policy=POLICIES[recompute])
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(lambda w: jax.vjp(loss_of, w)[1], weights)))


def test_less_is_kept_the_more_is_computed_anew():
    assert kept_bytes("blocks") < 0.5 * kept_bytes("cheap") < 0.5 * kept_bytes("nothing")


WAYS = [
    {"optimizer": "muon"},
    {"optimizer": "schedule_free", "schedule": "constant"},
    {"schedule": "stable", "average": 0.9},
    {"storage": "bfloat16", "optimizer": "muon"},
    {"precision": "bfloat16"},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
def test_every_way_learns_and_goes_on_where_it_was_stopped(way, tmp_path):
    recipe, curve = Recipe(**{**SMALL, "epochs": 15, "learning_rate": 0.01}, **way), {}
    alone = fit(MODEL, DATA, np.arange(PAYMENTS), LABELS, Fraud(), recipe, log=curve.__setitem__, progress=False)
    losses = [figures["loss"] for figures in curve.values()]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    assert {value.dtype for key, value in alone.items() if not key.startswith("fixed.")} == {np.dtype(np.float32)}

    def stop(step, figures):
        if step >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(MODEL, DATA, np.arange(PAYMENTS), LABELS, Fraud(), recipe, checkpoints=tmp_path, log=stop, progress=False)
    resumed = {}
    weights = fit(MODEL, DATA, np.arange(PAYMENTS), LABELS, Fraud(), recipe, checkpoints=tmp_path, log=resumed.__setitem__, progress=False)
    assert min(resumed) > 4
    assert weights_hash(weights) == weights_hash(alone)


def test_a_moving_average_and_weights_of_half_the_size_are_near_the_plain_ones():
    plain, averaged, half = (
        fit(MODEL, DATA, np.arange(PAYMENTS), LABELS, Fraud(), Recipe(**SMALL, **way), progress=False)
        for way in ({}, {"average": 0.5}, {"storage": "bfloat16"})
    )
    for other in (averaged, half):
        differences = [np.abs(other[key] - value).max() for key, value in plain.items() if not key.startswith("fixed.")]
        assert 0 < max(differences) < 0.1


@pytest.mark.parametrize("steps", [1, 7, 100])
def test_schedules_stay_between_nothing_and_the_highest(steps):
    for name in ("cosine", "stable", "constant", "rising"):
        rates = [float(schedule(Recipe(schedule=name), steps)(i)) for i in range(steps)]
        assert 0 <= min(rates) <= max(rates) <= 3e-3 * 1.0001, name
    stable = [float(schedule(Recipe(schedule="stable"), 100)(i)) for i in range(100)]
    assert stable[10] == stable[79] > stable[90] > stable[99]
