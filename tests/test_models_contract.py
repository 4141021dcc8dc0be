"""Every registered model keeps the contract of `nbs/30_models/00_contract.ipynb`; a new plug-in is tested the day it appears."""

import json
import sys
from copy import copy
from dataclasses import FrozenInstanceError, fields
from functools import partial

import jax
import numpy as np
import polars as pl
import pytest
from sklearn.metrics import average_precision_score

from fraudlab.core.registry import discover, resolve
from fraudlab.features.graphs import around, graph
from fraudlab.features.sequences import Dataset, Inputs, inputs, plan
from fraudlab.models.contract import (
    EVERYTHING,
    Estimator,
    Network,
    _run,
    example,
    from_dict,
    load,
    name_of,
    parameters,
    plan_for,
    save,
    score_all,
    to_dict,
    weights_hash,
)
from fraudlab.training.loop import fit
from fraudlab.training.recipe import Recipe

DATA, FRAUD = example(800)
TRAIN, TEST = np.split(np.arange(len(DATA)), [500])
NETWORK = {
    "width": 16,
    "layers": 1,
    "heads": 2,
    "key_heads": 1,
    "window": 8,
    "history": 7,
    "pieces": 8,
    "fanout": (4, 3),
}  # what a model has of these
SMALL = NETWORK | {"base_options": {k: NETWORK[k] for k in ("width", "layers", "heads", "key_heads", "window")}}
RECIPE = Recipe(epochs=40, tokens=512, room=64, context=16, learning_rate=0.01)


def small(name: str):
    """The model called `name`, small where it has options for that."""
    kind = discover("model")[name]
    return kind(DATA.columns, **{f.name: SMALL[f.name] for f in fields(kind) if f.name in SMALL})


def learn(model, positions=TRAIN, labels=FRAUD) -> dict:
    """Weights of `model`; the recipe is one for a few hundred payments."""
    return fit(model, DATA, positions, labels, resolve("objective", "fraud")(), RECIPE, progress=False)


score = partial(_run, "score")  # compiled once for each shape: that of four rows, 256 tokens, serves most tests
score_all = partial(score_all, tokens=256)
hidden = jax.jit(lambda model, *args: model.hidden(*args), static_argnums=0)


@pytest.fixture(scope="module", params=sorted(discover("model")))
def learned(request):
    model = small(request.param)
    return request.param, model, learn(model)


def seen(model, positions) -> Inputs:
    """What `model` sees in the last four rows with `positions`, which are those that may have fillers."""
    planned = plan_for(model, DATA, positions)
    return inputs(DATA, planned, np.arange(len(planned))[-4:], model.fanout)


def changed(data: Dataset, places: np.ndarray) -> Dataset:
    """The same payments but for the rows at `places`."""
    other, rows = copy(data), data.rows.copy()
    rows[places] = rows[places] * np.float32(3) + np.float32(1)
    other.rows = rows
    return other


def test_the_zoo_is_found():
    sequence_models = {"encoder", "decoder", "seq2seq", "recurrent", "gru", "late_fusion"}
    graph_models = {"sage", "gat", "mpnn", "hetero", "temporal", "sequence_graph", "boosted_neighbours"}
    assert {"logistic", "forest", "boosted", *sequence_models, *graph_models} <= set(discover("model"))


def test_a_model_is_a_frozen_dataclass_of_columns_and_plain_options(learned):
    name, model, _ = learned
    assert isinstance(model, (Estimator, Network))
    assert name_of(model) == name
    assert fields(model)[0].name == "columns"
    with pytest.raises(FrozenInstanceError):
        model.columns = ()
    again = from_dict(json.loads(json.dumps(to_dict(model))))
    assert again == model
    assert hash(again) == hash(model)


def test_weights_are_a_flat_dictionary_of_small_numbers(learned):
    _, _, weights = learned
    assert all(isinstance(key, str) for key in weights)
    assert {np.asarray(v).dtype.name for v in weights.values()} <= {"float32", "int32"}
    assert all(np.isfinite(v).all() for v in weights.values())
    assert parameters(weights) > 0


def test_it_learns_and_scores_probabilities(learned):
    name, model, weights = learned
    scores = score_all(model, weights, DATA, TEST)
    assert scores.dtype == np.float32
    assert scores.shape == TEST.shape
    assert ((scores >= 0) & (scores <= 1)).all()
    precision = average_precision_score(FRAUD[TEST], scores)
    print(f"{name}: average precision {precision:.3f}")
    assert precision > 0.75  # guessing: .1


