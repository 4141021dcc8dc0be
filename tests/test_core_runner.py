"""The strict runner and pipelines, with real kernels in a temporary lab."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from fraudlab.core import pipelines, runner, runs

FINISH = "from fraudlab.core.runs import finish\nfinish({'twice': 2.0 * x}, {'x': x})"


@pytest.mark.parametrize(
    ("given", "message"),
    [({"y": 1}, "'y' is no parameter of flow 'double'"), ({"x": "3"}, "must be int, such as 1"), ({"x": True}, "must be int")],
)
def test_what_is_not_declared_is_refused_before_a_kernel_starts(lab, add_flow, given, message):
    add_flow("double", "x: int = 1", FINISH)
    with pytest.raises(ValueError, match=message):
        runner.run_flow("double", given)
    assert not (lab / "runs").exists()


def test_a_run_records_what_it_was_made_from_and_is_not_run_again(lab, add_flow):
    add_flow("double", "x: int = 1\nname: str = ''", FINISH)
    (lab / "data.csv").write_text("a\n")
    first = runner.run_flow("double", {"x": 3, "name": "data.csv"}, note={"purpose": "to see"})
    assert first.metrics == {"twice": 6.0}
    assert first.outputs == {"x": 3}
    assert {
        "parameters",
        "revision",
        "package",
        "lock",
        "data",
        "versions",
        "timings",
        "started",
        "finished",
        "purpose",
    } <= first.result.keys()
    assert first.result["data"] == {"data.csv": runs.file_hash(lab / "data.csv")}
    assert (lab / "runs" / "double" / "latest").resolve() == first.folder
    assert yaml.safe_load((first.folder / "params.yaml").read_text())["parameters"]["x"] == 3
    assert (first.folder / "double.ipynb").exists()
    assert runner.run_flow("double", {"x": 3, "name": "data.csv"}).id == first.id
    (lab / "data.csv").write_text("b\n")
    assert runner.run_flow("double", {"x": 3, "name": "data.csv"}).id != first.id


def test_latest_means_the_run_that_is_latest_now(lab, add_flow):
    add_flow("double", "x: int = 1", FINISH)
    add_flow(
        "after",
        "of: str = 'double/latest'",
        "from fraudlab.core.runs import finish, read_run\nfinish({'twice': read_run(of).metrics['twice']})",
    )
    runner.run_flow("double", {"x": 1})
    first = runner.run_flow("after")
    runner.run_flow("double", {"x": 2})
    assert (first.metrics["twice"], runner.run_flow("after").metrics["twice"]) == (2.0, 4.0)


def test_a_failing_cell_shows_its_own_error_and_the_notebook(lab, add_flow):
    add_flow("broken", "x: int = 1", "1 / (x - 1)", FINISH)
    with pytest.raises(runner.FlowError, match=r"(?s)ZeroDivisionError: division by zero.*executed notebook: runs/broken/.*/broken.ipynb"):
        runner.run_flow("broken")
    assert not list((lab / "runs" / "broken").glob("*/result.json"))


def test_a_flow_without_finish_is_no_result(lab, add_flow):
    add_flow("endless", "x: int = 1", "x + 1")
    with pytest.raises(runner.FlowError, match="ended without `finish"):
        runner.run_flow("endless")


def test_a_killed_kernel_ends_the_run_and_the_next_run_takes_the_folder_up(lab, add_flow):
    once = "import os, signal, pathlib\nonce = pathlib.Path('once')\nif not once.exists():\n"
    kill = once + "    once.touch()\n    os.kill(os.getpid(), signal.SIGKILL)"
    add_flow("killed", "x: int = 1", kill, FINISH)
    with pytest.raises(runner.FlowError, match="its kernel died"):
        runner.run_flow("killed")
    (unfinished,) = (lab / "runs" / "killed").glob("[0-9]*")
    assert runner.run_flow("killed").folder == unfinished


def test_a_killed_runner_leaves_no_kernel_behind(lab, add_flow):
    add_flow("slow", "x: int = 1", "import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(60)", FINISH)
    process = subprocess.Popen([sys.executable, "-c", "from fraudlab.core.runner import run_flow; run_flow('slow')"])
    deadline = time.monotonic() + 60
    while not ((lab / "pid").exists() and (lab / "pid").read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    kernel = int((lab / "pid").read_text())
    process.send_signal(signal.SIGKILL)
    process.wait()
    while alive(kernel) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not alive(kernel)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_pipeline_feeds_outputs_forward_and_repeats_only_what_changed(lab, add_flow):
    add_flow("double", "x: int = 1", FINISH)
    add_flow("add", "x: int = 1\ny: int = 1\nfolder: str = ''", "from fraudlab.core.runs import finish\nfinish({'sum': x + y})")
    (lab / "both.yaml").write_text("""
