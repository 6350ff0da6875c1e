"""Released models there and back, and what is refused, by the name of the file."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import noisy_model
from flax import nnx

from music_ar.model import pretrained
from music_ar.model.config import PRESETS
from music_ar.model.perceiver_ar import parameter_count
from music_ar.model.pretrained import CheckpointError, load_released, save_released
from music_ar.tokens import codec, vocabulary
from music_ar.training.checkpointing import TrainingCheckpoints

CONFIG = dataclasses.replace(PRESETS["tiny"], width=16, layers=1, cross_depths=(0,), hidden=24)


@pytest.fixture(scope="module")
def model():
    return noisy_model(CONFIG)


@pytest.fixture
def folder(model, tmp_path):
    """A released model, to damage."""
    save_released(model, tmp_path / "released")
    return tmp_path / "released"


def parameters(model):
    return {
        ".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, edit):
    """Replaces the weights by what `edit` makes of their dict, and lets the configuration agree to it."""
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    edit(tensors)
    safetensors.numpy.save_file(tensors, path)
    edit_config(folder, weights_sha256=None)


def refusal(folder):
    with pytest.raises(CheckpointError) as caught:
        load_released(folder)
    return str(caught.value)


def test_float32_comes_back_to_the_bit(model, tmp_path):
    save_released(model, tmp_path / "new" / "model", int8=False)
    loaded = load_released(str(tmp_path / "new" / "model"))
    assert loaded.config == CONFIG
    before, after = parameters(model), parameters(loaded)
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


def test_int8_is_within_half_a_step_of_its_column(model, folder):
    before, after = parameters(model), parameters(load_released(folder))
    for name, array in before.items():
        if array.ndim == 2:
            half_step = np.abs(array).max(axis=0) / 127 / 2
            assert (np.abs(after[name] - array) <= half_step * 1.001).all(), name
            assert (after[name] != array).any()
        else:
            np.testing.assert_array_equal(after[name], array)


def test_int8_takes_a_byte_a_parameter(model, folder):
    matrices = sum(array.size for array in parameters(model).values() if array.ndim == 2)
    rest = sum(array.size for array in parameters(model).values() if array.ndim != 2)
    size = (folder / "model.safetensors").stat().st_size
    assert matrices + 4 * rest < size < 1.5 * (matrices + 4 * rest)


def test_saving_what_was_loaded_changes_nothing(model, folder, tmp_path):
    loaded = load_released(folder)
    save_released(loaded, tmp_path / "again")
    again = parameters(load_released(tmp_path / "again"))
    for name, array in parameters(loaded).items():
        np.testing.assert_allclose(again[name], array, rtol=1e-6)


def test_a_column_of_zeros_stays_zero():
    array = np.array([[0.0, 1.0], [0.0, -0.5]], np.float32)
    stored, scale = pretrained.quantize(array)
    np.testing.assert_array_equal(stored, [[0, 127], [0, -64]])
    np.testing.assert_allclose(pretrained.dequantize(stored, scale), [[0, 1], [0, -64 / 127]], rtol=1e-6)


def test_a_loaded_model_computes(model, folder):
    tokens = jax.numpy.arange(CONFIG.context)[None]
    logits = jax.jit(lambda model: model(tokens))
    difference = np.abs(logits(model) - logits(load_released(folder)))
    assert 0 < difference.max() < 0.1 * np.abs(logits(model)).max()


def test_shipped_models_are_found_by_name(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained, "SHIPPED_FOLDERS", (tmp_path / "nowhere", tmp_path))
    monkeypatch.setattr(pretrained, "DEFAULT_RELEASE", "released")
    assert load_released("released").config == CONFIG
    assert load_released().config == CONFIG
    monkeypatch.setattr(pretrained, "SHIPPED_FOLDERS", (tmp_path / "nowhere",))
    with pytest.raises(CheckpointError, match=r"released that ships with the project is missing.*nowhere"):
        load_released()


@pytest.mark.skipif(
    not any((folder / pretrained.DEFAULT_RELEASE).is_dir() for folder in pretrained.SHIPPED_FOLDERS),
    reason="no model ships yet",
)
def test_the_model_that_ships_loads_and_is_the_one_whose_figures_lie_beside_it():
    model, figures = load_released(), json.loads(pretrained.read_beside(None, "metrics.json"))
    assert parameter_count(model) == figures["parameters"]
    assert (model.config.window, model.config.latents) == (
        figures["scored_with"]["context"],
        figures["scored_with"]["latents"],
    )


@pytest.mark.parametrize("name", ["no-such-model", "./no/such", "/no/such", "a/b/c"])
def test_a_name_that_is_nothing_is_refused_without_asking_the_hub(name, monkeypatch):
    monkeypatch.setattr(pretrained, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    assert name in refusal(name)


def test_a_hub_that_fails_is_reported(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(pretrained, "snapshot_download", fail)
    assert "some/model" in refusal("some/model")
    assert "no route" in refusal("some/model")


def test_a_hub_repository_is_loaded(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(pretrained, "snapshot_download", lambda name, **_: asked.append(name) or str(folder))
    assert load_released("some/model").config == CONFIG
    assert asked == ["some/model"]


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, missing):
    (folder / missing).unlink()
    message = refusal(folder)
    assert str(folder) in message
    assert missing in message


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_truncated_weights_are_refused(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert str(path) in refusal(folder)
    edit_config(folder, weights_sha256=None)
    assert f"{path} is damaged" in refusal(folder)


def test_edited_weights_are_refused(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert f"{path} is not the file that config.json was written with" in refusal(folder)


def test_new_weights_beside_an_old_configuration_are_refused(folder, monkeypatch):
    """What a save that was killed between its two files leaves."""
    replace = pretrained.write_atomically

    def killed(path, data):
        if path.name == "config.json":
            raise KeyboardInterrupt
        replace(path, data)

    monkeypatch.setattr(pretrained, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        save_released(noisy_model(CONFIG, seed=5), folder)
    assert str(folder / "model.safetensors") in refusal(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no model configuration"),
        ("{", "no model configuration"),
        ("[]", "no model configuration"),
        ("{}", "format"),
        ("\udcff", "no model configuration"),
        ('{"format": "music-ar 0"}', 'expected format "music-ar 1", found "music-ar 0"'),
        ('{"format": "music-ar 1"}', "fingerprint"),
        ('{"format": "music-ar 1", "fingerprint": "0123456789abcdef"}', "another event vocabulary.*0123456789ab"),
        ('{"format": "music-ar 1", "fingerprint": 5}', "no model configuration"),
        (f'{{"format": "music-ar 1", "fingerprint": "{vocabulary.FINGERPRINT}"}}', "model"),
        (
            f'{{"format": "music-ar 1", "fingerprint": "{vocabulary.FINGERPRINT}", "model": []}}',
            "no model configuration",
        ),
    ],
)
def test_a_configuration_that_is_none_is_refused(folder, text, message):
    path = folder / "config.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_released(folder)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "changes", [{"width": "16"}, {"width": 16.5}, {"heads": 3}, {"layers": -1}, {"wings": 2}, {"cross_depths": 1}]
)
def test_sizes_that_cannot_be_are_refused(folder, changes):
    edit_config(folder, model=json.loads((folder / "config.json").read_text())["model"] | changes)
    assert f"{folder / 'config.json'} is no model configuration" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"layers": 2}, "lacks the tensor blocks.1"),
        ({"hidden": 25}, "should have shape"),
        ({"cross_depths": []}, "does not ask for.*further_crosses.0"),
        ({"conv_width": 1}, r"does not ask for.*'conv'"),
    ],
)
def test_weights_of_other_sizes_are_refused(folder, changes, name):
    edit_config(folder, model=json.loads((folder / "config.json").read_text())["model"] | changes)
    with pytest.raises(CheckpointError, match=name) as caught:
        load_released(folder)
    assert str(folder / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop("head.bias"), "lacks the tensor head.bias"),
        (lambda tensors: tensors.update(extra=np.zeros(3)), "does not ask for.*extra"),
        (lambda tensors: tensors.pop("embedding.scale"), "embedding is int8 and needs embedding.scale"),
        (lambda tensors: tensors.update({"embedding.scale": np.ones(3, np.float32)}), "needs embedding.scale"),
        (lambda tensors: tensors.update({"embedding.scale": np.ones(16)}), "needs embedding.scale"),
        (lambda tensors: tensors.update({"head.bias": np.zeros(391)}), "head.bias should be int8 or float32"),
        (
            lambda tensors: tensors.update({"head.bias": np.zeros(390, np.float32)}),
            r"head.bias should have shape \(391",
        ),
        (lambda tensors: tensors.update(embedding=tensors["embedding"].T.copy()), "embedding"),
    ],
    ids=["missing", "extra", "no scale", "short scale", "double scale", "double", "short", "transposed"],
)
def test_tensors_that_do_not_fit_are_refused(folder, edit, message):
    edit_weights(folder, edit)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_released(folder)
    assert str(folder / "model.safetensors") in str(caught.value)


def test_a_type_that_numpy_has_not_is_refused(folder):
    path = folder / "model.safetensors"
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    edit_config(folder, weights_sha256=None)
    assert str(path) in refusal(folder)


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
        ({"rate": 2}, True, "other settings: rate was 1, is 2"),
        ({"rate": 1, "model": {"width": 3}}, True, "model was None, is"),
    ],
)
def test_a_folder_of_another_run_is_refused(tmp_path, settings, resume, message):
    save_states(tmp_path, [3])
    with pytest.raises(CheckpointError, match=message):
        TrainingCheckpoints(tmp_path, settings, resume=resume)


def test_a_nested_setting_is_named(tmp_path):
    save_states(tmp_path, [3], {"model": {"width": 3, "depths": (1,)}})
    with pytest.raises(CheckpointError, match=r"settings: model\.width was 3, is 4$"):
        TrainingCheckpoints(tmp_path, {"model": {"width": 4, "depths": (1,)}}, resume=True)


def test_another_vocabulary_is_refused(tmp_path, monkeypatch):
    save_states(tmp_path, [3])
    monkeypatch.setattr(codec, "FINGERPRINT", "another")
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