def test_an_equal_seed_gives_equal_weights(learned):
    _, model, weights = learned
    assert weights_hash(learn(model)) == weights_hash(weights)


def test_saved_and_loaded_it_is_bit_equal(learned, tmp_path):
    _, model, weights = learned
    save(tmp_path, model, weights)
    again, same = load(tmp_path)
    assert again == model
    assert weights_hash(same) == weights_hash(weights)
    np.testing.assert_array_equal(score_all(again, same, DATA, TEST), score_all(model, weights, DATA, TEST))
    assert {f.name for f in tmp_path.iterdir()} == {"model.json", "weights.safetensors"}


def test_it_is_exported_for_a_fixed_batch(learned):
    _, model, weights = learned
    given = seen(model, TEST[:100])
    arrays, shape = jax.tree.flatten(given)
    program = jax.jit(lambda weights, *arrays: model.score(weights, jax.tree.unflatten(shape, arrays)))
    exported = jax.export.export(program, platforms=("cpu", "cuda"))(dict(weights), *arrays)
    revived = jax.export.deserialize(exported.serialize())
    np.testing.assert_allclose(revived.call(dict(weights), *arrays), score(model, weights, given), rtol=1e-5)


def test_a_score_does_not_depend_on_the_other_payments_of_the_batch(learned):
    _, model, weights = learned
    together = score_all(model, weights, DATA, TEST)
    np.testing.assert_allclose(score_all(model, weights, DATA, TEST[::-1])[::-1], together, rtol=1e-5)
    for count, tokens in ((20, 256), (300, 1024)):
        np.testing.assert_allclose(score_all(model, weights, DATA, TEST[:count], tokens=tokens), together[:count], rtol=2e-5)


def test_a_score_does_not_depend_on_what_fillers_hold(learned):
    _, model, weights = learned
    given = seen(model, TEST[:100])
    filler = given.sequence == 0
    other = given._replace(rows=np.where(filler[..., None], np.float32(1e6), given.rows), gap=np.where(filler, np.float32(1e6), given.gap))
    assert filler.any() or not model.history
    np.testing.assert_array_equal(score(model, weights, other)[~filler], score(model, weights, given)[~filler])


def tied() -> tuple[Dataset, np.ndarray, np.ndarray]:
    """The example with payments of one payer at one instant, each one's payer, and its time in half days."""
    rng = np.random.default_rng(1)
    payer, time = rng.integers(0, 40, len(DATA)), np.sort(rng.integers(0, 60, len(DATA)))
    frame = pl.DataFrame({"event_time": time * 43_200_000_000, "payer_id": payer, "payee_id": rng.integers(0, 30, len(DATA))})
    frame = frame.with_columns(pl.col("event_time").cast(pl.Datetime("us")))
    return Dataset(DATA.rows, DATA.columns, frame["payer_id"], frame["event_time"], graph(frame)), payer, time


def test_a_score_sees_strictly_earlier_payments_of_its_payer_or_neighbours_and_no_others(learned):
    """All others are changed: other payers', later ones, those at the same instant, those further back than it says that it looks."""
    _, model, weights = learned
    data, payer, time = tied()
    before = score_all(model, weights, data, TEST)
    moved = 0
    for position in np.random.default_rng(0).choice(TEST[100:], 6, replace=False):
        own = np.flatnonzero((payer == payer[position]) & (time < time[position]))
        if model.fanout:
            hops = around(data.graph, np.array([position]), data.times[[position]], model.fanout)
            own = np.unique(np.concatenate([hop.payment[hop.payment >= 0] for hop in hops]))
            assert (time[own] < time[position]).all()
        visible = np.append(own if model.fanout else own[max(0, len(own) - model.history) :], position)
        at = position - TEST[0]
        unseen = np.setdiff1d(np.arange(len(data)), visible)
        assert (payer[unseen] == payer[position]).any()
        np.testing.assert_allclose(score_all(model, weights, changed(data, unseen), TEST)[at], before[at], rtol=1e-5)
        moved += abs(score_all(model, weights, changed(data, own), TEST)[at] - before[at]) > 1e-6
    assert (moved > 0) == (model.history > 0 or model.fanout != ())


