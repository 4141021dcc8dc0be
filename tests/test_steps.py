"""A step on a payer's state gives the score of the whole sequence, for each model that has steps."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import jax
import numpy as np
import polars as pl
import pytest

from fraudlab.core.registry import resolve
from fraudlab.features.encoding import Column
from fraudlab.features.sequences import Dataset, inputs, plan
from fraudlab.models import embeddings, steps
from fraudlab.models.contract import score_all, to_dict

COLUMNS = (
    Column("amount", "amount"),
    Column("event_time", "calendar"),
    Column("opened", "age"),
    Column("rate"),
    Column("same"),
    Column("country", "categorical", tuple("abcdefgh")),
    Column("shop", "hashed", size=300),
    Column("payer_id", "entity", size=50),
    Column("descriptor", "text", size=200, width=5),
    Column("posted", "calendar"),
)
PAYERS = np.repeat(np.arange(6), [130, 70, 40, 15, 3, 1])
N = len(PAYERS)


def payments() -> tuple[Dataset, np.ndarray]:
    """Six payers with 1 to 130 payments each, several at one instant, gaps of a second to months; and who paid."""
    rng = np.random.default_rng(1)
    who = rng.permutation(PAYERS)
    seconds = 1_500_000_000 + np.cumsum(rng.choice([0, 1, 4000, 90_000, 5_000_000], N, p=[0.3, 0.1, 0.3, 0.28, 0.02]))
    seconds[100:112] = seconds[100]
    rate = rng.random(N) * (rng.random(N) < 0.2)
    words = rng.integers(0, 201, (N, 5)) * (rng.random((N, 5)) < 0.6)
    numbers = [rng.lognormal(3, 2, N), seconds / 3600 % 168, rng.exponential(5000, N) - 50, rate, np.full(N, 7)]
    ids = [rng.integers(0, 10, N), rng.integers(0, 301, N), rng.integers(0, 51, N), *words.T, rng.random(N) * 168]
    rows = np.column_stack(numbers + ids).astype(np.float32)
    return Dataset(rows, COLUMNS, pl.Series(who), pl.Series(seconds * 1_000_000).cast(pl.Datetime("us", "UTC"))), who


@cache
def made(case: str):
    """A model with random weights that scores around a half, where a difference shows most; and its stepper."""
    name, options = MODELS[case]
    data, _ = payments()
    model = resolve("model", name)(COLUMNS, **options)
    weights = model.init(inputs(data, plan(data, np.arange(N), 130, 192), np.arange(2)), seed=0)
    weights = {key: np.asarray(value) for key, value in weights.items()} | {"judge.bias": np.zeros((), np.float32)}
    return model, weights, steps.make_stepper(name, to_dict(model)["options"], COLUMNS, weights)


MODELS = {
    "decoder_as_served": ("decoder", {"width": 128, "layers": 4, "heads": 4, "key_heads": 1, "window": 64}),
    "decoder_odd": ("decoder", {"width": 12, "heads": 2, "key_heads": 2, "window": 3, "numbers": "both"}),
    "decoder": ("decoder", {"width": 8, "layers": 2, "heads": 2, "key_heads": 1, "window": 64}),
    "decoder_alone": ("decoder", {"width": 16, "layers": 1, "heads": 4, "key_heads": 2, "window": 1, "numbers": "periodic"}),
    "decoder_shallow": ("decoder", {"width": 16, "layers": 1, "heads": 2, "key_heads": 1, "window": 3}),
    "recurrent": ("recurrent", {"width": 24, "layers": 3, "numbers": "both"}),
    "gru": ("gru", {"width": 8, "layers": 2}),
}


@pytest.fixture(scope="module", params=MODELS, ids=str)
def one(request):
    return made(request.param)


def in_full(model, weights, data) -> tuple[np.ndarray, np.ndarray]:
    """Scores and embeddings from one pass over each payer's whole sequence."""
    planned = plan(data, np.arange(N), N, 192)
    given = inputs(data, planned, np.arange(len(planned)))
    hidden = np.asarray(jax.jit(model.hidden)(weights, given))
    at, scores = data.order[planned.at[planned.scored]], np.asarray(jax.nn.sigmoid(model.judge(weights, hidden)))
    found = np.empty(N, np.float32), np.empty((N, hidden.shape[-1]), np.float32)
    found[0][at], found[1][at] = scores[planned.scored], hidden[planned.scored]
    return found


