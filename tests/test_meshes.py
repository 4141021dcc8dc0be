"""Training on meshes of devices: the same losses, other places for the numbers."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from fraudlab.core.errors import from_options
from fraudlab.evaluation.meshes import Trial, run, run_apart
from fraudlab.features.sequences import alone
from fraudlab.models.contract import example
from fraudlab.models.zoo.decoder import Decoder
from fraudlab.training.loop import fit
from fraudlab.training.mesh import Axes, rows_here, spec
from fraudlab.training.objectives.fraud import Fraud
from fraudlab.training.recipe import Recipe

RECIPE = {"epochs": 2, "tokens": 512, "room": 32, "optimizer": "muon", "accumulate": 2, "recompute": "blocks", "checkpoint_every": 3}


def trial(checkpoints: str = "", stop: int = 0, **axes) -> Trial:
    return Trial("decoder", {"width": 32, "layers": 1}, {**RECIPE, "mesh": axes}, 1500, 0, str(checkpoints), stop)


@pytest.fixture(scope="module")
def one_device():
    return run(trial())


def test_losses_are_those_of_one_device(one_device):
    found = run_apart(trial(data=2, fsdp=2, tensor=2), 8)
    assert len(found.losses) == len(one_device.losses) >= 10
    np.testing.assert_allclose(found.losses, one_device.losses, atol=1e-5)
    assert found.compilations == 0
    assert found.share < 0.5 < one_device.share == 1


def test_two_processes_keep_checkpoints_that_one_goes_on_from(one_device, tmp_path):
    together = run_apart(trial(tmp_path / "kept", stop=7, fsdp=4), 4, processes=2)
    alone = run(trial(tmp_path / "kept"))
    assert len(together.losses) == 7
    assert len(together.losses) + len(alone.losses) == len(one_device.losses) + 1  # the last one that was kept is that of step 6
    np.testing.assert_allclose(together.losses[:6] + alone.losses, one_device.losses, atol=1e-5)


def test_every_matrix_of_a_transformers_blocks_is_cut_both_ways():
    world, _ = example()
    model = Decoder(world.columns, width=64)
    weights, names = model.init(alone(world.rows), 0), model.directions()
    matrices = [key for key, value in weights.items() if key.startswith("blocks.") and value.ndim == 2]
    assert len(matrices) == 2 * 7
    for key in matrices:
        assert sorted(filter(None, spec(names[key], weights[key].shape, Axes(fsdp=2, tensor=2)))) == ["fsdp", "tensor"]


@pytest.mark.parametrize(
    ("names", "shape", "expected"),
    [
        (("width", "heads"), (8, 8), ("fsdp", "tensor")),
        (("width", "heads"), (7, 8), (None, "tensor")),
        (("width", None), (8, 3), ("fsdp",)),
        (("width", "heads"), (8, 9), ("fsdp",)),
        ((), (8, 8), ()),
    ],
)
def test_what_cannot_be_cut_evenly_is_copied(names, shape, expected):
    assert spec(names, shape, Axes(data=2, fsdp=2, tensor=2)) == PartitionSpec(*expected)


def test_a_mesh_that_does_not_fit_is_refused():
    world, fraud = example(300)
    train = lambda recipe: fit(Decoder(world.columns), world, np.arange(300), fraud, Fraud(), recipe)  # noqa: E731
    with pytest.raises(ValueError, match=rf"needs 1000 devices, and there are {jax.device_count()}"):
        train(Recipe(mesh=Axes(data=1000), tokens=64_000))
    with pytest.raises(ValueError, match="A batch of 15 rows cannot be cut into 2"):
        rows_here(Axes(data=2), 15)
    with pytest.raises(ValueError, match=r"'dta' is no option of mesh of the recipe\. Did you mean 'data'"):
        from_options(Recipe, {"mesh": {"dta": 2}}, "the recipe")
    with pytest.raises(ValueError, match="tensor = 0: give 1 or more devices"):
        Axes(tensor=0)
