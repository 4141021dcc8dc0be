"""Our decoder in PyTorch: the same scores, the same training steps."""

import sys
from importlib.util import find_spec

import jax
import numpy as np
import polars as pl
import pytest

from fraudlab.evaluation import peers
from fraudlab.features.encoding import Column
from fraudlab.features.sequences import Dataset, Inputs, inputs, plan
from fraudlab.models.zoo.decoder import Decoder
from fraudlab.training.objective import Targets
from fraudlab.training.recipe import Recipe

needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="PyTorch is not installed (extra bench)")

COLUMNS = (
    Column("amount", "amount"),
    Column("event_time", "calendar"),
    Column("score"),
    Column("opened", "age"),
    Column("country", "categorical", ("FR", "DE", "IT")),
    Column("merchant", "hashed", size=50),
    Column("descriptor", "text", size=30, width=5),
)


def packed(columns: tuple[Column, ...] = COLUMNS) -> Inputs:
    """Packed rows of random payments, some at equal instants, the last row with fillers."""
    rng, n = np.random.default_rng(0), 400
    of_kind = {
        "amount": lambda: rng.gamma(2.0, 30.0, n),
        "calendar": lambda: rng.uniform(0, 168, n),
        "numeric": lambda: rng.normal(size=n),
        "age": lambda: rng.normal(0, 300, n),
        "categorical": lambda: rng.integers(0, 5, n),
        "hashed": lambda: rng.integers(0, 51, n),
        "text": lambda: rng.integers(0, 31, (n, 5)) * (rng.random((n, 5)) < 0.5),
    }
    rows = np.column_stack([of_kind[c.kind]() for c in columns])
    times = pl.Series(np.sort(rng.integers(0, 3000, n)) * 60_000_000).cast(pl.Datetime("us"))
    data = Dataset(rows, columns, pl.Series(rng.integers(0, 20, n)), times)
    planned = plan(data, np.arange(n), 0, 48)
    return inputs(data, planned, np.arange(len(planned)))


@needs_torch
@pytest.mark.parametrize(("columns", "key_heads"), [(COLUMNS, 1), (COLUMNS, 4), (COLUMNS[:1], 2), (COLUMNS[4:], 2)])
def test_the_same_weights_give_the_same_scores(columns, key_heads):
    import torch

    some = packed(columns)
    model = Decoder(columns, width=32, layers=2, heads=4, key_heads=key_heads, window=7)
    weights = model.init(some, 1)
    with torch.no_grad():
        theirs = peers.torch_decoder(model, weights)(*map(torch.from_numpy, some)).sigmoid().numpy()
    ours = np.asarray(jax.jit(model.score)(weights, some))
    assert ours[some.sequence > 0].std() > 1e-3
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


@needs_torch
def test_every_trained_weight_goes_over_but_that_of_hidden_columns():
    some = packed()
    model = Decoder(COLUMNS, width=32)
    weights = model.init(some, 0)
    trained = {k: np.size(w) for k, w in weights.items() if not k.startswith("fixed.") and k != "embed.hidden"}
    assert sum(p.numel() for p in peers.torch_decoder(model, weights).parameters()) == sum(trained.values())


@needs_torch
def test_waves_are_refused():
    model = Decoder(COLUMNS, numbers="periodic")
    with pytest.raises(ValueError, match="numbers = 'periodic'"):
        peers.torch_decoder(model, {})


@needs_torch
@pytest.mark.parametrize("mixed", [False, True])
def test_training_steps_lose_the_same(mixed):
    some = packed()
    rng = np.random.default_rng(1)
    labels = (rng.random(some.gap.shape) < 0.3).astype(np.float32)
    scored = some.sequence > 0
    targets = Targets(labels, scored & (rng.random(labels.shape) < 0.8), scored)
    model = Decoder(COLUMNS, width=32, heads=4, key_heads=2, window=7)
    task = peers.Task(model, model.init(some, 0), [(some, targets)], Recipe(learning_rate=3e-3), 20)
    ours, theirs = peers.our_step(task), peers.torch_step(task, mixed=mixed)
    losses = np.array([(ours(some, targets), theirs(some, targets)) for _ in range(8)])
    assert losses[-1, 0] < 0.8 * losses[0, 0]
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], atol=1e-2 if mixed else 1e-4)


def test_without_torch_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModuleNotFoundError, match=r"fraudlab\[bench\]"):
        peers.torch_decoder(Decoder(COLUMNS), {})
