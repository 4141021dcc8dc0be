"""A bundle that is not, byte for byte, what was signed is not loaded; one that is loads without the model's code."""

import base64
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import COLUMNS, FEATURES, Linear, tiny_bundle, tiny_weights

from fraudlab.core.registry import resolve
from fraudlab.features.sequences import Inputs, inputs, plan
from fraudlab.governance.signing import Refused, create_key, sign, write_manifest
from fraudlab.models.contract import EVERYTHING, Estimator, example, score_all
from fraudlab.serving import bundle as bundles
from fraudlab.serving.bundle import load, tokens_of, write

ROOT = Path(__file__).parents[1]
MODELS = sorted(p.stem for p in (ROOT / "fraudlab/models/zoo").glob("[!_]*.py"))
FILES = ("bundle.json", "manifest.json", "score_1.stablehlo", "score_8.stablehlo", "signature.json", "weights.safetensors")
PARTS = {"features": [], "fields": (), "evaluation": {}, "lineage": {}, "buckets": (1, 8)}
SMALL = {"width": 16, "layers": 1, "heads": 2, "key_heads": 1, "window": 8}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("lab"))


@pytest.fixture
def bundle(made, tmp_path):
    """A copy to spoil, and the public key."""
    return shutil.copytree(made[0], tmp_path / "tiny"), made[1].public


def some(n, seed=0):
    """What is shown of `n` payers with 1 to 6 payments, of which a model reads 4 at most; many are at one instant."""
    random = np.random.default_rng(seed)
    of = [np.sort(random.integers(10**9, 10**9 + 4, k)) * 1_000_000 for k in random.integers(1, 7, n)]
    return stacked(tokens_of(times, random.normal(size=(len(times), len(COLUMNS))).astype(np.float32), 4) for times in of)


def stacked(tokens) -> Inputs:
    return Inputs(*map(np.stack, zip(*tokens, strict=True)))


def test_the_files_of_a_bundle(made):
    assert tuple(sorted(p.name for p in made[0].iterdir())) == FILES


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_any_file_is_refused_by_name(bundle, name):
    folder, key = bundle
    content = (folder / name).read_bytes()
    places = range(len(content)) if name == "signature.json" else np.linspace(0, len(content) - 1, 16).astype(int)
    for place in places:
        (folder / name).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(Refused) as refused:
            load(folder, key)
        assert str(refused.value).startswith(name), f"byte {place}: {refused.value}"
    (folder / name).write_bytes(content)
    assert load(folder, key).name == "tiny"


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_empty_file_is_refused_by_name(bundle, name):
    folder, key = bundle
    for spoil in (lambda path: path.write_bytes(b""), lambda path: path.unlink()):
        spoil(folder / name)
        with pytest.raises(Refused, match=name.replace(".", r"\.")):
            load(folder, key)


@pytest.mark.parametrize("name", ["extra.bin", ".gitignore", ".git/config", "folder/score_1.stablehlo"])
def test_a_file_too_many_is_refused_by_name(bundle, name):
    folder, key = bundle
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    with pytest.raises(Refused, match=name.replace(".", r"\.")):
        load(folder, key)


def test_a_link_is_refused(bundle, tmp_path):
    folder, key = bundle
    shutil.move(folder / "bundle.json", tmp_path / "elsewhere.json")
    (folder / "bundle.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(Refused, match=r"bundle\.json .* is not a plain file"):
        load(folder, key)


def test_a_change_under_a_new_manifest_is_refused(bundle):
    folder, key = bundle
    card = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps(card | {"evaluation": {"linear.auc": 0.999}}))
    write_manifest(folder)
    with pytest.raises(Refused, match=r"bundle\.json .* has changed"):
        load(folder, key)


def test_a_change_signed_with_another_key_is_refused(bundle, tmp_path):
    folder, key = bundle
    (folder / "bundle.json").write_text("{}")
    sign(folder, create_key(tmp_path / "evil").private)
    with pytest.raises(Refused, match="another key"):
        load(folder, key)


def test_a_forged_signature_that_speaks_the_librarys_words_is_refused(bundle):
    """An error about the signature never counts as one about a file, whatever text the signature puts into it."""
    folder, key = bundle
    (folder / "bundle.json").write_text("{}")
    hashes = write_manifest(folder)
    signature = json.loads((folder / "signature.json").read_bytes())
    resources = [{"name": name, "digest": digest, "algorithm": "sha256"} for name, digest in hashes.items()]
    for field in ("mediaType", "dsseEnvelope"):
        forged = json.loads(json.dumps(signature)) | {field: "Signature mismatch: []"}
        if field == "mediaType":
            forged["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps({"predicate": {"resources": resources}}).encode()).decode()
        (folder / "signature.json").write_text(json.dumps(forged))
        with pytest.raises(Refused, match=r"signature\.json"):
            load(folder, key)


def test_an_unknown_format_is_refused(made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "tiny")
    card = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps(card | {"format": 99}))
    sign(folder, made[1].private)
    with pytest.raises(Refused, match="format 99"):
        load(folder, made[1].public)


