"""Graph networks: what they are shown is what the sampler allows, they compile once, and their explanations add up."""

from contextlib import contextmanager
from copy import copy
from dataclasses import fields, replace

import jax
import numpy as np
import polars as pl
import pytest

from fraudlab.core.registry import discover, resolve
from fraudlab.evaluation.explanations import attributed, neighbours_table, picture
from fraudlab.features.graphs import Layout, graph
from fraudlab.features.sequences import Dataset, inputs, plan
from fraudlab.models.contract import check_inputs, example, score_all
from fraudlab.serving import bundle
from fraudlab.training.loop import fit
from fraudlab.training.objectives.fraud import Fraud, without_labels
from fraudlab.training.recipe import Recipe

DATA, FRAUD = example(600)
RECIPE = Recipe(epochs=2, tokens=128, learning_rate=0.01)


def small(name: str, **options):
    kind = discover("model")[name]
    wanted = {"width": 8, "fanout": (4, 3), "pieces": 4, "layers": 1, "heads": 2, "key_heads": 1} | options
    return kind(DATA.columns, **{f.name: wanted[f.name] for f in fields(kind) if f.name in wanted})


def some(model):
    at = np.arange(300, 320)
    return inputs(DATA, plan(DATA, at, 0, 1), np.arange(len(at)), model.fanout)


@contextmanager
def compilations():
    """A list that grows by one for every program that is compiled."""
    seen = []
    listener = lambda event, duration, **_: seen.append(event) if event.endswith("backend_compile_duration") else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def test_nothing_is_compiled_after_the_first_step_nor_for_other_payments_to_score():
    model, after = small("sage"), []
    with compilations() as seen:
        recipe = replace(RECIPE, log_every=1)
        weights = fit(model, DATA, np.arange(400), FRAUD, Fraud(), recipe, progress=False, log=lambda *_: after.append(len(seen)))
        assert after[1] > 0
        assert after[1:] == after[1:2] * (len(after) - 1)
        score_all(model, weights, DATA, np.arange(400), 256)
        before = len(seen)
        score_all(model, weights, DATA, np.arange(150, 437), 256)
        assert len(seen) == before


@pytest.mark.parametrize("name", ["sage", "sequence_graph", "temporal"])
def test_explanations_add_up_to_the_score(name):
    model = small(name)
    weights = fit(model, DATA, np.arange(400), FRAUD, Fraud(), RECIPE, progress=False)
    at = np.array([500, 41, 333])
    found = attributed(model, weights, DATA, at)
    parts = found.columns.sum(-1) + sum(part.reshape(3, -1).sum(-1) for part in found.neighbours)
    np.testing.assert_allclose(found.base + parts, found.log_odds, atol=0.05)
    np.testing.assert_allclose(1 / (1 + np.exp(-found.log_odds)), score_all(model, weights, DATA, at), rtol=1e-4)
    none = inputs(DATA, plan(DATA, at, 0, 1), np.arange(3), model.fanout).around[0].relation == 0
    assert none.any()
    order = np.argsort(DATA.place[at])
    assert (found.neighbours[0][order][none[:, 0]] == 0).all()


def test_the_neighbours_are_named_and_drawn():
    model = small("gat")
    weights = fit(model, DATA, np.arange(400), FRAUD, Fraud(), RECIPE, progress=False)
    payments = pl.DataFrame({"payment_id": [f"p{i}" for i in range(len(DATA))]})
    table = neighbours_table(model, weights, DATA, 500, payments)
    assert (table["hours_before"] > 0).all()
    assert table["payment_id"].str.strip_prefix("p").cast(pl.Int64).equals(table["row"].cast(pl.Int64).alias("payment_id"))
    drawn = picture(table).to_dict()
    assert len(drawn["layer"]) == 5


def test_hidden_labels_are_hidden_and_nothing_else():
    model = small("sage")
    rng = np.random.default_rng(0)
    given = some(model)
    labelled = given._replace(around=tuple(b._replace(label=rng.integers(0, 3, b.label.shape).astype(np.int32)) for b in given.around))
    hidden = without_labels(labelled, 0.5, jax.random.key(0))
    for before, after in zip(labelled.around, hidden.around, strict=True):
        kept = np.asarray(after.label) == before.label
        assert (np.asarray(after.label)[~kept] == 0).all()
        assert 0.3 < (np.asarray(after.label) > 0).sum() / (before.label > 0).sum() < 0.7
        assert all(np.array_equal(getattr(before, name), getattr(after, name)) for name in before._fields if name != "label")


