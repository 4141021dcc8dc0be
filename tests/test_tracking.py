"""Tracking with a real MLflow: a file, its page over HTTP, and a server."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests

from fraudlab.core import tracking

# MLflow 3.17 on SQLAlchemy 2.1
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


def track_training(**options):
    """A run with all there is to track; the model's folder is made in the working directory."""
    model = Path("model folder")
    model.mkdir(exist_ok=True)
    (model / "model.json").write_text('{"model": "logistic"}')
    with tracking.start("train", "logistic on handbook", {"model": "logistic", "recipe": {"learning_rate": 3e-3}}, **options) as run:
        run.data_version("payments", 3)
        run.tags(purpose="test")
        for step in range(1, 6):
            run.log(step, {"loss": 1 / step, "rate": 0.1})
        run.artifact(model / "model.json", "notes")
        version = run.register_model("logistic", model, alias="candidate")
    return run.id, version


def check_tracked(run_id: str, version: int, address: str = ""):
    """What `track_training` tracked is there."""
    mlflow = tracking.client(address)
    run = mlflow.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"model": "logistic", "recipe.learning_rate": "0.003"}
    assert run.data.tags["purpose"] == "test"
    assert [(m.step, m.value) for m in mlflow.get_metric_history(run_id, "loss")] == [(s, 1 / s) for s in range(1, 6)]
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, json.loads(data.dataset.source)) == ("payments", {"table": "payments", "version": 3})
    registered = mlflow.get_model_version_by_alias("logistic", "candidate")
    assert (int(registered.version), registered.run_id) == (version, run_id)
    (kept,) = mlflow.list_artifacts(run_id, registered.source.split(f"{run_id}/artifacts/")[1])
    assert kept.path.endswith("model.json")
    assert json.loads(Path(mlflow.download_artifacts(run_id, "notes/model.json")).read_text()) == {"model": "logistic"}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """`mlflow ui` on a lab's file; gives the lab's folder and the page's address."""
    folder, port = tmp_path_factory.mktemp("a lab"), free_port()
    (folder / "settings.ini").touch()
    (folder / "registry").mkdir()
    command = tracking.ui_command(port, f"sqlite:///{folder}/registry/mlflow.db")
    with (folder / "page.log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(900):
            try:
                if requests.get(f"{address}/health", timeout=5).ok:
                    break
            except requests.RequestException:
                assert server.poll() is None, (folder / "page.log").read_text()
                time.sleep(0.1)
        yield folder, address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def test_a_file_needs_nothing(lab):
    """Default address: everything lies in the lab's registry folder, which may have a space in its name."""
    first, version = track_training()
    check_tracked(first, version)
    second, version = track_training()
    assert version == 2
    check_tracked(second, version)
    kept = [p for p in (lab / "registry").rglob("model.json") if "models" in p.parts]
    assert len(kept) == 2, "a later version must not overwrite the files of an earlier one"
    assert {p.name for p in lab.iterdir()} == {"settings.ini", "registry", "model folder"}


def test_the_page_shows_curves(page, monkeypatch):
    folder, address = page
    monkeypatch.setenv("FRAUDLAB_ROOT", str(folder))
    monkeypatch.chdir(folder)
    run_id, _ = track_training()

    def get(route, **params):
        return requests.get(f"{address}/{route}", params=params, timeout=30)

    history = get("api/2.0/mlflow/metrics/get-history", run_id=run_id, metric_key="loss").json()["metrics"]
    assert [(m["step"], m["value"]) for m in history] == [(s, 1 / s) for s in range(1, 6)]
    assert get("get-artifact", run_id=run_id, path="notes/model.json").json() == {"model": "logistic"}
    assert "<title>MLflow</title>" in get("").text


def test_a_server_takes_all(page, tmp_path, monkeypatch):
    _, address = page
    monkeypatch.setenv("FRAUDLAB_ROOT", str(tmp_path))
    monkeypatch.setenv("FRAUDLAB_TRACKING", address)
    monkeypatch.chdir(tmp_path)
    run_id, version = track_training()
    check_tracked(run_id, version)
    assert {p.name for p in tmp_path.iterdir()} == {"model folder"}, "with a server nothing is kept here"
    with pytest.raises(ValueError, match="is a tracking server: open it"):
        tracking.ui_command()


def test_a_flow_that_was_killed_goes_on_with_its_run(lab, monkeypatch):
    """Same run folder and name: same tracked run. The points it had are not there twice, the file's status is right at each time."""
    monkeypatch.setenv("FRAUDLAB_RUN", str(lab / "runs" / "train" / "20240301-abc"))
    mlflow, status = tracking.client(), lambda run: mlflow.get_run(run.id).info.status
    with contextlib.suppress(KeyboardInterrupt), tracking.start("train", "decoder", {"model": "decoder"}) as killed:
        assert status(killed) == "RUNNING"
        killed.log(10, {"loss": 0.5})
        raise KeyboardInterrupt
    assert status(killed) == "KILLED"
    mlflow.update_run(killed.id, status="RUNNING")  # what SIGKILL leaves behind
    with tracking.start("train", "boosted", {}) as other:
        assert other.id != killed.id
    with tracking.start("train", "decoder", {"model": "decoder"}) as resumed:
        assert resumed.id == killed.id
        for step in (10, 20):
            resumed.log(step, {"loss": 5 / step, "late": 1.0})
    assert status(resumed) == "FINISHED"
    assert [m.step for m in mlflow.get_metric_history(resumed.id, "loss")] == [10, 20]
    assert [m.step for m in mlflow.get_metric_history(resumed.id, "late")] == [10, 20]
    with tracking.start("train", "decoder", {"model": "decoder"}) as fresh:
        assert fresh.id != killed.id, "a finished run is not taken up again by itself"


def test_other_parameters_are_another_run(lab):
    with pytest.raises(RuntimeError, match="oom"), tracking.start("train", "decoder", {"seed": 0}) as run:
        raise RuntimeError("oom")
    with (
        pytest.raises(ValueError, match=rf"{run.id} has seed = 0, now given 1"),
        tracking.start("train", "decoder", {"seed": 1}, run_id=run.id),
    ):
        pytest.fail("must not start")
    assert tracking.client().get_run(run.id).info.status == "FAILED"


@pytest.mark.parametrize(
    ("address", "message"), [("mlruns", "must be sqlite:///"), ("http://127.0.0.1:9", "no tracking server answers at http://127.0.0.1:9")]
)
def test_bad_addresses(lab, address, message):
    with pytest.raises(ValueError, match=message):
        tracking.client(address)


def test_a_relative_file_is_relative_to_the_lab(lab, monkeypatch):
    (lab / "deep").mkdir()
    monkeypatch.chdir(lab / "deep")
    assert tracking.address_in_full("sqlite:///kept/mlflow.db") == f"sqlite:///{lab}/kept/mlflow.db"


def test_silent_and_alone(tmp_path):
    """A first run in a new lab prints nothing, calls nobody, and works where there is no git."""
    program = (
        "import sys\n"
        "calls = ('socket.connect', 'socket.getaddrinfo')\n"
        "sys.addaudithook(lambda event, args: event in calls and sys.stderr.write(f'network: {args}\\n'))\n"
        "from fraudlab.core import tracking\n"
        "assert 'mlflow' not in sys.modules, 'late import'\n"
        "with tracking.start('train', 'x', {'a': 1}) as run: run.log(1, {'loss': 1.0})\n"
    )
    quiet = {k: v for k, v in os.environ.items() if not k.startswith(("CI", "PYTEST", "MLFLOW", "GITHUB", "GIT_"))}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=quiet | {"FRAUDLAB_ROOT": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_processes_that_open_a_new_file_at_once_do_not_meet(tmp_path):
    code = "from fraudlab.core import tracking\nwith tracking.start('flow', 'run', {}) as tracked: tracked.log(0, {'loss': 1.0})"
    lab = os.environ | {"FRAUDLAB_TRACKING": f"sqlite:///{tmp_path}/new.db", "FRAUDLAB_REGISTRY": str(tmp_path)}
    started = [subprocess.Popen([sys.executable, "-c", code], env=lab, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said
