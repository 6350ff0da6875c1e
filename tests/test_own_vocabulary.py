"""Models of other sequences than music: trained, scored, drawn from and saved; what is for music refuses them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy_model
from flax import nnx

from app.cli import main
from music_ar.decoding.any_sequence import draw_sequences
from music_ar.decoding.decoder import Decoder
from music_ar.decoding.loading import load_decoder
from music_ar.evaluation.calibration import calibrate
from music_ar.evaluation.likelihood import ScoringConfig, score, score_tokens
from music_ar.model.config import PRESETS, ModelConfig
from music_ar.model.expansion import expand
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.model.pretrained import load_pretrained, model_of, save_pretrained, weights_of
from music_ar.model.weights import DEFAULT_MODEL, CheckpointError, Weights, local_folder, read_weights
from music_ar.tokens import vocabulary
from music_ar.training.checkpointing import check_settings, save_settings
from music_ar.training.config import TrainingConfig
from music_ar.training.trainer import Trainer

SYMBOLS, PADDING, M, N, B = 6, 6, 12, 8, 4
CONFIG = ModelConfig(
    vocabulary_size=SYMBOLS + 1, padding=PADDING, context=M, latents=N, conv_width=2,
    width=16, layers=1, heads=2, kv_heads=2, head_size=8, hidden=32,
)  # fmt: skip


class CountingBatches:
    """Sequences that count up in circles, from anywhere, of any length."""

    def __init__(self):
        self._rng = np.random.default_rng(0)

    def __next__(self):
        tokens = ((self._rng.integers(SYMBOLS, size=(B, 1)) + np.arange(M + 1)) % SYMBOLS).astype(np.int32)
        padded = np.arange(M + 1) < self._rng.integers(0, M - 1, (B, 1))
        tokens[padded] = PADDING
        return {"tokens": tokens, "weights": (~padded[:, -N - 1 : -1]).astype(np.float32)}

    def get_state(self):
        return self._rng.bit_generator.state

    def set_state(self, state):
        self._rng.bit_generator.state = state


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of training, with the model that it gave in the folder `model`."""
    folder = tmp_path_factory.mktemp("counting")
    config = TrainingConfig(
        steps=120, batch_size=B, warmup_steps=5, dropout=0.0, prefix_keep=1.0, ema_decay=0.8, checkpoint_minutes=1e5
    )
    fitted = Trainer(PerceiverAR(CONFIG, rngs=nnx.Rngs(0)), config, CountingBatches(), output=folder).fit()
    save_pretrained(fitted.model, folder / "model", int8=False)
    return folder


@pytest.fixture(scope="module")
def counting(folder):
    return load_pretrained(folder / "model", any_vocabulary=True)


def test_it_learns_scores_and_continues_sequences(counting):
    sequence = (np.arange(20) % SYMBOLS).astype(np.int32)
    nats = score_tokens(counting, [sequence, sequence[3:6]], ScoringConfig(stride=4))
    assert [of_each.shape for of_each in nats] == [(1, 19), (1, 2)]
    assert np.concatenate(nats, axis=1).mean() < np.log(SYMBOLS) / 4
    prompts = np.array([[PADDING, PADDING, 2, 3], [0, 1, 2, 3], [5, 0, 1, 2]], np.int32)
    drawn = draw_sequences(counting, prompts, 15, seed=0, temperature=0.0)
    np.testing.assert_array_equal(drawn, (prompts[:, -1:] + np.arange(1, 16)) % SYMBOLS)


def test_draws_follow_the_seed_and_are_never_padding():
    model = noisy_model(CONFIG)
    bias = model.head.bias
    assert bias is not None
    bias[...] = bias[...].at[PADDING].set(9.0)  # if it could, it would draw nothing else
    first, again, other = (draw_sequences(model, np.zeros((3, 2), np.int32), 30, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first < SYMBOLS).all()
    assert len(np.unique(first)) > 1


@pytest.mark.parametrize("prompts", [[[]], [[1, PADDING]], [[1, SYMBOLS + 1]], [[-1]]])
def test_prompts_without_a_token_to_continue_are_refused(prompts):
    with pytest.raises(ValueError, match=r"a token to continue from|tokens must be in 0\.\.6"):
        draw_sequences(noisy_model(CONFIG), np.array(prompts, np.int32), 1, seed=0)


def logits_of(model, tokens):
    graph, params = nnx.split(model, nnx.Param)
    return np.asarray(jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens))(params, jnp.asarray(tokens)))


def test_padding_has_no_influence():
    """More of it changes nothing, and neither does what its row of the embedding holds."""
    model, tokens = noisy_model(CONFIG), np.array([[1, 4, 2, 5, 0]], np.int32)
    expected = logits_of(model, tokens)
    assert np.ptp(expected, axis=1).min() > 0.1
    padded = np.pad(tokens, ((0, 0), (M - 5, 0)), constant_values=PADDING)
    np.testing.assert_allclose(logits_of(model, padded)[:, -5:], expected, atol=1e-5)
    model.embedding[...] = model.embedding[...].at[PADDING].set(100.0)
    np.testing.assert_allclose(logits_of(model, padded)[:, -5:], expected, atol=1e-5)


