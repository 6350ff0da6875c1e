"""`Generator`: prompts, joins, seeds, limits, and what it refuses."""

import io

import numpy as np
import pytest
from conftest import make_performance

from music_ar import events
from music_ar.checkpoint import CheckpointError
from music_ar.generator import GenerationError, Generator
from music_ar.midi import MidiError, Performance, write_midi
from music_ar.sampling import SamplingOptions


@pytest.fixture(scope="module")
def generator(tiny_checkpoint):
    return Generator.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def prompt():
    """About 6.5 s, on the events' time step and at the middle of velocity bins, so that events hold it exactly."""
    return events.decode(events.encode(make_performance(3, notes=40)))


def test_a_piece_from_nothing(generator):
    piece = generator.generate(seconds=4.0, seed=1)
    assert len(piece) > 0
    assert piece.duration_s <= 4.0
    assert piece.pitch.min() >= 0
    assert piece.pitch.max() <= 127


def test_the_seed_makes_the_piece(generator):
    first, again, other = (generator.generate(seconds=3.0, seed=seed) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_without_a_seed_one_is_drawn_and_told(generator):
    seeds = []
    piece = generator.generate(seconds=2.0, progress=lambda chunk: seeds.append(chunk.seed))
    assert len(set(seeds)) == 1
    assert generator.generate(seconds=2.0, seed=seeds[0]) == piece


def test_chunks_grow_into_the_piece(generator):
    chunks = list(generator.stream(seconds=20.0, seed=2, options=SamplingOptions(top_p=1.0)))
    assert len(chunks) > 1
    assert [chunk.finished for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    made_s = [chunk.seconds_made for chunk in chunks]
    assert made_s == sorted(made_s)
    assert chunks[-1].eta_s == 0.0
    assert chunks[-1].tokens > chunks[0].tokens
    before, after = chunks[-2].performance, chunks[-1].performance
    np.testing.assert_array_equal(after.onset_s[: len(before)], before.onset_s)
    assert after == generator.generate(seconds=20.0, seed=2, top_p=1.0)


def test_a_prompt_is_kept_as_it_is_and_goes_on(generator, prompt):
    piece = generator.generate(prompt, seconds=4.0, seed=1)
    kept = piece.select(np.arange(len(piece)) < len(prompt))
    assert kept == prompt
    assert prompt.duration_s < piece.duration_s <= prompt.duration_s + 4.0


def test_any_form_of_prompt(generator, prompt, tmp_path):
    path, file = tmp_path / "prompt.mid", io.BytesIO()
    write_midi(prompt, path)
    write_midi(prompt, file)
    expected = generator.generate(prompt, seconds=2.0, seed=1)
    assert generator.generate(path, seconds=2.0, seed=1) == expected
    assert generator.generate(str(path), seconds=2.0, seed=1) == expected
    assert generator.generate(file.getvalue(), seconds=2.0, seed=1) == expected


def test_notes_that_sound_at_the_cut_are_held(generator, prompt):
    cut_s = 3.0
    piece = generator.generate(prompt, prompt_seconds=cut_s, seconds=5.0, seed=1)
    before = prompt.select(prompt.onset_s <= cut_s)
    kept = piece.select(np.arange(len(piece)) < len(before))
    for column in ("onset_s", "pitch", "velocity"):
        np.testing.assert_array_equal(getattr(kept, column), getattr(before, column))
    over = before.offset_s <= cut_s  # ended before the cut: exactly as they were
    np.testing.assert_array_equal(kept.offset_s[over], before.offset_s[over])
    assert (~over).any()
    join_s = np.concatenate([before.onset_s, before.offset_s[over]]).max()
    assert (kept.offset_s[~over] >= join_s).all()  # none is cut at the join, and none outlives the piece
    assert (kept.offset_s <= join_s + 5.0).all()


def test_the_continuation_alone(generator, prompt):
    whole = generator.generate(prompt, prompt_seconds=3.0, seconds=4.0, seed=1)
    alone = generator.generate(prompt, prompt_seconds=3.0, seconds=4.0, seed=1, continuation_only=True)
    assert 0 < len(alone) < len(whole)
    tail = whole.select(np.arange(len(whole)) >= len(whole) - len(alone))
    np.testing.assert_array_equal(alone.pitch, tail.pitch)
    np.testing.assert_allclose(np.diff(alone.onset_s), np.diff(tail.onset_s), atol=1e-9)
    assert alone.duration_s <= 4.0


def test_a_prompt_longer_than_the_context(generator):
    long = make_performance(4, notes=300)  # over a thousand tokens, where the model reads 64
    piece = generator.generate(long, seconds=2.0, seed=1)
    assert len(piece) > 300


def test_music_longer_than_the_context_goes_on(generator):
    chunks = list(generator.stream(seconds=45.0, seed=0, latents=8, options=SamplingOptions(top_p=1.0)))
    assert chunks[-1].tokens > 3 * generator.model.config.context


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latents": 33}, r"2\.\.32"),
        ({"latents": 1}, r"2\.\.32"),
        ({"seconds": 0.0}, "seconds"),
        ({"seconds": float("inf")}, "seconds"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**31}, "seed"),
        ({"prompt_seconds": 3.0}, "prompt"),
    ],
)
def test_requests_that_cannot_be_met(generator, options, message):
    with pytest.raises(GenerationError, match=message):
        generator.stream(**options)


def test_prompts_that_cannot_be_used(generator, prompt):
    late = prompt.shift(10.0)
    with pytest.raises(GenerationError, match="no notes in the first 2 s"):
        generator.generate(late, prompt_seconds=2.0)
    with pytest.raises(GenerationError, match="no notes in the prompt"):
        generator.generate(Performance.empty())
    with pytest.raises(MidiError):
        generator.generate(b"not MIDI")


def test_a_checkpoint_that_is_not_there():
    with pytest.raises(CheckpointError, match="no-such-model"):
        Generator.from_pretrained("no-such-model")
