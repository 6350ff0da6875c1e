"""Training windows with a gap: which are re-ordered, what they hold, and that a model learns from what comes after."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_performance
from event_tokens import off, on, shift, velocity
from flax import nnx
from test_cli import run
from tiny_maestro import pieces_of

from data_pipeline.augmentation.transforms import Augmentation
from data_pipeline.dataset import Pieces
from data_pipeline.gaps import Gaps, target_weights
from data_pipeline.loader import LoaderConfig, batches
from music_ar.evaluation.infill import draw_gaps, score_middles
from music_ar.model.config import PRESETS
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.model.pretrained import load_pretrained, save_pretrained
from music_ar.tokens import codec
from music_ar.tokens.gaps import Parts, shifts
from music_ar.tokens.vocabulary import (
    END,
    END_OF_GAP,
    INFILL_VOCABULARY_SIZE,
    MIDDLE,
    PAD,
    SEPARATOR,
    START,
)
from music_ar.training.losses import token_loss

CONTEXT, LATENTS = 256, 128


@pytest.fixture(scope="module")
def music() -> Pieces:
    pieces = [codec.encode(make_performance(seed, 300)) for seed in range(4)]
    return pieces_of([np.concatenate([[START], piece, [END]]).astype(np.uint16) for piece in pieces])


def windows(pieces, count, **options):
    config = LoaderConfig(context=CONTEXT, latents=LATENTS, batch_size=8, seed=0, threads=0, **options)
    batch = batches(pieces, config=config)
    parts = [next(batch) for _ in range(count // 8)]
    return tuple(np.concatenate([part[name] for part in parts]) for name in ("tokens", "weights"))


def test_without_a_share_windows_are_as_before(music):
    augmentation = Augmentation()
    plain = windows(music, 64, augmentation=augmentation)
    for one, other in zip(plain, windows(music, 64, augmentation=augmentation, gaps=Gaps(share=0.0, context=CONTEXT)),
                          strict=True):  # fmt: skip
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("context", [CONTEXT, 200])
def test_re_ordered_windows_are_sequences_that_fit(music, context):
    """Each has all its marks; what only tells where the gap is has no weight; the parts differ in size."""
    tokens, weights = windows(music, 160, augmentation=Augmentation(), gaps=Gaps(share=1.0, context=context))
    sizes, at_start = [], 0
    for row, of_targets in zip(tokens, weights, strict=True):
        sequence = row[row != PAD]
        if MIDDLE not in sequence:  # a window of less than a second
            continue
        assert len(sequence) <= context + 1
        [separator], [middle] = np.flatnonzero(sequence == SEPARATOR), np.flatnonzero(sequence == MIDDLE)
        told, end = np.flatnonzero(sequence == END_OF_GAP)
        assert told < separator < middle < end
        length = codec.length_steps(sequence[:told])
        assert length == codec.length_steps(sequence[middle:end])
        assert 100 <= length <= 6000 or len(sequence) > LATENTS // 2
        last = sequence[-LATENTS:]
        assert (of_targets[-len(last) :][np.isin(last, [SEPARATOR, MIDDLE, START])] == 0).all()
        assert (of_targets[-(len(sequence) - middle - 1) :] == 1).all()
        at_start += sequence[separator + 1 : middle].tolist() == [START]
        sizes.append((separator - told - 1, middle - separator - 1))
    after, before = np.array(sizes).T
    assert len(sizes) > 100
    assert at_start > 0
    assert 0.05 < (after == 0).mean() < 0.5
    assert 0.02 < (before <= 1).mean() < 0.4


def test_a_share_of_the_windows_is_re_ordered(music):
    tokens, _ = windows(music, 160, gaps=Gaps(share=0.5, context=CONTEXT))
    assert 0.3 < (tokens == MIDDLE).any(axis=1).mean() < 0.6


def test_only_music_counts_as_a_target():
    before = np.array([START, velocity(1), on(60), *shifts(120)], np.int32)
    after, middle = np.array([velocity(1), on(61)], np.int32), np.array([off(60), END_OF_GAP, END], np.int32)
    weights = target_weights(Parts(before, middle, after, 250))
    assert weights.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("options", [{"share": 1.5, "context": 8}, {"share": 0.5, "context": 0}])
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="expected a"):
        Gaps(**options)
    with pytest.raises(ValueError, match=r"gaps with a context of 8\.\.16, got 20"):
        LoaderConfig(context=16, latents=8, batch_size=1, seed=0, gaps=Gaps(share=1.0, context=20))


def test_train_gives_an_old_model_the_tokens(capsys, tmp_path, prepared, tiny_checkpoint):
    command = ["train", "--data", prepared, "--steps", 1, "--batch-size", 4, "--output", tmp_path / "run"]
    code, _, errors = run(capsys, *command, "--start", tiny_checkpoint, "--infill", 0.5)
    assert code == 0, errors
    trained = load_pretrained(tmp_path / "run" / "model")
    assert trained.config.fills_gaps
    assert load_pretrained(tiny_checkpoint).config == dataclasses.replace(
        trained.config, vocabulary_size=391, label_size=0
    )
    # Trained further without gaps, it keeps them.
    command = [*command[:-1], tmp_path / "next", "--start", tmp_path / "run" / "model"]
    assert run(capsys, *command)[0] == 0
    assert load_pretrained(tmp_path / "next" / "model").config.fills_gaps


def test_a_teacher_may_lack_the_tokens_of_gaps_but_not_have_more(capsys, tmp_path, prepared, tiny_checkpoint):
    command = ["train", "--data", prepared, "--steps", 1, "--batch-size", 4, "--preset", "tiny"]
    first = ["--infill", 0.5, "--teacher", tiny_checkpoint, "--output", tmp_path / "run"]
    code, _, errors = run(capsys, *command, *first)
    assert code == 0, errors
    code, _, errors = run(capsys, *command, "--teacher", tmp_path / "run" / "model", "--output", tmp_path / "next")
    assert code == 2
    assert "has the tokens to fill gaps and the model has not" in errors


# Learning.

TOY = dataclasses.replace(
    PRESETS["tiny"], context=64, latents=32, layers=1, vocabulary_size=INFILL_VOCABULARY_SIZE, time_heads=1
)


def toy_gap(rng: np.random.Generator) -> Parts:
    """A gap whose only note is the first note after it, an octave lower, in half of its time."""
    steps, pitch = int(rng.integers(20, 100)), int(rng.integers(60, 72))
    half = steps // 2

    def note(pitch, before, length):
        waits = [shift(before)] if before else []
        return [*waits, velocity(10), on(pitch), shift(length), off(pitch)]

    other = int(rng.integers(60, 72))
    middle = [*shifts(half), on(pitch - 12), shift(1), off(pitch - 12), *shifts(steps - half - 1)]
    return Parts(
        before=np.array([START, *note(other, 0, 10), *shifts(5)], np.int32),
        middle=np.array([*middle, END_OF_GAP, END], np.int32),
        after=np.array(note(pitch, 3, 10), np.int32),
        steps=steps,
    )


def toy_batch(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.full((size, TOY.context + 1), PAD, np.int32)
    weights = np.zeros((size, TOY.latents), np.float32)
    for row, of_targets in zip(tokens, weights, strict=True):
        gap = toy_gap(rng)
        gap = gap._replace(after=gap.after[:0]) if rng.random() < 0.3 else gap
        sequence, counts = gap.sequence(), target_weights(gap)[-TOY.latents :]
        row[-len(sequence) :] = sequence
        of_targets[-len(counts) :] = counts
    return tokens, weights


@pytest.mark.slow
def test_a_model_learns_from_what_comes_after_and_from_the_time_left():
    """With both sides it knows the note; with the left side it knows the time, and guesses the note of 12."""
    graph, params = nnx.split(PerceiverAR(TOY, rngs=nnx.Rngs(0)), nnx.Param)
    optimizer = optax.adam(6e-3)
    state, rng = optimizer.init(params), np.random.default_rng(0)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params, state, tokens, weights):
        def loss(params):
            logits = nnx.merge(graph, params)(tokens[:, :-1])
            return token_loss(logits, tokens[:, -TOY.latents :], weights, z_loss=0.0)[0]

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(500):
        params, state = update(params, state, *map(jnp.asarray, toy_batch(rng, 32)))
    score = score_middles(nnx.merge(graph, params), [toy_gap(rng) for _ in range(64)])
    of_a_note = (score.left - score.both).mean()
    assert of_a_note > 0.8 * np.log(12)
    assert score.nats_per_token()["both"] < 0.1


def test_middles_are_scored_as_the_model_predicts_them():
    """The mean of the two sides of an untrained model is that of guessing; of gaps that no piece has, nothing is."""
    model = PerceiverAR(TOY, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    score = score_middles(model, [toy_gap(rng) for _ in range(3)], batch_size=2)
    for side in score.nats_per_token().values():
        np.testing.assert_allclose(side, np.log(INFILL_VOCABULARY_SIZE), rtol=1e-5)
    assert score.gain == 0
    with pytest.raises(ValueError, match="cannot fill gaps"):
        score_middles(PerceiverAR(PRESETS["tiny"], rngs=nnx.Rngs(0)), [toy_gap(rng)])


def test_gaps_are_drawn_inside_of_pieces(music):
    gaps = draw_gaps(music.tokens, 2.0, 20)
    assert {gap.steps for gap in gaps} == {200}
    for gap in gaps:
        assert codec.length_steps(gap.before) >= 200
        assert codec.length_steps(gap.after) > 0
    with pytest.raises(ValueError, match="three times the gap"):
        draw_gaps(music.tokens, 1000.0, 1)


def test_a_saved_model_that_fills_gaps_loads(tmp_path):
    save_pretrained(PerceiverAR(TOY, rngs=nnx.Rngs(0)), tmp_path)
    assert load_pretrained(tmp_path).config == TOY