def test_a_known_label_moves_the_score():
    model = small("hetero")
    given = some(model)
    weights = model.init(given)
    told = given._replace(around=tuple(b._replace(label=np.where(b.relation > 0, 2, 0).astype(np.int32)) for b in given.around))
    score = jax.jit(model.score)
    assert (np.asarray(score(weights, told)) != np.asarray(score(weights, given))).mean() > 0.9


def test_what_does_not_fit_is_refused():
    model = small("sage")
    alone = Dataset(DATA.rows, DATA.columns, pl.Series(DATA.order), pl.Series(DATA.times).cast(pl.Datetime("us")))
    with pytest.raises(ValueError, match=r"fanout = \(4, 3\) looks at neighbours, and these payments have no graph"):
        score_all(model, {}, alone, np.arange(10))
    with pytest.raises(ValueError, match=r"looks at \[4, 3\] neighbours in each hop, but was given blocks of shapes \[\]"):
        check_inputs(model, inputs(DATA, plan(DATA, np.arange(9), 0, 1), np.arange(9)))
    with pytest.raises(ValueError, match="give it roles = 2"):
        small("gat", fanout=(2,)).__class__(DATA.columns, fanout=(4, 3), roles=3).init(some(model))
    with pytest.raises(ValueError, match="base of sequence_graph"):
        resolve("model", "sequence_graph")(DATA.columns, base="gru")


def test_a_graph_model_is_not_packed_for_a_service_that_keeps_no_graph(tmp_path):
    model = small("sage")
    with pytest.raises(ValueError, match="cannot be served yet"):
        bundle._programs(model, model.init(some(model)), (1,))


def test_payments_without_entities_have_no_neighbours():
    nobody = pl.Series([None] * 5, dtype=pl.String)
    times = pl.Series(np.arange(5)).cast(pl.Datetime("us"))
    frame = pl.DataFrame({"payment_id": list("abcde"), "event_time": times, "payer_id": nobody, "payee_id": nobody})
    data = Dataset(DATA.rows[:5], DATA.columns, nobody, times, graph(frame, Layout()))
    block = inputs(data, plan(data, np.arange(5), 0, 1), np.arange(5), (3,)).around[0]
    assert all((array == 0).all() for array in block)


def test_payments_can_be_nodes_of_a_graph_that_a_network_learns_from():
    rng = np.random.default_rng(0)
    names = {"payer_id": rng.integers(0, 40, len(DATA)).astype(str), "payee_id": rng.integers(0, 30, len(DATA)).astype(str)}
    frame = pl.DataFrame(
        {"payment_id": np.arange(len(DATA)).astype(str), "event_time": pl.Series(DATA.times).cast(pl.Datetime("us"))} | names
    )
    data = Dataset(DATA.rows, DATA.columns, frame["payer_id"], frame["event_time"], graph(frame, Layout(payments_as_nodes=True)))
    assert len(data.graph.relations) == 4
    model = small("hetero", relations=4)
    weights = fit(model, data, np.arange(400), FRAUD, Fraud(), RECIPE, progress=False)
    assert np.isfinite(score_all(model, weights, data, np.arange(400, 600))).all()
    with pytest.raises(ValueError, match=r"give it relations = \d"):
        fit(small("hetero"), data, np.arange(400), FRAUD, Fraud(), RECIPE, progress=False)


def test_a_checkpoint_of_another_graph_is_not_gone_on_from(tmp_path):
    model, other = small("sage"), copy(DATA)
    other.graph = DATA.graph._replace(other=DATA.graph.other[::-1].copy())
    train = lambda data: fit(model, data, np.arange(400), FRAUD, Fraud(), RECIPE, checkpoints=tmp_path, progress=False)  # noqa: E731
    train(DATA)
    with pytest.raises(ValueError, match="checkpoint"):
        train(other)


def test_labels_that_are_all_unknown_are_asked_for():
    with pytest.raises(ValueError, match="None of the 400 payments to train on has a label"):
        fit(small("sage"), DATA, np.arange(400), None, Fraud(), RECIPE, progress=False)
