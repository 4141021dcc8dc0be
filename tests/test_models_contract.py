"""Every registered model keeps the contract of `nbs/30_models/00_contract.ipynb`; a new plug-in is tested the day it appears."""

import json
import sys
from dataclasses import FrozenInstanceError, fields

import jax
import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from fraudlab.core.registry import discover, resolve
from fraudlab.features.sequences import Inputs
from fraudlab.models.contract import Estimator, Network, example, from_dict, load, parameters, save, score_all, to_dict, weights_hash
from fraudlab.training.loop import Recipe, fit

DATA, FRAUD = example(800)
TRAIN, TEST = np.split(np.arange(len(DATA)), [500])


def learn_on(model, positions, labels) -> dict:
    """Weights of `model`; the recipe is one for a few hundred payments."""
    return fit(model, DATA, positions, labels, resolve("objective", "fraud")(), Recipe(epochs=8, batch=64), progress=False)


def learn(name: str):
    """The model called `name` with its default options, fitted to 500 payments."""
    model = discover("model")[name](DATA.columns)
    return model, learn_on(model, TRAIN, FRAUD)


@pytest.fixture(scope="module", params=sorted(discover("model")))
def learned(request):
    return request.param, *learn(request.param)


def test_the_zoo_is_found():
    assert {"logistic", "forest", "boosted", "history"} <= set(discover("model"))


def test_a_model_is_a_frozen_dataclass_of_columns_and_plain_options(learned):
    name, model, _ = learned
    assert isinstance(model, (Estimator, Network))
    assert type(model).__name__.lower() == name
    assert fields(model)[0].name == "columns"
    with pytest.raises(FrozenInstanceError):
        model.columns = ()
    assert from_dict(json.loads(json.dumps(to_dict(model)))) == model
    assert hash(from_dict(to_dict(model))) == hash(model)


def test_weights_are_a_flat_dictionary_of_small_numbers(learned):
    _, _, weights = learned
    assert all(isinstance(key, str) for key in weights)
    assert {np.asarray(v).dtype.name for v in weights.values()} <= {"float32", "int32"}
    assert all(np.isfinite(v).all() for v in weights.values())
    assert parameters(weights) > 0


def test_it_learns_and_scores_probabilities(learned):
    _, model, weights = learned
    scores = score_all(model, weights, DATA, TEST)
    assert scores.dtype == np.float32
    assert scores.shape == TEST.shape
    assert ((scores >= 0) & (scores <= 1)).all()
    assert average_precision_score(FRAUD[TEST], scores) > 0.6  # guessing: .1


def test_an_equal_seed_gives_equal_weights(learned):
    name, _, weights = learned
    assert weights_hash(learn(name)[1]) == weights_hash(weights)


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
    inputs = DATA.inputs(TEST[:8], model.history)
    score = jax.jit(lambda weights, *inputs: model.score(weights, Inputs(*inputs)))
    exported = jax.export.export(score, platforms=("cpu", "cuda"))(dict(weights), *inputs)
    revived = jax.export.deserialize(exported.serialize())
    np.testing.assert_allclose(revived.call(dict(weights), *inputs), score(dict(weights), *inputs), rtol=1e-6)


def test_a_score_does_not_depend_on_the_other_payments_of_the_batch(learned):
    _, model, weights = learned
    together = score_all(model, weights, DATA, TEST)
    np.testing.assert_allclose(score_all(model, weights, DATA, TEST[::-1])[::-1], together, rtol=1e-5)
    for batch in (1, 7):
        np.testing.assert_allclose(score_all(model, weights, DATA, TEST[:20], batch=batch), together[:20], rtol=1e-5)


def test_a_score_does_not_depend_on_what_padding_holds(learned):
    _, model, weights = learned
    inputs = DATA.inputs(np.arange(64), model.history)  # early payments: little history, much padding
    rubbish = np.float32(1e6)
    other = inputs._replace(
        history=np.where(inputs.mask[..., None], inputs.history, rubbish), elapsed=np.where(inputs.mask, inputs.elapsed, rubbish)
    )
    np.testing.assert_array_equal(jax.jit(model.score)(dict(weights), other), jax.jit(model.score)(dict(weights), inputs))


def test_a_score_depends_on_the_payment_itself(learned):
    _, model, weights = learned
    inputs = DATA.inputs(TEST, model.history)
    dear = inputs._replace(rows=inputs.rows * np.array([20, 1, 1], np.float32))
    assert np.median(model.score(weights, dear)) > np.median(model.score(weights, inputs)) + 0.2


def test_wrong_inputs_are_refused(learned):
    _, model, weights = learned
    narrow = type(model)(model.columns[:2])
    with pytest.raises(ValueError, match=r"2 columns"):
        score_all(narrow, weights, DATA, TEST)


def test_one_kind_of_label_is_refused(learned):
    _, model, _ = learned
    with pytest.raises(ValueError, match="needs both kinds"):
        fit(model, DATA, TRAIN, np.zeros(len(DATA), bool), resolve("objective", "fraud")(), progress=False)


def test_unknown_labels_count_for_nothing(learned):
    """Where nothing is known of every fifth payment, the model is another one, and an estimator is that of the known payments."""
    _, model, weights = learned
    hidden = np.arange(len(DATA)) % 5 == 0
    labels = [None if h else bool(f) for h, f in zip(hidden, FRAUD, strict=True)]
    partly = learn_on(model, TRAIN, labels)
    assert weights_hash(partly) != weights_hash(weights)
    if isinstance(model, Estimator):
        assert weights_hash(partly) == weights_hash(learn_on(model, TRAIN[~hidden[TRAIN]], FRAUD))


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
