"""Studies on a small world: an ablation, and a search by two workers of which one is killed midway."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> dict[str, str]:
    """Environment of a lab of its own, with two folds prepared."""
    folder = tmp_path_factory.mktemp("lab")
    variables = os.environ | {f"FRAUDLAB_{name.upper()}": str(folder / name) for name in ("runs", "data", "registry")}
    world = {"source": "handbook", "options": {"customers": 300, "terminals": 1000, "days": 60}, "protocol": {"train_start": "2018-05-07"}}
    steps = [{"flow": "prepare", "as": f"prepare_{fold}", "with": world | {"fold": fold, "features": "handbook_strict"}} for fold in (1, 0)]
    write(folder / "prepare.yaml", steps=steps)
    fraudlab(variables, "run", str(folder / "prepare.yaml"))
    return variables


def write(path: Path, **content) -> str:
    path.write_text(yaml.safe_dump({"purpose": "A test.", "expected": "It ends.", **content}))
    return str(path)


def fraudlab(lab: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(command(*arguments), cwd=ROOT, env=lab, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).parent / "fraudlab"), *arguments]


def runs(lab: dict[str, str], flow: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(Path(lab["FRAUDLAB_RUNS"]).glob(f"{flow}/[0-9]*/result.json"))]


def prepared(lab: dict[str, str]) -> list[str]:
    """Folds 1 and 0: the earlier one first."""
    found = {r["parameters"]["fold"]: f"prepare/{r['id']}" for r in runs(lab, "prepare")}
    return [found[1], found[0]]


def test_an_ablation_pairs_seeds_and_takes_finished_runs_as_they_are(lab, tmp_path):
    parameters = {
        "prepared": prepared(lab)[:1],
        "base": {"model": "boosted", "options": {"trees": 30}},
        "beside": {},
        "seeds": [0, 1],
        "draws": 20,
    }
    part = {"few_trees": {"options": {"trees": 2}}}
    file = write(tmp_path / "a.yaml", flow="ablate", parameters={**parameters, "parts": part})
    fraudlab(lab, "run", file)
    [found] = runs(lab, "ablate")
    metrics, each = found["metrics"], found["outputs"]["differences"]["few_trees"]
    assert metrics["few_trees.difference.ap"] == pytest.approx(sum(each) / 2) == pytest.approx(metrics["few_trees.ap"] - metrics["base.ap"])
    assert metrics["few_trees.difference.ap.low"] <= metrics["few_trees.difference.ap"] <= metrics["few_trees.difference.ap.high"]

    before = [r["id"] for r in runs(lab, "train")]
    assert len(before) == 2
    again = write(tmp_path / "b.yaml", flow="ablate", parameters={**parameters, "parts": part | {"same": {}}})
    fraudlab(lab, "run", again)
    assert len(runs(lab, "train")) == 3  # only the new variant, under its own name
    assert runs(lab, "ablate")[-1]["metrics"]["same.difference.ap"] == 0


def test_an_ablation_that_is_stopped_asks_its_runs_to_stop_and_goes_on(lab, tmp_path):
    decoder = {"model": "decoder", "options": {"width": 16, "layers": 1}, "recipe": {"epochs": 400, "checkpoint_every": 20}}
    file = write(
        tmp_path / "a.yaml",
        flow="ablate",
        parameters={"prepared": prepared(lab)[:1], "base": decoder, "parts": {}, "beside": {}, "seeds": [0]},
    )
    process = subprocess.Popen(command("run", file), cwd=ROOT, env=lab, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    checkpoints = Path(lab["FRAUDLAB_RUNS"]) / "train"
    wait_for(lambda: list(checkpoints.glob("*/checkpoints/seed_0/[0-9]*")) or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 75, said
    left = [p for p in psutil.Process().children(recursive=True) if p.name() != "java"]  # which is a test's of Spark
    assert not [p for p in left if "fraudlab" in " ".join(p.cmdline())]
    [folder] = {p.parents[2] for p in checkpoints.glob("*/checkpoints/seed_0/[0-9]*")}
    kept = max(int(p.name) for p in folder.glob("checkpoints/seed_0/[0-9]*"))
    assert kept > 0
    assert not (folder / "result.json").exists()


def test_two_processes_train_one_run_together(lab):
    given = ["model=decoder", f"prepared={prepared(lab)[1]}", "recipe={epochs: 1, mesh: {data: 2}}", "options={width: 16, layers: 1}"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    arguments = [text for assignment in given for text in ("-p", assignment)]
    both = [
        subprocess.Popen(
            command("run", "train", *arguments),
            cwd=ROOT,
            env=lab | {"FRAUDLAB_COORDINATOR": address, "FRAUDLAB_PROCESSES": "2", "FRAUDLAB_PROCESS": str(process)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    said = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    [found] = [r for r in runs(lab, "train") if r["parameters"]["recipe"].get("mesh")]
    [other] = Path(lab["FRAUDLAB_RUNS"]).glob("train/.process-1/[0-9]*/result.json")
    assert json.loads(other.read_text())["outputs"]["weights_sha256"] == found["outputs"]["weights_sha256"]
    assert not list(Path(lab["FRAUDLAB_RUNS"]).glob("train/.together-*"))


def wait_for(happened, seconds: float = 120):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_two_workers_share_a_study_and_a_killed_one_loses_nothing(lab, tmp_path):
    early, late = prepared(lab)
    space = {"options.trees": {"low": 5, "high": 200}, "options.learning_rate": {"low": 0.01, "high": 0.3, "log": True}}
    parameters = {
        "study": "pair",
        "prepared": [early],
        "final": [late],
        "space": space,
        "trials": 4,
        "beside": {},
        "workers": 2,
        "seeds": [0],
        "draws": 20,
    }
    file = write(tmp_path / "t.yaml", flow="tune", parameters=parameters)
    process = subprocess.Popen(command("tune", file), cwd=ROOT, env=lab, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    logs = Path(lab["FRAUDLAB_RUNS"]) / "tune"
    wait_for(lambda: [log for log in logs.glob("*/workers/0.log") if "trial" in log.read_text()] or process.poll() is not None)
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "evaluation.search import work" in " ".join(p.cmdline())]
    assert len(workers) == 2
    workers[0].send_signal(signal.SIGKILL)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    [found] = runs(lab, "tune")
    assert (found["metrics"]["trials"], found["metrics"]["complete"], found["metrics"]["workers_lost"]) == (4, 4, 1)

    trials = found["outputs"]["trials"]
    chosen = Counter(
        json.dumps(r["parameters"]["options"], sort_keys=True) for r in runs(lab, "train") if r["parameters"]["prepared"] == early
    )
    asked = [json.dumps({name.partition(".")[2]: t[name] for name in space}, sort_keys=True) for t in trials]
    assert {choice: chosen[choice] for choice in asked} == dict.fromkeys(asked, 1)  # each was run, and once
    assert {t["trial"] for t in trials} == set(range(4))
    assert "On folds that the search has not seen" in said
    assert found["metrics"]["best.ap"] > 0

    assert "0 trials ended here" in fraudlab(lab, "tune", "pair", "--join")
    refused = subprocess.run(command("tune", "pear", "--join"), cwd=ROOT, env=lab, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "Did you mean 'pair'?" in refused.stderr


def test_the_best_is_not_judged_on_what_was_searched(lab, tmp_path):
    early, late = prepared(lab)
    file = write(tmp_path / "t.yaml", flow="tune", parameters={"study": "cheat", "prepared": [late], "final": [early], "trials": 1})
    refused = subprocess.run(command("tune", file), cwd=ROOT, env=lab, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "judge on later folds" in refused.stderr
