"""Going on from given weights: what is frozen stays, what is thin is added, and nothing that was given is used up."""

import jax
import numpy as np
import pytest

from fraudlab.core.registry import resolve
from fraudlab.models.contract import example
from fraudlab.training.adaptation import merge, split
from fraudlab.training.loop import fit
from fraudlab.training.recipe import Recipe

DATA, FRAUD = example(400)
MODEL = resolve("model", "decoder")(DATA.columns, width=8, layers=1, heads=1, key_heads=1, window=4, pieces=4)
BETWEEN_TOKENS = {
    f"blocks.0.{layer}.kernel"
    for layer in ("attention.query", "attention.key", "attention.value", "attention.out", "gated.gate", "gated.up", "gated.down")
}


def trained(**options) -> dict:
    start = options.pop("start", None)
    objective = resolve("objective", options.pop("objective", "fraud"))()
    labels = options.pop("labels", FRAUD)
    return fit(MODEL, DATA, np.arange(400), labels, objective, Recipe(epochs=2, tokens=256, **options), start=start, progress=False)


@pytest.fixture(scope="module")
def before():
    return trained(objective="next_payment", labels=None)


def test_a_network_learns_to_tell_payments_without_labels(before):
    first = trained(objective="next_payment", labels=None, learning_rate=1e-12)
    assert not np.array_equal(before["blocks.0.gated.up.kernel"], first["blocks.0.gated.up.kernel"])
    with pytest.raises(ValueError, match="None of the 400 payments to train on has a label"):
        trained(labels=None)


def test_thin_products_are_added_to_their_matrices(before):
    weights, fixed = split(before, "lora", 2, 0)
    rng = np.random.default_rng(0)
    weights = {k: rng.normal(size=np.shape(v)).astype(np.float32) for k, v in weights.items()}
    merged = merge(weights | fixed)
    assert merged.keys() == before.keys()
    assert {k.removeprefix("lora.").removesuffix(".a") for k in weights if k.endswith(".a")} == BETWEEN_TOKENS
    for key in BETWEEN_TOKENS:
        a, b = (np.asarray(weights[f"lora.{key}.{part}"]) for part in "ab")
        assert (a.shape[1], b.shape[0]) == (2, 2)
        np.testing.assert_allclose(merged[key], before[key] + a @ b, atol=1e-5)


@pytest.mark.parametrize(("adapt", "moved"), [("frozen", set()), ("lora", BETWEEN_TOKENS)])
def test_what_is_not_adapted_stays_as_it_was(before, adapt, moved):
    after = trained(adapt=adapt, start=before)
    differing = {key for key in before if not np.array_equal(before[key], after[key])}
    assert differing == moved | {"judge.kernel", "judge.bias"}


@pytest.mark.parametrize("adapt", ["frozen", "lora"])
def test_there_is_nothing_to_adapt_in_a_network_that_was_not_trained(adapt):
    with pytest.raises(ValueError, match=f"adapt = '{adapt}' changes a network that was trained before"):
        trained(adapt=adapt)


def test_weights_to_start_from_can_be_used_again(before):
    on_device = {key: jax.numpy.asarray(value) for key, value in before.items()}
    once, again = (trained(start=on_device) for _ in range(2))
    for key, value in before.items():
        np.testing.assert_array_equal(on_device[key], value)
        np.testing.assert_array_equal(once[key], again[key])


def test_rounded_products_change_the_weights_a_little(before):
    """Steps of AdamW have the sign of a gradient: a few numbers go the other way, most go the same."""
    exact, rounded = (trained(start=before, precision=precision) for precision in ("float32", "bfloat16"))
    moves = [after["blocks.0.gated.up.kernel"] - before["blocks.0.gated.up.kernel"] for after in (exact, rounded)]
    assert 1e-5 < np.abs(moves[0] - moves[1]).mean() / np.abs(moves[0]).mean() < 0.3
    with pytest.raises(ValueError, match="'float16' is no precision"):
        Recipe(precision="float16")