def test_every_step_gives_score_and_embedding_of_the_whole_sequence(one):
    model, weights, stepper = one
    data, who = payments()
    scores, hidden = in_full(model, weights, data)
    assert scores.std() > 0.05
    found = stepper.steps(np.stack([stepper.empty()] * 6), who, data.rows, data.times)
    np.testing.assert_allclose(found, scores, atol=3e-5 if "heads" in to_dict(model)["options"] else 3e-6)
    states = [stepper.empty() for _ in range(6)]
    for i in range(N):
        score, embedding = stepper.step(states[who[i]], data.rows[i], int(data.times[i]))
        assert score == found[i]
        np.testing.assert_allclose(embedding, hidden[i], atol=1e-3)


def test_a_state_is_all_that_is_needed(one):
    _, _, stepper = one
    data, who = payments()
    mine = np.flatnonzero(who == 0)
    whole, state, parts = stepper.empty()[None], stepper.empty(), []
    expected = stepper.steps(whole, np.zeros(len(mine), int), data.rows[mine], data.times[mine])
    for i in mine:
        state = np.frombuffer(state.tobytes(), np.uint8).copy()
        parts.append(stepper.step(state, data.rows[i], int(data.times[i]))[0])
    np.testing.assert_array_equal(parts, expected)
    np.testing.assert_array_equal(state, whole[0])


def test_states_are_as_small_as_said():
    sizes = {case: made(case)[2].size for case in MODELS}
    assert sizes["decoder_as_served"] < 64_000
    assert sizes["decoder_alone"] == 16 + 8  # two times and a count: it keeps no payments
    assert sizes["recurrent"] == 16 + 2 * 3 * 24 * 4
    assert sizes["gru"] == 16 + 2 * 2 * 8 * 4


def test_a_late_payment_sees_what_was_strictly_before_it():
    _, _, stepper = made("decoder")
    data, who = payments()
    mine = np.flatnonzero(who == 2)[:30]
    last = [k for k in range(30) if data.times[mine[k]] < data.times[mine[-1]]][-1]
    state, scores = stepper.empty(), {}
    for i in mine:
        scores[i] = stepper.step(state, data.rows[i], int(data.times[i]))[0]
    state = stepper.empty()
    for i in np.delete(mine, last):
        stepper.step(state, data.rows[i], int(data.times[i]))
    before = state.copy()
    late, _ = stepper.step(state, data.rows[mine[last]], int(data.times[mine[last]]))
    assert late == pytest.approx(scores[mine[last]], abs=1e-6)
    after = int(data.times[mine[-1]]) + 10**9  # the next payment sees it
    assert abs(stepper.step(state, data.rows[0], after)[0] - stepper.step(before, data.rows[0], after)[0]) > 1e-5


def test_late_payments_do_not_push_out_newer_ones():
    """One layer, so that what a payment looked at is all that counts; the fifth of twelve comes after the tenth."""
    model, weights, stepper = made("decoder_shallow")
    data = anna(np.arange(12) * 3_600_000_000)
    state, came = stepper.empty(), [0, 1, 2, 3, 5, 6, 7, 8, 9, 4, 10, 11]
    found = {i: stepper.step(state, data.rows[i], int(data.times[i]))[0] for i in came}
    expected = score_all(model, weights, data, np.arange(12))
    np.testing.assert_allclose([found[i] for i in (4, 9, 10, 11)], expected[[4, 9, 10, 11]], atol=3e-5)


@pytest.mark.parametrize(("case", "tied"), [("decoder_odd", 9), ("decoder", 9), ("decoder_shallow", 20)])
def test_many_payments_at_one_instant_are_scored_as_in_the_whole_sequence(case, tied):
    """Up to nine; with one layer more of them do not matter for those after them."""
    model, weights, stepper = made(case)
    data = anna(np.concatenate([np.arange(20), np.full(tied, 20), [21, 22, 23]]) * 3_600_000_000)
    found = stepper.steps(stepper.empty()[None], np.zeros(len(data), int), data.rows, data.times)
    same = np.r_[: 20 + steps.TIES + 1, -3, -2, -1]
    np.testing.assert_allclose(found[same], score_all(model, weights, data, np.arange(len(data)))[same], atol=3e-5)