purpose: to see values flow
expected: 2 times 5 is not asked, 5 + 1 is
parameters: {start: 2}
steps:
  - {flow: double, with: {x: "{start}"}}
  - {flow: add, as: sum, with: {x: "{double.outputs.x}", y: 1, folder: "{double.folder}"}}
""")
    first = pipelines.run_steps("both.yaml", ["start=5"])
    assert first["sum"].metrics == {"sum": 6}
    assert first["sum"].result["parameters"]["folder"].startswith("runs/double/")
    assert first["sum"].result["purpose"] == "to see values flow"
    again = pipelines.run_steps("both.yaml", ["start=5"])
    assert {name: run.id for name, run in again.items()} == {name: run.id for name, run in first.items()}
    assert pipelines.run_steps("both.yaml", ["start=6"])["sum"].metrics == {"sum": 7}


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"flow": "dubble"}], "Did you mean 'double'"),
        ([{"flow": "double", "with": {"z": 1}}], "'z' is no parameter of flow 'double'"),
        (
            [{"flow": "double", "with": {"x": "{later.outputs.x}"}}, {"flow": "double", "as": "later"}],
            "'later' is no parameter or earlier step",
        ),
        ([{"flow": "double"}, {"flow": "double"}], "two steps are called 'double'"),
        ([{"flow": "double"}, {"flow": "double", "as": "b", "with": {"x": "{double.foldr}"}}], "Did you mean 'folder'"),
        ([{"flow": "double", "width": {}}], "unknown field `width`"),
    ],
)
def test_a_wrong_pipeline_is_refused_before_its_first_step(lab, add_flow, steps, message):
    add_flow("double", "x: int = 1", FINISH)
    (lab / "wrong.yaml").write_text(json.dumps({"purpose": "p", "expected": "e", "steps": steps}))
    with pytest.raises(ValueError, match=message):
        pipelines.run_steps("wrong.yaml")
    assert not (lab / "runs").exists()


REPEATED = """
purpose: to see steps that are repeated
expected: four sums, in order, and all of them together
parameters: {starts: [1, 2], sizes: [{name: small, y: 10}, {name: large, y: 100}]}
steps:
  - each: {start: "{starts}"}
    steps:
      - {flow: double, as: "double_{start}", with: {x: "{start}"}}
      - {each: {size: "{sizes}"}, flow: add, as: "add_{size.name}_{start}", with: {x: "{double_{start}.outputs.x}", y: "{size.y}"}}
  - {flow: total, with: {of: ["{add_*.folder}"]}}