def test_numbers_of_tokens_mean_nothing():
    """Renumbered, padding too, and far beyond the events of music, the same symbols give the same logits."""
    size, tokens = 700, np.array([[PADDING, 1, 4, 2, 5, 0, 3, 3]], np.int32)
    number = np.random.default_rng(0).permutation(size)[: SYMBOLS + 1].astype(np.int32)
    config, tensors = dataclasses.replace(CONFIG, vocabulary_size=size, padding=int(number[PADDING])), {}
    for name, array in weights_of(noisy_model(CONFIG), int8=False).tensors.items():
        axis = {"embedding": 0, "head.kernel": 1, "head.bias": 0}.get(name)
        tensors[name] = array if axis is None else spread(array, number, size, axis)
    found = logits_of(model_of(Weights(config, tensors)), number[tokens])
    np.testing.assert_allclose(found[:, 1:, number], logits_of(noisy_model(CONFIG), tokens)[:, 1:], atol=1e-5)


def spread(array, number, size, axis):
    """The rows of an axis at other indices; zeros between them."""
    spread = np.zeros((*array.shape[:axis], size, *array.shape[axis + 1 :]), array.dtype)
    spread[(slice(None),) * axis + (number,)] = array
    return spread


def test_the_vocabulary_is_saved_and_loaded(folder, counting):
    assert counting.config == CONFIG
    record = json.loads((folder / "model" / "config.json").read_text())
    assert record["fingerprint"] not in vocabulary.FINGERPRINTS.values()
    assert json.loads((folder / "training" / "settings.json").read_text())["fingerprint"] == record["fingerprint"]
    others = ({"padding": 0}, {"vocabulary_size": 9}, {"vocabulary_size": 391, "padding": vocabulary.PAD})
    prints = {dataclasses.replace(CONFIG, **changes).fingerprint for changes in ({}, *others)}
    assert len(prints | {*vocabulary.FINGERPRINTS.values()}) == 4 + len(vocabulary.FINGERPRINTS)


@pytest.mark.parametrize("padding", [None, 3])
def test_a_vocabulary_that_is_not_the_fingerprints_is_refused(tmp_path, padding):
    save_pretrained(noisy_model(CONFIG), tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    record["model"]["padding"] = padding
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"config\.json: (the model has a different event vocab|.* fingerprint)"):
        load_pretrained(tmp_path, any_vocabulary=True)


def test_checkpoints_from_before_load_as_music():
    record = json.loads((local_folder(DEFAULT_MODEL) / "config.json").read_text())
    assert "padding" not in record["model"]
    config = read_weights().config
    assert config.is_music
    assert (config.pad, config.fingerprint) == (vocabulary.PAD, record["fingerprint"])


def test_a_run_from_before_resumes(tmp_path):
    """Its settings do not know of padding."""
    settings = {"model": dataclasses.asdict(PRESETS["tiny"])}
    before = {"model": {name: value for name, value in settings["model"].items() if name != "padding"}}
    save_settings(tmp_path, before)
    check_settings(tmp_path, settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"padding": 7}, "padding must be below vocabulary_size = 7, got 7"),
        ({"padding": -1}, "padding must be a whole number from 0"),
        ({"padding": None}, "vocabulary_size must be 391 or 394, those of event tokens, got 7"),
        ({"onsets": 4}, "onsets must be off in a model with a vocabulary of its own"),
        ({"onsets": 4, "time_heads": 1, "retrieval_notes": 64}, "onsets, retrieval_notes, time_heads must be off"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


COMMANDS = {
    "generate": "generate --output {new}.mid --checkpoint {model}",
    "render": "render --count 1 --output {new} --checkpoint {model}",
    "evaluate": "evaluate --data {data} --checkpoint {model}",
    "web": "web --checkpoint {model}",
    "bench": "bench decode --checkpoint {model}",
    "train": "train --data {data} --output {new} --start {model} --steps 1",
    "push": "push {model} someone/counting --dry-run",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_for_music_refuse_it_by_name(command, folder, prepared, tmp_path, capsys):
    model = folder / "model"
    arguments = COMMANDS[command].format(new=tmp_path / "new", model=model, data=prepared).split()
    assert main(arguments) == 2
    assert f"{model} is not a model of music: its 7 tokens are not events" in " ".join(capsys.readouterr().err.split())


def test_it_is_expanded_but_for_its_vocabulary(counting):
    wider = expand(counting, dataclasses.replace(CONFIG, width=24, hidden=48), rngs=nnx.Rngs(0))
    tokens = np.array([[PADDING, 3, 4, 5, 0]], np.int32)
    np.testing.assert_allclose(logits_of(wider, tokens)[:, 1:], logits_of(counting, tokens)[:, 1:], atol=1e-3)
    with pytest.raises(ValueError, match="vocabulary_size 7 -> 8"):
        expand(counting, dataclasses.replace(CONFIG, vocabulary_size=8), rngs=nnx.Rngs(0))


def test_what_is_for_music_refuses_it_in_python_too(folder, counting):
    with pytest.raises(CheckpointError, match="is not a model of music"):
        load_decoder(folder / "model")
    with pytest.raises(ValueError, match="a decoder writes music"):
        Decoder(counting)
    for refuses in (score, calibrate):
        with pytest.raises(ValueError, match=r"another vocabulary|of its own"):
            refuses(counting, [np.array([0, 1, 2], np.int32)])
