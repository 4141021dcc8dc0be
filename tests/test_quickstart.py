"""The main job, end to end with the real parts: `fraudlab run` on a small world, then again, then on one file that was changed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> dict[str, str]:
    """Environment of a lab whose runs, data, bundles and keys lie in a temporary folder."""
    folder = tmp_path_factory.mktemp("lab")
    return os.environ | {f"FRAUDLAB_{name.upper()}": str(folder / name) for name in ("runs", "data", "registry", "bundles", "keys")}


def fraudlab(lab: dict[str, str], *arguments: str) -> str:
    done = subprocess.run([Path(sys.executable).parent / "fraudlab", *arguments], cwd=ROOT, env=lab, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def results(lab: dict[str, str]) -> dict[str, dict]:
    found = (json.loads(p.read_text()) for p in sorted(Path(lab["FRAUDLAB_RUNS"]).glob("*/[0-9]*/result.json")))
    return {f"{r['flow']} {r['outputs'].get('model', '')}".strip(): r for r in found}


SMALL = ("-p", "customers=400", "-p", "terminals=2000", "-p", "draws=20", "-p", "epochs=1")


@pytest.fixture(scope="module")
def first(lab) -> str:
    return fraudlab(lab, "run", "params/pipelines/quickstart.yaml", *SMALL)


def test_it_ends_with_a_table_the_notebooks_and_the_line_that_scores(lab, first):
    for text in (
        "logistic",
        "forest",
        "boosted",
        "decoder",
        "Card precision@100",
        "evaluate.ipynb",
        "curl -s http://127.0.0.1:3000/v1/score",
    ):
        assert text in first, first


def test_the_names_that_others_read_are_there(lab, first):
    found = results(lab)
    assert {"rows", "quarantined", "train_rows", "test_rows"} <= found["prepare"]["metrics"].keys()
    expected = {
        f"{model}.{metric}{end}"
        for model in ("logistic", "forest", "boosted", "decoder")
        for metric in ("auc", "ap", "cp100", "ece")
        for end in ("", ".low", ".high")
    }
    assert expected <= found["evaluate"]["metrics"].keys()
    assert {"flow", "id", "inputs", "parameters", "seed", "revision", "package", "lock", "data", "timings", "metrics"} <= found[
        "train decoder"
    ].keys()


def test_scores_over_http_are_the_offline_scores(lab, first):
    assert results(lab)["serve"]["metrics"]["parity_max_difference"] <= 1e-5


def test_what_is_finished_is_not_run_again(lab, first):
    before = {name: r["id"] for name, r in results(lab).items()}
    fraudlab(lab, "run", "params/pipelines/quickstart.yaml", *SMALL)
    assert {name: r["id"] for name, r in results(lab).items()} == before


def test_no_path_of_this_machine_is_in_a_result(lab, first):
    """Results are copied to docs/results: paths in them are relative to the lab."""
    for name, result in results(lab).items():
        outputs = json.dumps(result["outputs"]).replace(lab["FRAUDLAB_RUNS"], "").replace(lab["FRAUDLAB_BUNDLES"], "")
        assert not re.search(rf"{re.escape(str(ROOT))}|/(home|root)/", outputs), name


def started_until(lab: dict[str, str], command: list, step: int) -> tuple[subprocess.Popen, Path]:
    """A training run that has just kept its state of `step` or a later one, and its folder."""
    process = subprocess.Popen(command, cwd=ROOT, env=lab, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    runs, deadline = Path(lab["FRAUDLAB_RUNS"]) / "train", time.monotonic() + 90
    kept = lambda: [p for p in runs.glob("*/checkpoints/[0-9]*") if p.name.isdigit() and int(p.name) >= step]  # noqa: E731
    while not (found := kept()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return process, found[0].parents[1]


def test_a_training_run_that_is_killed_or_asked_to_stop_goes_on_to_the_same_weights(lab, first):
    """SIGKILL to the command and its kernel in the middle of training; SIGTERM to the command; then left alone."""
    command = [Path(sys.executable).parent / "fraudlab", "run", "train", "-p", "model=decoder"]
    command += ["-p", "recipe={epochs: 8, checkpoint_every: 20, tokens: 512}", "-p", "options={width: 16, layers: 1, window: 8}"]
    process, folder = started_until(lab, command, 40)
    for child in [*psutil.Process(process.pid).children(recursive=True), process]:
        child.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "result.json").exists(), "killed too late: it had finished"

    process, same = started_until(lab, command, 100)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert same == folder
    assert process.returncode == os.EX_TEMPFAIL, said
    assert "asked to stop (SIGTERM)" in said
    assert "and the same call goes on from it" in " ".join(said.split())
    assert not (folder / "result.json").exists(), "asked too late: it had finished"

    again = subprocess.run(command, cwd=ROOT, env=lab, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    resumed = json.loads((folder / "result.json").read_text())["outputs"]["weights_sha256"]
    subprocess.run([*command, "--fresh"], cwd=ROOT, env=lab, check=True, stdout=subprocess.DEVNULL)
    alone = json.loads((folder.parent / "latest" / "result.json").read_text())
    assert alone["id"] != folder.name
    assert alone["outputs"]["weights_sha256"] == resumed
    print(f"killed and resumed {resumed[:16]}, left alone {alone['outputs']['weights_sha256'][:16]}")


def test_ring_features_are_prepared_and_learned_from_and_not_packaged(lab, first):
    """The service keeps no lists of who paid whom: to score by such a model it would have to make its features up."""
    given = ("source=handbook", "options={customers: 400, terminals: 2000}", "rings=[1d, 7d]")
    fraudlab(lab, "run", "prepare", *(word for text in given for word in ("-p", text)))
    fraudlab(lab, "run", "train", "-p", "model=logistic")
    done = subprocess.run([Path(sys.executable).parent / "fraudlab", "run", "package"], cwd=ROOT, env=lab, capture_output=True, text=True)
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 1
    assert "was trained with ring features of 1d, 7d, which the service does not keep yet" in said, said


def test_list_and_doctor_know_what_there_is(lab):
    listed = fraudlab(lab, "list")
    for name in ("mapped", "ulb", "handbook_strict", "logistic", "forest", "boosted", "decoder", "fraud", "prepare", "audit", "serve"):
        assert name in listed
    assert "papermill" in fraudlab(lab, "doctor")


def test_help_is_quick_because_heavy_modules_come_late():
    heavy = ("jax", "polars", "flax", "mlflow", "papermill", "bentoml", "numpy")
    code = f"import sys, fraudlab.cli; print(*[m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
