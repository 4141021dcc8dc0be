"""The packed service: what is in the bento, that it is enough, and that it answers."""

import json
import re
import subprocess
import sys
import textwrap
import urllib.request
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from tiny_bundle import tiny_bundle

from fraudlab.governance.signing import Refused, verify
from fraudlab.serving.bento import free_port, package_bento, running
from fraudlab.serving.bundle import example, load

ROOT = Path(__file__).parents[1]
ALONE = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"}  # an environment that knows nothing of the lab


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A bento, built with no way to a registry: the folder, the bundle in it, its public key."""
    lab = tmp_path_factory.mktemp("lab")
    folder, keys = tiny_bundle(lab)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FRAUDLAB_ROOT", str(ROOT))
        for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "PIP_INDEX_URL", "UV_DEFAULT_INDEX"):
            patch.setenv(name, "http://127.0.0.1:9")
        bento = package_bento(folder, public_key=keys.public, home=lab / "bentoml")
        assert package_bento(folder, public_key=keys.public, home=lab / "bentoml") == bento, "the same content is packed once"
    return bento, folder, keys


def test_the_bento_holds_the_library(packed):
    (wheel,) = (packed[0] / "env/python/wheels").glob("fraudlab-*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("fraudlab/")}
    assert inside == {str(p.relative_to(ROOT)) for p in (ROOT / "fraudlab").rglob("*.py")}


def test_the_bento_holds_the_bundle_and_its_key(packed):
    bento, folder, keys = packed
    verify(bento / "src/bundle", bento / "src/public.pem")
    for path in folder.iterdir():
        assert (bento / "src/bundle" / path.name).read_bytes() == path.read_bytes()
    assert (bento / "src/service.py").read_bytes() == (ROOT / "bentos/scorer/service.py").read_bytes()
    private = keys.private.read_bytes()
    assert not any(private in p.read_bytes() for p in bento.rglob("*") if p.is_file()), "the private key stays at home"


def test_the_bento_holds_a_lock_without_registry_addresses(packed):
    lock = (packed[0] / "env/python/requirements.txt").read_text()
    assert "://" not in lock
    assert "--index" not in lock
    assert "--find-links" not in lock
    pins = re.findall(r"^([\w.-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})*)", lock, re.M)
    assert {name for name, _, hashes in pins if not hashes} == {"bentoml"}, "BentoML adds its own pin again, without a hash"
    assert len(pins) == len([line for line in lock.splitlines() if line and not line.startswith(" ")])
    whole = (ROOT / "requirements.lock").read_text()
    assert all(f"{name}=={version} \\" in whole for name, version, _ in pins)
    names = {name for name, _, _ in pins}
    assert {"bentoml", "jax", "msgspec", "polars", "safetensors", "starlette"} <= names
    assert not names & {"jupyterlab", "mlflow", "nbdev", "papermill", "pytest", "scikit-learn", "lightgbm"}, (
        "the lab is not needed to serve"
    )


def test_the_bento_tells_no_machine(packed):
    for path in packed[0].rglob("*"):
        if path.is_file() and path.suffix != ".whl":
            content = path.read_bytes()
            assert str(ROOT).encode() not in content, path
            assert str(packed[1].parent).encode() not in content, path


def test_the_bento_describes_itself(packed):
    bento, folder, keys = packed
    bundle = load(folder, keys.public)
    described = yaml.safe_load((bento / "apis/openapi.yaml").read_text())
    assert described["paths"]["/v1/score"]["post"]["requestBody"]["content"]["application/json"]["example"] == example(bundle)
    about = yaml.safe_load((bento / "bento.yaml").read_text())
    assert about["labels"] == {"bundle": "tiny", "bundle_version": bundle.version, "model": "linear"}
    assert about["version"].startswith(bundle.version)
    assert bundle.version in (bento / "README.md").read_text()


@pytest.fixture(scope="module")
def unpacked(packed, tmp_path_factory):
    """The library, from the bento's wheel."""
    (wheel,) = (packed[0] / "env/python/wheels").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder := tmp_path_factory.mktemp("wheel"))
    return folder


