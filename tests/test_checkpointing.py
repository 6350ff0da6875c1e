"""Training checkpoints there and back, and what is refused."""

import jax
import numpy as np
import pytest

from music_ar.model.weights import CheckpointError
from music_ar.tokens import vocabulary
from music_ar.training.checkpointing import TrainingCheckpoints

STATE = {"a": jax.numpy.arange(5.0), "b": [jax.numpy.ones((2, 3)), jax.numpy.int32(7)]}


def raised(step):
    return jax.tree.map(lambda x: x + step, STATE)


def save_states(folder, steps, settings=None):
    with TrainingCheckpoints(folder, settings or {"rate": 1}, resume=False) as checkpoints:
        for step in steps:
            checkpoints.save(step, raised(step), {"at": step})


def test_the_newest_of_two_training_states_comes_back(tmp_path):
    save_states(tmp_path, [3, 5, 8])
    with TrainingCheckpoints(tmp_path, {"rate": 1}, resume=True) as checkpoints:
        state, position = checkpoints.restore(jax.tree.map(jax.numpy.zeros_like, STATE))
        assert checkpoints.newest == str(tmp_path / "8")
    assert position == {"at": 8}
    jax.tree.map(np.testing.assert_array_equal, state, raised(8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "8", "settings.json"]


def test_more_leaves_than_digits_sort(tmp_path):
    state = [jax.numpy.float32(number) for number in range(120)]
    with TrainingCheckpoints(tmp_path, {}, resume=False) as checkpoints:
        checkpoints.save(1, state, {})
    with TrainingCheckpoints(tmp_path, {}, resume=True) as checkpoints:
        assert checkpoints.restore(state)[0] == state


@pytest.mark.parametrize(
    ("settings", "resume", "message"),
    [
        ({"rate": 1}, False, r"already holds a run \(step 3\)"),
        ({"rate": 2}, True, "different settings: rate was 1, is 2"),
        ({"rate": 1, "model": {"width": 3}}, True, "model was None, is"),
    ],
)
def test_a_folder_of_another_run_is_refused(tmp_path, settings, resume, message):
    save_states(tmp_path, [3])
    with pytest.raises(CheckpointError, match=message):
        TrainingCheckpoints(tmp_path, settings, resume=resume)


def test_a_nested_setting_is_named(tmp_path):
    save_states(tmp_path, [3], {"model": {"width": 3, "ranges": (1,)}})
    with pytest.raises(CheckpointError, match=r"settings: model\.width was 3, is 4$"):
        TrainingCheckpoints(tmp_path, {"model": {"width": 4, "ranges": (1,)}}, resume=True)


def test_another_vocabulary_is_refused(tmp_path, monkeypatch):
    save_states(tmp_path, [3])
    monkeypatch.setattr(vocabulary, "FINGERPRINT", "another")
    with pytest.raises(CheckpointError, match=r"fingerprint was .*, is another"):
        TrainingCheckpoints(tmp_path, {"rate": 1}, resume=True)


def test_nothing_to_resume_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="nothing to resume"):
        TrainingCheckpoints(tmp_path / "run", {}, resume=True)


@pytest.mark.parametrize("text", [None, "", "{"])
def test_unreadable_settings_are_named(tmp_path, text):
    save_states(tmp_path, [3])
    path = tmp_path / "settings.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(CheckpointError) as caught:
        TrainingCheckpoints(tmp_path, {"rate": 1}, resume=True)
    assert str(path) in str(caught.value)


def test_a_damaged_training_state_is_named(tmp_path):
    save_states(tmp_path, [3])
    files = [path for path in (tmp_path / "3" / "state").rglob("*") if path.is_file()]
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with (
        TrainingCheckpoints(tmp_path, {"rate": 1}, resume=True) as checkpoints,
        pytest.raises(CheckpointError) as caught,
    ):
        checkpoints.restore(STATE)
    assert str(tmp_path / "3") in str(caught.value)