def anna(times: np.ndarray) -> Dataset:
    """Payments of one payer at these times, in microseconds."""
    data, _ = payments()
    return Dataset(data.rows[: len(times)], COLUMNS, pl.Series(["anna"] * len(times)), pl.Series(times).cast(pl.Datetime("us", "UTC")))


@pytest.mark.parametrize("name", ["recurrent", "gru"])
def test_a_late_payment_starts_from_the_memory_before_the_newest_instant_and_changes_nothing(name):
    _, _, stepper = made(name)
    data, who = payments()
    mine, state = np.flatnonzero(who == 2)[:8], stepper.empty()
    moments = [10**15 + k * 10**9 for k in range(8)]
    for i, moment in zip(mine[:7], moments[:7], strict=True):
        stepper.step(state, data.rows[i], moment)
    in_time = state.copy()
    expected, _ = stepper.step(in_time, data.rows[mine[7]], moments[7])
    later = state.copy()
    stepper.step(later, data.rows[0], moments[7] + 10**9)
    kept = later.copy()
    late, _ = stepper.step(later, data.rows[mine[7]], moments[7])
    assert late == pytest.approx(expected, abs=1e-6)
    np.testing.assert_array_equal(later, kept)
    stepper.step(later, data.rows[1], 0)  # before all that is known
    np.testing.assert_array_equal(later, kept)


def test_two_threads_do_not_disturb_one_another():
    _, _, stepper = made("decoder")
    data, who = payments()

    def run(_) -> np.ndarray:
        return stepper.steps(np.stack([stepper.empty()] * 6), who, data.rows, data.times)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, range(20)))
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_what_does_not_fit_is_refused():
    model, weights, _ = made("decoder")
    options = to_dict(model)["options"]

    def refused(match, name="decoder", options=options, columns=COLUMNS, weights=weights):
        with pytest.raises(ValueError, match=match):
            steps.make_stepper(name, options, columns, weights)

    refused("'logistic' is no model with steps. There are: boosted, decoder, forest, gru, recurrent", name="logistic")
    refused("'depth' is no option of the steps of 'decoder'", options=options | {"depth": 3})
    refused("need its option 'window'", options={k: v for k, v in options.items() if k != "window"})
    refused("'waves' is no way to read numbers", options=options | {"numbers": "waves"})
    refused(r"'embed.bias' is \[8\], but by the model's options and columns it is \[16\]", options=options | {"width": 16})
    refused(r"'fixed.embed.edges' is \[5, 17\]", columns=COLUMNS[1:])
    refused("There is no weight 'blocks.0.before_attention.scale'", weights=made("gru")[1])


def test_states_and_rows_of_another_model_are_refused():
    data, who = payments()
    stepper, other, row = made("decoder")[2], made("gru")[2], data.rows[0]
    with pytest.raises(ValueError, match=rf"A memory of \[{other.size}\] bytes"):
        stepper.step(other.empty(), row, 0)
    with pytest.raises(ValueError, match=r"a row of \[3\] numbers"):
        stepper.step(stepper.empty(), row[:3], 0)
    for state, wrong in (
        (stepper.empty(), row.astype(float)),
        (np.frombuffer(stepper.empty().tobytes(), np.uint8), row),
        (stepper.empty().astype(float), row),
    ):
        with pytest.raises(TypeError, match="uint8 that can be written"):
            stepper.step(state, wrong, 0)
    for which in (who[:1], who + 1):
        with pytest.raises(ValueError, match="count memories from 0"):
            stepper.steps(np.stack([stepper.empty()] * 6), which, data.rows, data.times)
    assert len(stepper.steps(stepper.empty()[None], who[:0], data.rows[:0], data.times[:0])) == 0


def test_the_week_is_that_of_the_embeddings():
    assert steps.WEEK == embeddings.WEEK
    assert embeddings.HARMONICS.tolist() == [list(steps.HARMONICS)]


def test_steps_need_no_jax():
    code = "import sys, fraudlab.models.steps; assert not {'jax', 'flax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
