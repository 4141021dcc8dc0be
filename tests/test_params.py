"""Every parameter file of the lab is one that would be accepted, and every recorded result can be read."""

import json
from pathlib import Path

import pytest

from fraudlab.core import pipelines, runner

ROOT = Path(__file__).parents[1]
FILES = [p for p in sorted((ROOT / "params").rglob("*.yaml")) if p.parent.name not in ("mappings", "policies")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_parameter_file_names_flows_and_parameters_that_exist(path):
    file = pipelines.read_parameter_file(path)
    assert file.purpose
    assert file.expected
    if file.steps:
        pipelines.check_steps(file, path)
    else:
        runner.checked(file.parameters, pipelines.declared_by(file.flow), file.flow)


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "results").glob("*.json")), ids=lambda p: p.name)
def test_a_recorded_result_is_whole_and_names_no_place_of_a_machine(path):
    text = path.read_text()
    assert {"flow", "id", "parameters", "revision", "package", "lock", "metrics"} <= json.loads(text).keys()
    assert '"/' not in text
