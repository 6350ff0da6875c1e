"""Pretrained models there and back, and what is refused, by the name of the file."""

import dataclasses
import json
import os
import re
import shutil

import huggingface_hub
import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import noisy_model
from flax import nnx

from music_ar.model import pretrained, weights
from music_ar.model.config import PRESETS, Compute
from music_ar.model.perceiver_ar import PerceiverAR, parameter_count
from music_ar.model.pretrained import load_pretrained, save_pretrained, weights_of
from music_ar.model.quantization import dequantize, quantize
from music_ar.model.weights import CheckpointError, parameter_shapes, read_companion, read_weights
from music_ar.tokens import vocabulary

CONFIG = dataclasses.replace(PRESETS["tiny"], width=16, layers=1, hidden=24, retrieval_notes=12, label_size=3)


@pytest.fixture(scope="module")
def model():
    return noisy_model(CONFIG)


@pytest.fixture
def folder(model, tmp_path):
    """A saved model, to damage."""
    save_pretrained(model, tmp_path / "saved")
    return tmp_path / "saved"


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
        load_pretrained(folder)
    return str(caught.value)


def test_float32_comes_back_to_the_bit(model, tmp_path):
    save_pretrained(model, tmp_path / "new" / "model", int8=False)
    loaded = load_pretrained(str(tmp_path / "new" / "model"))
    assert loaded.config == CONFIG
    before, after = parameters(model), parameters(loaded)
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


def test_int8_is_within_half_a_step_of_its_column(model, folder):
    before, after = parameters(model), parameters(load_pretrained(folder))
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


def test_saving_what_was_loaded_changes_nothing(folder, tmp_path):
    loaded = load_pretrained(folder)
    save_pretrained(loaded, tmp_path / "again")
    again = parameters(load_pretrained(tmp_path / "again"))
    for name, array in parameters(loaded).items():
        np.testing.assert_allclose(again[name], array, rtol=1e-6)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"conv_width": 1, "onsets": 3, "time_heads": 1},
        {"label_size": 5, "retrieval_notes": 20, "heads": 6, "kv_heads": 3, "layers": 1},
    ],
)
def test_the_parameters_of_a_config_are_those_of_its_model(sizes):
    config = dataclasses.replace(PRESETS["tiny"], **sizes)
    model = nnx.eval_shape(lambda: PerceiverAR(config, rngs=nnx.Rngs(0)))
    expected = {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert parameter_shapes(config) == expected


def test_weights_are_read_as_they_are_stored(model, folder):
    read = read_weights(folder)
    assert read.config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, read.tensors, weights_of(model).tensors)
    np.testing.assert_array_equal(read.float32("embedding"), parameters(load_pretrained(folder))["embedding"])


def test_a_column_of_zeros_stays_zero():
    array = np.array([[0.0, 1.0], [0.0, -0.5]], np.float32)
    stored, scale = quantize(array)
    np.testing.assert_array_equal(stored, [[0, 127], [0, -64]])
    np.testing.assert_allclose(dequantize(stored, scale), [[0, 1], [0, -64 / 127]], rtol=1e-6)


def test_a_loaded_model_computes(model, folder):
    tokens = jax.numpy.arange(CONFIG.context)[None]
    logits = jax.jit(lambda model: model(tokens))
    difference = np.abs(logits(model) - logits(load_pretrained(folder)))
    assert 0 < difference.max() < 0.1 * np.abs(logits(model)).max()


@pytest.mark.usefixtures("folder")
def test_shipped_models_are_found_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "SHIPPED_FOLDERS", (tmp_path / "nowhere", tmp_path))
    monkeypatch.setattr(weights, "DEFAULT_MODEL", "saved")
    assert load_pretrained("saved").config == CONFIG
    assert load_pretrained().config == CONFIG
    monkeypatch.setattr(weights, "SHIPPED_FOLDERS", (tmp_path / "nowhere",))
    with pytest.raises(CheckpointError, match=r"saved, which ships with the project, is missing.*nowhere"):
        load_pretrained()


def test_the_model_that_ships_loads_and_is_the_one_of_its_metrics():
    model, metrics = load_pretrained(), json.loads(read_companion(None, "metrics.json"))
    assert parameter_count(model) == metrics["parameters"]
    assert (model.config.window, model.config.latents) == (
        metrics["scored_with"]["context"],
        metrics["scored_with"]["latents"],
    )


