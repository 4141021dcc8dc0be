"""Plans of packed sequences against their definition: every payment once, with the earlier ones that it shall see."""

import numpy as np
import polars as pl
import pytest

from fraudlab.core.registry import resolve
from fraudlab.features.encoding import Column
from fraudlab.features.sequences import Dataset, inputs, plan
from fraudlab.models.contract import score_all


def dataset(rng: np.random.Generator, n: int, instants: int) -> Dataset:
    times = pl.Series(np.sort(rng.integers(0, instants, n)) * 10**6).cast(pl.Datetime("us"))
    return Dataset(rng.normal(size=(n, 1)), (Column("amount"),), pl.Series(rng.integers(0, 4, n)), times)


@pytest.mark.parametrize("instants", [3, 20, 5000])
@pytest.mark.parametrize("windows", [False, True])
def test_every_payment_is_scored_once_and_has_its_context(instants, windows):
    rng = np.random.default_rng(0)
    for _ in range(40):
        data = dataset(rng, int(rng.integers(1, 120)), instants)
        positions = np.flatnonzero(rng.random(len(data)) < 0.6)
        context = int(rng.integers(0, 12))
        planned = plan(data, positions, context, int(rng.integers(context + 1, 40)), windows)
        np.testing.assert_array_equal(np.sort(data.order[planned.at[planned.scored]]), positions)
        for row, column in np.argwhere(planned.at >= 0):
            at, before = planned.at[row, column], planned.before[row, column]
            tokens = planned.at[row][planned.sequence[row] == planned.sequence[row, column]]
            earlier = tokens[tokens < data.end[at]]
            assert (np.diff(tokens) > 0).all()
            assert (planned.at[row, before] if before >= 0 else -1) == max(earlier, default=-1)
            if planned.scored[row, column]:
                assert set(range(max(data.start[at], data.end[at] - context), data.end[at])) <= set(earlier.tolist())


@pytest.mark.parametrize("name", ["decoder", "recurrent", "gru", "encoder"])
def test_however_many_others_at_its_instant_do_not_move_a_score(name):
    """The last of a hundred at one instant, and the same payment as the only one."""
    rng = np.random.default_rng(1)
    days, numbers = np.r_[np.arange(40), np.full(100, 40)], rng.normal(size=(140, 1))

    def payments(rows: np.ndarray) -> Dataset:
        times = pl.Series(days[rows] * 86_400_000_000).cast(pl.Datetime("us"))
        return Dataset(numbers[rows], (Column("amount"),), pl.Series(["anna"] * len(rows)), times)

    alone, among = payments(np.r_[:40, 139]), payments(np.arange(140))
    model = resolve("model", name)(alone.columns, width=8, pieces=4)
    weights = model.init(inputs(alone, few := plan(alone, np.arange(41), 15, 64), np.arange(len(few))), 0)
    weights = {key: np.asarray(value) for key, value in weights.items()} | {"judge.bias": np.zeros((), np.float32)}
    expected = score_all(model, weights, alone, np.array([40]))
    np.testing.assert_allclose(score_all(model, weights, among, np.array([139])), expected, atol=1e-6)
    np.testing.assert_allclose(score_all(model, weights, among, np.arange(140))[-1:], expected, atol=1e-6)
