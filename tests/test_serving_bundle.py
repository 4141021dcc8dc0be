"""A bundle that is not, byte for byte, what was signed is not loaded; one that is loads without the model's code."""

import base64
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_bundle import COLUMNS, FEATURES, Linear, tiny_bundle, tiny_weights

from fraudlab.core.registry import resolve
from fraudlab.features.sequences import Inputs
from fraudlab.governance.signing import Refused, create_key, sign, write_manifest
from fraudlab.serving.bundle import load, write

ROOT = Path(__file__).parents[1]
MODELS = sorted(p.stem for p in (ROOT / "fraudlab/models/zoo").glob("[!_]*.py"))
FILES = ("bundle.json", "manifest.json", "score_1.stablehlo", "score_8.stablehlo", "signature.json", "weights.safetensors")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("lab"))


@pytest.fixture
def bundle(made, tmp_path):
    """A copy to spoil, and the public key."""
    return shutil.copytree(made[0], tmp_path / "tiny"), made[1].public


def some(n, seed=0):
    random = np.random.default_rng(seed)
    rows, history, elapsed = (random.normal(size=(n, *shape)).astype(np.float32) for shape in ((len(COLUMNS),), (3, len(COLUMNS)), (3,)))
    return Inputs(rows, history, elapsed, random.random((n, 3)) < 0.5)


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
        inputs = some(n)
        np.testing.assert_allclose(bundle.score(inputs), Linear().score(tiny_weights(), inputs), atol=1e-6)
        alone = [bundle.score(Inputs(*(x[i : i + 1] for x in inputs)))[0] for i in range(n)]
        np.testing.assert_allclose(bundle.score(inputs), alone, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_can_be_bundled(name, tmp_path):
    """Fitted or fresh, any model of the zoo gives the same scores from its bundle."""
    from fraudlab.models.contract import example

    data, fraud = example()
    model, at = (kind := resolve("model", name))(columns=data.columns), np.arange(len(data))
    inputs = data.inputs(at, model.history)
    weights = model.fit(inputs, fraud, 0) if hasattr(kind, "fit") else model.init(inputs, 0)
    keys = create_key(tmp_path / "keys")
    parts = {"features": [], "fields": (), "evaluation": {}, "lineage": {}, "buckets": (1, 8)}
    bundle = load(write(tmp_path / name, model, weights, private_key=keys.private, **parts), keys.public)
    some = data.inputs(at[:19], model.history)
    np.testing.assert_allclose(bundle.score(some), jax.jit(model.score)(weights, some), atol=1e-6)


def test_a_score_that_is_not_a_number_is_an_error(tmp_path):
    keys = create_key(tmp_path / "keys")
    parts = {"features": [], "fields": (), "evaluation": {}, "lineage": {}, "buckets": (1,)}
    folder = write(tmp_path / "nan", Linear(), tiny_weights() | {"bias": np.float32(np.nan)}, private_key=keys.private, **parts)
    with pytest.raises(ArithmeticError, match="not a number"):
        load(folder, keys.public).score(some(1))


LOADS = """
    import sys
    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.startswith(("flax", "optax", "orbax", "sklearn", "lightgbm", "mlflow", "fraudlab.models", "fraudlab.training")):
                raise ImportError(f"{name} must not be needed")
    sys.meta_path.insert(0, Blocked())
    import pickle, jax
    from fraudlab.serving.bundle import load
    for name in ("load", "loads", "Unpickler"): setattr(pickle, name, lambda *a, **k: sys.exit("pickle was used"))
    bundle = load(*sys.argv[1:])
    bundle.warm()
    print(bundle.name, bundle.model["name"], len(bundle.columns))
"""


def test_loading_needs_neither_flax_nor_the_models_code_nor_pickle(made):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOADS), *map(str, (made[0], made[1].public))], capture_output=True, text=True
    )
    assert done.stdout.split() == ["tiny", "linear", str(len(COLUMNS))], done.stderr


def test_no_file_of_a_bundle_is_a_pickle_or_tells_where_it_was_made(made):
    for path in made[0].iterdir():
        content = path.read_bytes()
        assert not content.startswith(b"\x80"), path.name
        assert str(made[0].parent).encode() not in content, path.name
        assert b"tiny_bundle.py" not in content, path.name


def test_the_card_says_what_a_scorer_needs(made):
    bundle = load(made[0], made[1].public)
    assert bundle.features == FEATURES.to_dict()
    assert [c["name"] for c in bundle.columns] == [c.name for c in COLUMNS]
    assert (bundle.history, bundle.buckets, bundle.entities, len(bundle.version)) == (3, [1, 8], True, 12)
    assert bundle.schema["$defs"]["Payment"]["required"][:2] == ["payment_id", "event_time"]