@pytest.mark.parametrize("name", ["no-such-model", "./no/such", "/no/such", "a/b/c"])
def test_a_name_that_is_nothing_is_refused_without_asking_the_hub(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    assert name in refusal(name)


def test_a_hub_that_fails_is_reported(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert "some/model" in refusal("some/model")
    assert "no route" in refusal("some/model")


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A hub with one repository, the saved model with its card and more; the names that it was asked for."""
    for name in (*weights.COMPANIONS, "optimizer.bin"):
        (folder / name).write_text(f"the text of {name}")
    asked = []

    def download(name, *, allow_patterns):
        asked.append(name)
        copy = tmp_path / "fetched"
        copy.mkdir(exist_ok=True)
        for path in folder.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, copy)
        return str(copy)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_a_hub_repository_is_loaded_with_its_card_and_curve(hub, tmp_path):
    assert load_pretrained("some/model").config == CONFIG
    for name in ("MODEL_CARD.md", "curve.json", "metrics.json"):
        assert read_companion("some/model", name) == f"the text of {name}"
    assert set(hub) == {"some/model"}
    assert not (tmp_path / "fetched" / "optimizer.bin").exists()


def test_a_companion_that_is_missing_is_empty(folder):
    assert read_companion(folder, "MODEL_CARD.md") == ""


def test_a_model_computes_as_it_is_told(folder):
    assert load_pretrained(folder).compute == Compute()
    assert load_pretrained(folder, compute=Compute(dtype="bfloat16")).dtype == jax.numpy.bfloat16


OLD_NAMES = {"retrieval.kernel": "recall.kernel", "label.kernel": "view.kernel"}
OLD_SIZES = {"retrieval_notes": "recall", "label_size": "view_size"}


@pytest.fixture
def old_folder(folder):
    """The saved model as version 0.1.0 wrote it."""

    def rename(tensors):
        for new, old in OLD_NAMES.items():
            tensors[old], tensors[f"{old}.scale"] = tensors.pop(new), tensors.pop(f"{new}.scale")

    edit_weights(folder, rename)
    sizes = json.loads((folder / "config.json").read_text())["model"]
    for new, old in OLD_SIZES.items():
        sizes[old] = sizes.pop(new)
    edit_config(folder, format="music-ar 1", model=sizes | {"cross_depths": []})
    return folder


def test_a_model_in_the_old_format_is_loaded(model, old_folder, tmp_path):
    save_pretrained(model, tmp_path / "new")
    loaded = load_pretrained(old_folder)
    assert loaded.config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, parameters(loaded), parameters(load_pretrained(tmp_path / "new")))


def test_an_old_model_with_more_cross_attentions_is_refused(old_folder):
    edit_config(old_folder, model=json.loads((old_folder / "config.json").read_text())["model"] | {"cross_depths": [0]})
    assert "cross_depths are not supported" in refusal(old_folder)


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
    assert f"{path} does not match its SHA-256 in config.json" in refusal(folder)


def test_new_weights_beside_an_old_configuration_are_refused(folder, monkeypatch):
    """What a save that was killed between its two files leaves."""
    replace = pretrained.write_atomically

    def killed(path, data):
        if path.name == "config.json":
            raise KeyboardInterrupt
        replace(path, data)

    monkeypatch.setattr(pretrained, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(noisy_model(CONFIG, seed=5), folder)
    assert str(folder / "model.safetensors") in refusal(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a model configuration"),
        ("{", "not a model configuration"),
        ("[]", "not a model configuration"),
        ("[" * 100_000, "not a model configuration: it is nested too deeply"),
        ('{"format": ["music-ar 2"]}', "expected format"),
        (" " * 2**21, "cannot be read: it has more than 1 MB"),
        ("{}", "format"),
        ("\udcff", "not a model configuration"),
        ('{"format": "music-ar 0"}', 'expected format "music-ar 2", got "music-ar 0"'),
        ('{"format": "music-ar 1"}', "fingerprint"),
        ('{"format": "music-ar 1", "fingerprint": "0123456789abcdef"}', "different event vocabulary.*0123456789ab"),
        ('{"format": "music-ar 1", "fingerprint": 5}', "not a model configuration"),
        (f'{{"format": "music-ar 1", "fingerprint": "{vocabulary.FINGERPRINT}"}}', "model"),
        (
            f'{{"format": "music-ar 1", "fingerprint": "{vocabulary.FINGERPRINT}", "model": []}}',
            "not a model configuration",
        ),
    ],
)
def test_an_invalid_configuration_is_refused(folder, text, message):
    path = folder / "config.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_pretrained(folder)
    assert str(path) in str(caught.value)


@pytest.mark.usefixtures("any_types")
@pytest.mark.parametrize(
    "changes",
    [
        {"width": "16"},
        {"width": 16.5},
        {"width": True},
        {"width": 10**9},
        {"context": 10**400},
        {"heads": 3},
        {"layers": -1},
        {"layers": 10**9},
        {"wings": 2},
        {"label_size": None},
        {"wishes": 3},
        {"wishes": {"edges": [[1, 0]], "composers": [], "eras": [], "sources": []}},
        {"rotary_wavelength": float("inf")},
        {"rotary_fraction": float("nan")},
        {"retrieval_notes": [12]},
        {"vocabulary_size": 0},
        {"vocabulary_size": 500},
        {"padding": "388"},
    ],
)
def test_sizes_that_cannot_be_are_refused(folder, changes):
    edit_config(folder, model=json.loads((folder / "config.json").read_text())["model"] | changes)
    assert f"{folder / 'config.json'} is not a model configuration" in refusal(folder)


LATER = ("segment", "exits", "wishes", "tape", "padding")  # sizes that the first configs of the format did not have


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(CONFIG) if field.name not in LATER])
def test_each_size_must_be_there(folder, name):
    """Weights do not show some of them, such as the number of time heads: a default would be a different model."""
    sizes = json.loads((folder / "config.json").read_text())["model"]
    del sizes[name]
    edit_config(folder, model=sizes)
    assert f"{folder / 'config.json'} lacks {name}" in refusal(folder)


def test_a_model_that_its_weights_cannot_hold_is_refused_before_it_is_built(folder):
    sizes = json.loads((folder / "config.json").read_text())["model"]
    edit_config(folder, model=sizes | {"width": 60_000, "layers": 900, "hidden": 200_000})
    assert re.search(
        r"model\.safetensors has 0\.\d MB, but .* 2[\d,]+ parameters, which takes 2[\d,]+\.\d MB", refusal(folder)
    )


def test_weights_far_larger_than_the_model_are_not_read(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(2**40)  # it has holes
    assert "model.safetensors has 1,048,576.0 MB" in refusal(folder)


def test_another_number_of_tokens_is_refused(folder):
    edit_config(folder, model=json.loads((folder / "config.json").read_text())["model"] | {"vocabulary_size": 394})
    assert "config.json: expected vocabulary_size 391, got 394" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "loop", "folder", "device"])
def test_what_is_no_file_is_refused(folder, name, kind):
    path = folder / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path)
    message = refusal(folder)
    assert str(path) in message
    assert len(message) < 300


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"layers": 2}, "lacks the tensor blocks.1"),
        ({"hidden": 25}, "of shape"),
        ({"label_size": 0}, r"do not belong to.*'label.kernel'"),
        ({"conv_width": 1}, r"do not belong to.*'conv'"),
    ],
)
def test_weights_of_other_sizes_are_refused(folder, changes, name):
    edit_config(folder, model=json.loads((folder / "config.json").read_text())["model"] | changes)
    with pytest.raises(CheckpointError, match=name) as caught:
        load_pretrained(folder)
    assert str(folder / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop("head.bias"), "lacks the tensor head.bias"),
        (lambda tensors: tensors.update(extra=np.zeros(3)), "do not belong to.*extra"),
        (lambda tensors: tensors.pop("embedding.scale"), "embedding is int8 and needs embedding.scale"),
        (lambda tensors: tensors.update({"embedding.scale": np.ones(3, np.float32)}), "needs embedding.scale"),
        (lambda tensors: tensors.update({"embedding.scale": np.ones(16)}), "needs embedding.scale"),
        (
            lambda tensors: tensors.update({"head.bias": np.zeros(391)}),
            "expected head.bias in int8 or float32, got float64",
        ),
        (
            lambda tensors: tensors.update({"head.bias": np.zeros(390, np.float32)}),
            r"expected head.bias of shape \(391",
        ),
        (lambda tensors: tensors.update(embedding=tensors["embedding"].T.copy()), "embedding"),
        (lambda tensors: tensors["head.bias"].__setitem__(7, np.nan), "head.bias has numbers that are infinite or not"),
        (lambda tensors: tensors["embedding.scale"].__setitem__(3, np.inf), "embedding.scale has numbers"),
    ],
    ids=[
        "missing",
        "extra",
        "no scale",
        "short scale",
        "double scale",
        "double",
        "short",
        "transposed",
        "nan",
        "inf",
    ],
)
def test_tensors_that_do_not_fit_are_refused(folder, edit, message):
    edit_weights(folder, edit)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_pretrained(folder)
    assert str(folder / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize(
    "tensor",
    [
        {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]},  # a type that NumPy does not have
        {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 1]},
        {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [2**62, 0, 2**62], "data_offsets": [0, 0]},
        {"dtype": "I8", "shape": [-1], "data_offsets": [0, 1]},
        {"dtype": "I8", "shape": [1], "data_offsets": [2**63, 2**63 + 1]},
        {"dtype": "I8", "shape": [1], "data_offsets": [1, 0]},
        {"dtype": "I8", "shape": [[1]], "data_offsets": [0, 1]},
    ],
    ids=range(8),
)
def test_a_header_that_lies_is_refused(folder, tensor):
    path = folder / "model.safetensors"
    header = json.dumps({"x": tensor}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    edit_config(folder, weights_sha256=None)
    assert str(path) in refusal(folder)