def test_scores_are_the_models(made):
    bundle = load(made[0], made[1].public)
    for n in (1, 3, 8, 21):
        given = some(n)
        np.testing.assert_allclose(bundle.score(given), Linear().score(tiny_weights(), given)[:, -1], atol=1e-6)
        alone = [bundle.score(Inputs(*(x[i : i + 1] for x in given)))[0] for i in range(n)]
        np.testing.assert_allclose(bundle.score(given), alone, atol=1e-6)


def fresh(name: str):
    """A data set, and a model of the zoo for it, estimators fitted and networks as they begin."""
    data, fraud = example(300)
    kind = resolve("model", name)
    options = {k: v for k, v in SMALL.items() if k in kind.__dataclass_fields__}
    model = kind(data.columns, **options | ({"base_options": SMALL} if "base_options" in kind.__dataclass_fields__ else {}))
    sample = inputs(data, planned := plan(data, np.arange(300), 7, 64), np.arange(len(planned)), model.fanout)
    if not isinstance(model, Estimator):
        return data, model, {k: np.asarray(v) for k, v in model.init(sample, 0).items()}
    start = model.network and model.network.init(sample, 0)
    return data, model, model.fit_on(data, np.arange(300), fraud, 0, start)


def latest(data, model, position: int) -> Inputs:
    """What a service shows of the payment at `position`, from its payer's payments."""
    place = data.place[position]
    past = data.order[data.start[place] : data.end[place]]
    at = np.append(past, position)
    return tokens_of(data.times[at], data.rows[at], model.history + 1)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_can_be_bundled(name, tmp_path):
    """Any model of the zoo gives the same scores from its bundle, by its program or by its steps, as from a table, or is refused."""
    data, model, weights = fresh(name)
    keys = create_key(tmp_path / "keys")
    if model.fanout:
        with pytest.raises(ValueError, match="neighbours in the payments' graph, and the service keeps each payer's own history only"):
            write(tmp_path / name, model, weights, private_key=keys.private, **PARTS)
        return
    bundle = load(write(tmp_path / name, model, weights, private_key=keys.private, **PARTS), keys.public)
    assert bundle.model["name"] == name
    if bundle.stepper is None:
        positions = np.arange(280, 299)
        scores = bundle.score(stacked(latest(data, model, i) for i in positions))
    else:
        positions = data.order[data.start == data.start[data.place[299]]]
        scores, memory = np.empty(len(positions)), bundle.stepper.empty()
        for i, at in enumerate(positions):
            scores[i], _ = bundle.stepper.step(memory, data.rows[at], int(data.times[at]))
        assert len(positions) > 5
    np.testing.assert_allclose(scores, score_all(model, weights, data, positions), atol=1e-6 if bundle.stepper is None else 1e-4)


def test_a_model_that_no_program_can_be_shown_enough_for_is_refused(tmp_path):
    keys = create_key(tmp_path / "keys")
    with pytest.raises(ValueError, match=r"take a model with steps \(decoder"):
        write(tmp_path / "long", Linear(history=EVERYTHING), tiny_weights(), private_key=keys.private, **PARTS)


def with_steps(name, tmp_path_factory):
    """A model's bundle, and its keys."""
    lab = tmp_path_factory.mktemp(name)
    _, model, weights = fresh(name)
    keys = create_key(lab / "keys")
    return write(lab / name, model, weights, private_key=keys.private, **PARTS), keys


@pytest.fixture(scope="module")
def stepping(tmp_path_factory):
    return with_steps("decoder", tmp_path_factory)


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    return with_steps("boosted", tmp_path_factory)


@pytest.mark.parametrize("way", ["stepping", "trees"])
def test_a_bundle_with_steps_carries_the_whole_pass_instead_of_buckets(way, request):
    folder, keys = request.getfixturevalue(way)
    assert {p.name for p in folder.iterdir()} == {"score_whole.stablehlo", *FILES} - {"score_1.stablehlo", "score_8.stablehlo"}
    bundle = load(folder, keys.public)
    assert (bundle.buckets, bundle.functions, len(bundle.memory)) == ([], {}, 64)
    assert bundle.warm() < 1


def test_steps_that_give_other_scores_than_the_signed_program_are_refused(stepping, monkeypatch):
    folder, keys = stepping
    make = bundles.make_stepper

    def nudged(name, options, columns, weights):
        return make(name, options, columns, weights | {"judge.bias": weights["judge.bias"] + np.float32(0.02)})

    monkeypatch.setattr(bundles, "make_stepper", nudged)
    with pytest.raises(Refused, match=r"The steps of 'decoder' differ by .* from score_whole\.stablehlo"):
        load(folder, keys.public)


