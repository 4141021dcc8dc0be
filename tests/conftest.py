"""Settings of all tests: strict JAX, and a lab of its own for each test that asks for one."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """An empty lab: runs, data, keys and bundles go to a temporary folder; the working directory is the lab."""
    (tmp_path / "settings.ini").write_text("[lab]\nseed = 0\n")
    monkeypatch.setenv("FRAUDLAB_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def add_flow(lab):
    """Write a flow into the lab: its parameters cell, then its other cells."""

    def write(name: str, parameters: str, *cells: str):
        def cell(i, source, **metadata):
            return {"cell_type": "code", "id": f"c{i}", "metadata": metadata, "source": source, "execution_count": None, "outputs": []}

        notebook = {
            "cells": [cell(0, parameters, tags=["parameters"]), *(cell(i + 1, c) for i, c in enumerate(cells))],
            "nbformat": 4,
            "nbformat_minor": 5,
        }
        notebook["metadata"] = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
        path = lab / "nbs" / "90_flows" / f"{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(notebook))

    return write


def shared(name: str) -> Path:
    """A published file; the test is skipped where it is absent."""
    if not (SHARED / name).exists():
        pytest.skip(f"published data ../shared/data/{name} is absent")
    return SHARED / name