LOADS = """
    import importlib.metadata, json, os, re, sys
    from pathlib import Path

    bento, wheel = map(Path, sys.argv[1:])

    def plain(name): return re.sub(r"[-_.]+", "-", name).lower()

    lock = (bento / "env/python/requirements.txt").read_text()
    locked = set(map(plain, re.findall(r"^([\\w.-]+)==", lock, re.M)))
    modules = importlib.metadata.packages_distributions().items()
    foreign = {m for m, of in modules if not locked & set(map(plain, of))} - {"fraudlab", "_distutils_hack"}

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in foreign: raise ModuleNotFoundError(f"No module named {name!r} in the bento", name=name)

    sys.meta_path.insert(0, Blocked())
    sys.path[:0] = [str(wheel), str(bento / "src")]
    os.chdir(bento / "src")
    import fraudlab, service
    from fraudlab.serving.bundle import example
    from fraudlab.serving.http import payment_reader

    rollout = service.open_rollout(service.HERE)
    bundle = rollout.now.champion.bundle
    payments, _ = payment_reader(bundle)(json.dumps(example(bundle)).encode())
    print(fraudlab.__file__, rollout.score(payments)[0].score)
"""


def test_the_locked_packages_are_enough(packed, unpacked, tmp_path):
    """Score with every installed package hidden that the bento does not lock, and with the library from its wheel."""
    assert "jupyterlab" in {d.metadata["Name"] for d in metadata.distributions()}, "nothing would be hidden"
    command = [sys.executable, "-c", textwrap.dedent(LOADS), packed[0], unpacked]
    environment = ALONE | {"BENTOML_HOME": str(tmp_path), "FRAUDLAB_STATE": f"lmdb:{tmp_path}/state.lmdb"}
    environment |= {f"FRAUDLAB_{name}": f"{tmp_path}/{name}" for name in ("DATA", "KEYS")}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, score = done.stdout.split()
    assert file.startswith(str(unpacked))
    assert 0 < float(score) < 1


def test_the_bento_answers_with_its_own_bundle(packed, unpacked, tmp_path):
    """Started as its README says, with the library from its wheel."""
    bento, folder, keys = packed
    bundle, port, log = load(folder, keys.public), free_port(), tmp_path / "log"
    command = [sys.executable, "-m", "bentoml", "serve", str(bento), "--port", str(port)]
    own = {
        "PYTHONPATH": unpacked,
        "BENTOML_HOME": tmp_path / "bentoml",
        "FRAUDLAB_ROOT": tmp_path,
        "FRAUDLAB_STATE": f"lmdb:{tmp_path}/state.lmdb",
    }
    with running(command, ALONE | {k: str(v) for k, v in own.items()}, f"http://127.0.0.1:{port}", log) as address:
        body = json.dumps(example(bundle)).encode()
        request = urllib.request.Request(f"{address}/v1/score", body, {"content-type": "application/json"})
        answer = json.load(urllib.request.urlopen(request))
    assert answer["bundle"] == bundle.version
    assert "Traceback" not in log.read_text()
    assert (tmp_path / "state.lmdb").exists()
    assert not (tmp_path / "state.lmdb-open").exists(), "stopped, it closes its state"


def test_a_spoilt_bundle_is_not_packed(packed, tmp_path, monkeypatch):
    _, keys = tiny_bundle(tmp_path)
    monkeypatch.setenv("FRAUDLAB_ROOT", str(ROOT))
    card = tmp_path / "bundles/tiny/bundle.json"
    card.write_text(card.read_text().replace("0.9", "0.99"))
    with pytest.raises(Refused, match=r"bundle\.json"):
        package_bento(tmp_path / "bundles/tiny", public_key=keys.public, home=tmp_path / "bentoml")
    assert not (tmp_path / "bentoml").exists()