def test_trees_that_give_other_scores_than_the_signed_program_are_refused(trees, monkeypatch):
    folder, keys = trees
    make = bundles.make_stepper
    monkeypatch.setattr(bundles, "make_stepper", lambda n, o, c, weights: make(n, o, c, weights | {"value": 1.01 * weights["value"]}))
    with pytest.raises(Refused, match=r"The steps of 'boosted' differ by .* from score_whole\.stablehlo"):
        load(folder, keys.public)


def test_steps_that_give_no_number_are_refused(stepping, monkeypatch):
    folder, keys = stepping
    make = bundles.make_stepper
    none = np.float32(np.nan)
    monkeypatch.setattr(bundles, "make_stepper", lambda n, o, c, weights: make(n, o, c, weights | {"judge.bias": none.reshape(())}))
    with pytest.raises(Refused, match="differ by nan"):
        load(folder, keys.public)


def test_a_memory_is_named_by_the_model_and_its_weights_not_by_the_bundle(stepping, tmp_path):
    folder, keys = stepping
    _, model, weights = fresh("decoder")
    name = load(folder, keys.public).memory
    card = lambda folder: json.loads((folder / "bundle.json").read_text())  # noqa: E731
    again = write(tmp_path / "again", model, weights, private_key=keys.private, **PARTS | {"evaluation": {"decoder.auc": 0.5}})
    assert card(again)["memory"] == name
    assert card(again)["version"] != card(folder)["version"]
    other = write(tmp_path / "other", model, weights | {"judge.bias": np.float32(1)}, private_key=keys.private, **PARTS)
    assert card(other)["memory"] != name


def test_a_score_that_is_not_a_number_is_an_error(tmp_path):
    keys = create_key(tmp_path / "keys")
    folder = write(tmp_path / "nan", Linear(), tiny_weights() | {"bias": np.float32(np.nan)}, private_key=keys.private, **PARTS)
    with pytest.raises(ArithmeticError, match="not a number"):
        load(folder, keys.public).score(some(1))


LOADS = """
    import sys
    class Blocked:
        def find_spec(self, name, path=None, target=None):
            needed = ["fraudlab.models." + one for one in ("int8", "stepper", "steps", "walk")]
            models = name.startswith("fraudlab.models.") and name not in needed
            if models or name.startswith(("flax", "optax", "orbax", "sklearn", "lightgbm", "mlflow", "fraudlab.training")):
                raise ImportError(f"{name} must not be needed")
    sys.meta_path.insert(0, Blocked())
    import pickle, jax
    from fraudlab.serving.bundle import load
    for name in sys.argv[3:]: setattr(pickle, name, lambda *a, **k: sys.exit("pickle was used"))
    bundle = load(*sys.argv[1:3])
    bundle.warm()
    print(bundle.name, bundle.model["name"], len(bundle.columns))
"""


@pytest.mark.parametrize("way", ["made", "stepping", "trees"])
def test_loading_needs_neither_flax_nor_the_models_code_nor_pickle(way, request):
    folder, keys = request.getfixturevalue(way)
    command = [sys.executable, "-c", textwrap.dedent(LOADS), str(folder), str(keys.public)]
    command += ["load", "loads", "Unpickler"] if way == "made" else []  # numba, which compiles the steps, pickles its own machine code
    done = subprocess.run(command, capture_output=True, text=True)
    model, columns = {"made": ("linear", len(COLUMNS)), "stepping": ("decoder", 3), "trees": ("boosted", 3)}[way]
    assert done.stdout.split() == [folder.name, model, str(columns)], done.stderr


@pytest.mark.parametrize("way", ["made", "stepping", "trees"])
def test_no_file_of_a_bundle_is_a_pickle_or_tells_where_it_was_made(way, request):
    folder, _ = request.getfixturevalue(way)
    for path in folder.iterdir():
        content = path.read_bytes()
        assert not content.startswith(b"\x80"), path.name
        assert str(folder.parent).encode() not in content, path.name
        assert b".py" not in content, path.name


def test_the_card_says_what_a_scorer_needs(made):
    bundle = load(made[0], made[1].public)
    assert bundle.features == FEATURES.to_dict()
    assert [c["name"] for c in bundle.columns] == [c.name for c in COLUMNS]
    assert (bundle.history, bundle.buckets, bundle.entities, len(bundle.version)) == (3, [1, 8], True, 12)
    assert (bundle.memory, bundle.stepper) == ("", None)
    assert bundle.schema["$defs"]["Payment"]["required"][:2] == ["payment_id", "event_time"]