"""


@pytest.fixture
def summing(add_flow):
    add_flow("double", "x: int = 1", FINISH)
    add_flow("add", "x: int = 1\ny: int = 1", "from fraudlab.core.runs import finish\nfinish({'sum': x + y})")
    total = (
        "from fraudlab.core.runs import finish, read_run\nfinish({'total': sum(read_run(r).metrics['sum'] for r in of)}, {'of': len(of)})"
    )
    add_flow("total", "of: list = []", total)


def test_steps_are_repeated_over_lists_and_collected(lab, summing):
    (lab / "each.yaml").write_text(REPEATED)
    names = [step.name for step in pipelines.read_parameter_file("each.yaml").steps]
    assert names == ["double_1", "add_small_1", "add_large_1", "double_2", "add_small_2", "add_large_2", "total"]
    found = pipelines.run_steps("each.yaml", ["starts=[2]"])
    assert {name: run.metrics for name, run in found.items()} == {
        "double_2": {"twice": 4.0},
        "add_small_2": {"sum": 12},
        "add_large_2": {"sum": 102},
        "total": {"total": 114},
    }
    assert found["total"].result["parameters"]["of"] == [f"runs/add/{found[name].id}" for name in ("add_small_2", "add_large_2")]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"flow": "double", "each": {"x": [1, 2]}}], "two steps are called 'double'"),
        ([{"flow": "double", "each": {"x": []}}], "repeated over 'x', which is \\[\\]: give a list"),
        ([{"flow": "double", "each": {"x": "{lists}"}}], "refers to 'lists'.*There are: start"),
        ([{"flow": "double", "each": {"x": "{start}"}}], "repeated over 'x', which is 3: give a list"),
        ([{"flow": "double", "each": {"start": [1]}}], "'start' is a parameter, and a step is repeated over it"),
        ([{"flow": "double", "as": "d_{x}", "each": {"x": [0.5]}}], "step 'd_0.5': a name has letters, digits and _ only"),
        ([{"flow": "double", "as": "d_{x.name}", "each": {"x": [1]}}], "x is 1, not a table"),
        ([{"flow": "double", "as": "d_{x.nam}", "each": {"x": [{"name": "a"}]}}], "Did you mean 'name'"),
        ([{"flow": "double", "steps": [{"flow": "double"}]}], "either flow, as and with, or steps"),
        ([{"as": "double"}], "either flow, as and with, or steps"),
        ([{"flow": "double"}, {"flow": "total", "with": {"of": ["{add_*.folder}"]}}], "'add_\\*' fits no earlier step. There are: double"),
        ([{"flow": "double"}, {"flow": "total", "with": {"of": ["{d*.foldr}"]}}], "Did you mean 'folder'"),
        ([{"flow": "double", "each": {"x": [1]}, "with": {"x": "{y_{x}}"}}], "'y_1' is no parameter or earlier step"),
        ([{"flow": "double", "with": {"x": "{double_{x}.outputs.x}"}}], "must be one that the step is repeated over"),
    ],
)
def test_a_wrong_repetition_is_refused_before_the_first_step(lab, summing, steps, message):
    (lab / "wrong.yaml").write_text(json.dumps({"purpose": "p", "expected": "e", "parameters": {"start": 3}, "steps": steps}))
    with pytest.raises(ValueError, match=message):
        pipelines.run_steps("wrong.yaml")
    assert not (lab / "runs").exists()


def test_a_value_of_another_type_than_the_pipelines_parameter_is_refused(lab, add_flow):
    add_flow("double", "x: int = 1", FINISH)
    (lab / "p.yaml").write_text("{purpose: p, expected: e, parameters: {x: 1}, steps: [{flow: double, with: {x: '{x}'}}]}")
    with pytest.raises(ValueError, match=r"Parameter 'x' of p.yaml is 'many', str: it must be int"):
        pipelines.run_steps("p.yaml", ["x=many"])
    assert not (lab / "runs").exists()


def test_of_two_runs_of_the_same_inputs_one_runs_and_the_other_waits_for_it(lab, add_flow):
    add_flow("slow", "x: int = 1", "import pathlib, time\npathlib.Path('started').touch()\ntime.sleep(3)", FINISH)
    process = subprocess.Popen([sys.executable, "-c", "from fraudlab.core.runner import run_flow; run_flow('slow')"])
    while not (lab / "started").exists() and process.poll() is None:
        time.sleep(0.05)
    assert runner.finished("slow") is None
    said = []
    waited = runner.run_flow("slow", progress=lambda done, text: said.append(text))
    assert process.wait() == 0
    assert said == ["waiting for a run of the same inputs"]
    assert runner.finished("slow") == waited
    assert len(list((lab / "runs" / "slow").glob("[0-9]*"))) == 1


def test_a_run_whose_output_is_gone_is_run_again(lab, add_flow):
    add_flow(
        "make",
        "x: int = 1",
        "import pathlib\npathlib.Path('made').touch()\nfrom fraudlab.core.runs import finish\nfinish({}, {'made': ['made']})",
    )
    first = runner.run_flow("make")
    assert runner.run_flow("make").id == first.id
    (lab / "made").unlink()
    assert runner.run_flow("make").id != first.id


def test_every_flow_of_the_lab_declares_its_parameters():
    """nbdev-clean removes tags unless told to keep them, and papermill then runs with the defaults."""
    assert {"prepare", "train", "evaluate", "package", "serve"} <= set(runner.flows())
    for flow in runner.flows():
        assert pipelines.declared_by(flow), flow
