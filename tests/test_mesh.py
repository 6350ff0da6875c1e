"""The mesh of training devices: its text, and runs that give the same losses however the devices share the work."""

import dataclasses

import jax
import numpy as np
import pytest
from four_devices import run_on_four_devices
from jax.sharding import PartitionSpec
from test_training import StoppingBatches
from tiny_training import EXACT, CountingBatches, log_of, noisy, run

from music_ar.model.config import PRESETS
from music_ar.training.config import TrainingError
from music_ar.training.mesh import batch_shards, make_mesh, parameter_spec, parse_axes, split_axis
from music_ar.training.trainer import Trainer


@pytest.mark.parametrize(
    ("text", "axes"),
    [("data=4", {"data": 4}), (" fsdp=2 , data=4", {"fsdp": 2, "data": 4}), ("sequence=8", {"sequence": 8})],
)
def test_axes_are_read(text, axes):
    assert parse_axes(text) == axes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model=2", 'has the axes data, fsdp, sequence, as in data=4,fsdp=2; got "model=2"'),
        ("", "has the axes data, fsdp, sequence"),
        ("4", "has the axes data, fsdp, sequence"),
        ("data=4,", "has the axes data, fsdp, sequence"),
        ("data=0", 'axis data needs a number of devices, as in data=2; got "data=0"'),
        ("data=-1", "axis data needs a number of devices"),
        ("fsdp", "axis fsdp needs a number of devices"),
        ("fsdp=two", "axis fsdp needs a number of devices"),
        ("data=2,data=2", "axis data must be given once"),
    ],
)
def test_other_axes_are_refused(text, message):
    with pytest.raises(TrainingError, match=message):
        parse_axes(text)


def test_without_axes_all_devices_share_the_batch():
    mesh = make_mesh()
    assert dict(mesh.shape) == {"data": jax.device_count(), "fsdp": 1, "sequence": 1}
    assert (batch_shards(mesh), split_axis(mesh)) == (jax.device_count(), None)


@pytest.mark.parametrize("axes", [{"data": 3}, {"fsdp": 2}, {"data": 1, "sequence": 4}])
def test_axes_that_do_not_fit_the_devices_are_refused(axes):
    [(name, size)] = [(name, size) for name, size in axes.items() if size > 1]
    with pytest.raises(TrainingError, match=f"the mesh {name}={size} needs {size} devices, and there are 1: change"):
        make_mesh(axes, jax.devices()[:1])


@pytest.mark.parametrize(
    ("shape", "shards", "spec"),
    [
        ((8, 6), 1, PartitionSpec()),
        ((8, 6), 2, PartitionSpec("fsdp")),
        ((8, 16), 2, PartitionSpec(None, "fsdp")),
        ((7, 4), 4, PartitionSpec(None, "fsdp")),  # the longer side cannot be split evenly
        ((7, 9), 2, PartitionSpec()),
        ((16,), 2, PartitionSpec()),
        ((), 2, PartitionSpec()),
        ((64, 8, 6), 2, PartitionSpec(None, "fsdp")),  # matrices of a stack are split like matrices
    ],
)
def test_where_parameters_are_split(shape, shards, spec):
    assert parameter_spec(shape, shards) == spec


MESHES = ["data=4", "data=2,fsdp=2", "fsdp=4", "data=2,sequence=2", "fsdp=2,sequence=2"]
CONFIG = dataclasses.replace(EXACT, log_every=1)


def train(output, text, *, stop_after=0, resume=False):
    """Trains the noisy model on a mesh, or the first steps of it, and returns the trainer."""
    StoppingBatches.left = stop_after
    batches = StoppingBatches() if stop_after else CountingBatches()
    mesh = make_mesh(parse_axes(text))
    trainer = Trainer(noisy(), CONFIG, batches, output=output, mesh=mesh, resume=resume, validate=total_weight)
    assert trainer.fit().finished == (stop_after == 0)


def total_weight(model):
    return float(sum(np.abs(np.asarray(leaf)).sum() for leaf in jax.tree.leaves(model)))


def on_four_devices(folder):
    """A run on each mesh, and the beginning of one that moves from mesh to mesh."""
    for text in MESHES:
        train(folder / text, text)
    train(folder / "moved", "data=2,fsdp=2", stop_after=2)
    train(folder / "moved", "fsdp=2,sequence=2", stop_after=2, resume=True)
    with pytest.raises(TrainingError, match="nothing is kept of it with a context of 12, 8 latents"):
        run(folder / "refused", dataclasses.replace(EXACT, prefix_keep=0.0), mesh=make_mesh({"sequence": 2}))
    with pytest.raises(TrainingError, match=r"batch_size must be a multiple of 8.* for 4 shards"):
        run(folder / "refused", dataclasses.replace(EXACT, micro_batches=2), mesh=make_mesh({"fsdp": 4}))


@pytest.mark.slow
def test_every_mesh_gives_the_losses_of_one_device_and_a_run_may_change_it(tmp_path):
    _, errors = run_on_four_devices("test_mesh", "on_four_devices", tmp_path)
    assert "rematerialization" not in errors  # XLA would copy a whole stack of matrices to each device
    train(tmp_path / "one", "data=1")
    train(tmp_path / "moved", "data=1", resume=True)
    expected = np.array(log_of(tmp_path / "one", "loss", "gradient_norm", "validation"), float)
    assert len(expected) == 6 + 1  # the last line has what validation found
    for name in (*MESHES, "moved"):
        found = np.array(log_of(tmp_path / name, "loss", "gradient_norm", "validation"), float)
        np.testing.assert_allclose(found, expected, rtol=1e-4, err_msg=name)


def test_the_large_preset_has_about_400_million_parameters_that_eight_devices_can_share():
    from flax import nnx

    from music_ar.model.perceiver_ar import PerceiverAR

    shapes = jax.tree.leaves(nnx.eval_shape(lambda: nnx.state(PerceiverAR(PRESETS["large"], rngs=nnx.Rngs(0)))))
    sizes = [(leaf.size, bool(parameter_spec(leaf.shape, 8))) for leaf in shapes]
    total = sum(size for size, _ in sizes)
    assert 380e6 < total < 420e6
    assert sum(size for size, split in sizes if not split) < 0.01 * total