def test_a_model_without_end_looks_at_the_payers_first_payment(learned):
    _, model, weights = learned
    if model.history != EVERYTHING:
        pytest.skip("it looks at so many payments")
    payer = DATA.order[DATA.start[0] : np.searchsorted(DATA.start, 1)]
    other = changed(DATA, payer[:1])
    assert abs(score_all(model, weights, other, payer[-1:]) - score_all(model, weights, DATA, payer[-1:]))[0] > 0


def test_a_score_depends_on_the_payment_itself(learned):
    _, model, weights = learned
    given = seen(model, TEST)
    ends = (given.sequence > 0) & (np.diff(given.sequence, axis=1, append=0) != 0)  # what no other payment can see
    dear = given._replace(rows=given.rows * np.where(ends[..., None], np.array([[[20, 1, 1]]], np.float32), np.float32(1)))
    assert np.median(score(model, weights, dear)[ends]) > np.median(score(model, weights, given)[ends]) + 0.2


def test_a_networks_score_is_its_embedding_judged_and_a_hidden_column_says_nothing(learned):
    _, model, weights = learned
    if not isinstance(model, Network):
        pytest.skip("it has no embedding")
    given = seen(model, TEST[:100])
    hide = np.zeros((*given.gap.shape, len(model.columns) + 1), bool)  # of the gap too
    embedding = np.asarray(hidden(model, weights, given, hide))
    assert embedding.shape == (*given.gap.shape, model.width)
    logits = embedding @ weights["judge.kernel"] + weights["judge.bias"]
    np.testing.assert_allclose(score(model, weights, given), 1 / (1 + np.exp(-logits)), rtol=1e-4)

    dearer = given._replace(rows=given.rows + np.array([[[7, 0, 0]]], np.float32))
    assert (hidden(model, weights, dearer, hide) != embedding).any()
    hide[..., 0] = True
    np.testing.assert_array_equal(hidden(model, weights, dearer, hide), hidden(model, weights, given, hide))


def test_wrong_inputs_are_refused(learned):
    _, model, weights = learned
    narrow = type(model)(model.columns[:2])
    with pytest.raises(ValueError, match=r"2 columns"):
        score_all(narrow, weights, DATA, TEST)


def test_one_kind_of_label_is_refused(learned):
    _, model, _ = learned
    with pytest.raises(ValueError, match="needs both kinds"):
        learn(model, labels=np.zeros(len(DATA), bool))


def test_unknown_labels_count_for_nothing(learned):
    """Where nothing is known of every fifth payment, the model is that of the others. Networks: as their objective says."""
    _, model, weights = learned
    if isinstance(model, Network) or model.network:
        pytest.skip("its objective decides")
    hidden = np.arange(len(DATA)) % 5 == 0
    partly = weights_hash(learn(model, labels=[None if h else bool(f) for h, f in zip(hidden, FRAUD, strict=True)]))
    assert partly != weights_hash(weights)
    assert partly == weights_hash(learn(model, TRAIN[~hidden[TRAIN]]))


def test_a_window_holds_a_payment_and_what_a_window_model_says_that_it_looks_at():
    model = small("encoder")
    planned = plan_for(model, DATA, TEST)
    ends = [planned.at[row, place] for row, place in zip(*np.nonzero(planned.scored), strict=True)]
    assert sorted(DATA.order[ends].tolist()) == TEST.tolist()
    lengths = [
        (planned.sequence[row] == planned.sequence[row, place]).sum() for row, place in zip(*np.nonzero(planned.scored), strict=True)
    ]
    assert max(lengths) == model.history + 1
    assert planned.fill == plan(DATA, TEST, model.history, planned.at.shape[1], windows=True).fill > 0.9


def test_late_fusion_refuses_a_network_or_an_option_that_does_not_exist():
    kind = resolve("model", "late_fusion")
    with pytest.raises(ValueError, match=r"decodr.*Did you mean 'decoder'"):
        kind(DATA.columns, base="decodr").network  # noqa: B018
    with pytest.raises(ValueError, match="'widht' is no option of model 'decoder'"):
        kind(DATA.columns, base_options={"widht": 8}).history  # noqa: B018


def test_lightgbm_without_its_system_library_says_what_to_install(monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "lightgbm":
                raise OSError("libgomp.so.1: cannot open shared object file: No such file or directory")

    for module in [m for m in sys.modules if m.split(".")[0] == "lightgbm"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    model = resolve("model", "boosted")(DATA.columns)
    with pytest.raises(ImportError, match="apt-get install libgomp1"):
        fit(model, DATA, TRAIN, FRAUD)
