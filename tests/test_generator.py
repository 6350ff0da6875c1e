"""`Generator`: prompts, seeds, continuations, many pieces at once, and what it refuses."""

import dataclasses

import numpy as np
import pytest
from conftest import make_performance, noisy_model

from music_ar.decoding.backend import Backend
from music_ar.decoding.decoder import Decoder
from music_ar.decoding.request import GenerationError, Request
from music_ar.decoding.sampling import SamplingError, SamplingOptions
from music_ar.generator import Generator
from music_ar.midi.io import read_midi, write_midi
from music_ar.midi.performance import MidiError, Performance
from music_ar.model.config import PRESETS
from music_ar.model.weights import CheckpointError
from music_ar.tokens import codec


@pytest.fixture(scope="module")
def generator(decoder):
    return Generator(decoder)


@pytest.fixture(scope="module")
def prompt():
    """About 6.5 s, in whole steps and lowest velocities of bins, so that tokens hold it exactly."""
    return codec.decode(codec.encode(make_performance(3, notes=40)))


def test_a_piece_from_nothing(generator):
    piece = generator.generate(seconds=4.0, seed=1)
    assert len(piece) > 0
    assert 3.0 < piece.duration_s <= 4.0
    assert piece.pitch.min() >= 0
    assert piece.pitch.max() <= 127


def test_the_seed_determines_the_piece(generator):
    first, again, other = (generator.generate(seconds=3.0, seed=seed) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_a_random_seed_is_in_the_result(generator):
    seeds = []
    piece = generator.generate(seconds=2.0, progress=lambda chunk: seeds.append(chunk.seeds))
    assert len(set(seeds)) == 1
    assert generator.generate(seconds=2.0, seed=seeds[0][0]) == piece


@pytest.mark.parametrize(
    "changed",
    [
        {"temperature": 0.0},
        {"top_k": 1},
        {"top_p": 0.05},
        {"min_p": 0.9},
        {"steadiness": 1.0},
        {"lowest_pitch": 54},
        {"highest_pitch": 72},
        {"latents": 4},
    ],
)
def test_options_change_the_piece(generator, changed):
    """The same by keyword and in a request. A random model is too sure of itself at lower temperatures."""
    hot = {"seconds": 3.0, "seed": 5, "temperature": 5.0, "top_p": 1.0}
    piece = generator.generate(**(hot | changed))
    assert piece != generator.generate(**hot)
    assert piece == generator.generate(Request.of(None, **hot), **changed)


def test_a_prompt_is_kept_and_continued(generator, prompt):
    piece = generator.generate(prompt, seconds=4.0, seed=1)
    assert piece.select(np.arange(len(piece)) < len(prompt)) == prompt
    assert prompt.duration_s < piece.duration_s <= prompt.duration_s + 4.0


def test_a_prompt_may_be_a_file(generator, prompt, tmp_path):
    path = tmp_path / "prompt.mid"
    write_midi(prompt, path)
    expected = generator.generate(read_midi(path), seconds=2.0, seed=1)
    for file in (path, str(path), path.read_bytes()):
        assert generator.generate(file, seconds=2.0, seed=1) == expected


def test_a_prompt_comes_back_with_its_own_times_and_velocities(generator):
    """Though the model hears steps of 10 ms and bins of velocity; alone, as variations, and among many."""
    notes = make_performance(5, notes=30)
    played = dataclasses.replace(notes, onset_s=notes.onset_s + 0.0031, velocity=notes.velocity | 3)
    options = {"seconds": 1.0, "seed": 6, "variations": 2}
    *_, chunk = generator.stream(played, **options)
    pieces = [piece.performance for piece in generator.generate_many([played], batch_size=2, **options)]
    for piece in (*chunk.performances, *pieces):
        prompt = piece.select(piece.onset_s < played.onset_s[-1] + 0.001)
        assert prompt == played


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


def test_prompts_and_music_may_be_longer_than_the_context(generator):
    long = make_performance(4, notes=300)  # over a thousand tokens, where the model reads 64
    chunks = list(generator.stream(long, seconds=45.0, seed=0, top_p=1.0))
    assert len(chunks[-1].performance) > 300
    assert chunks[-1].tokens > 3 * generator.config.context


def test_variations_are_the_pieces_of_their_seeds(generator, prompt):
    chunks = list(generator.stream(prompt, seconds=3.0, seed=5, variations=3))
    assert chunks[-1].seeds == (5, 6, 7)
    assert len({len(piece) for piece in chunks[-1].performances}) > 1
    for seed, piece in zip(chunks[-1].seeds, chunks[-1].performances, strict=True):
        assert piece == generator.generate(prompt, seconds=3.0, seed=seed)


# Many pieces.


def test_many_pieces_are_what_they_are_alone(generator, midi_file):
    """Whatever is generated before and beside them, in the same size of batch."""
    requests = [
        Request(seed=0, seconds=2.0, latents=32),
        Request(seed=1, prompt=midi_file, seconds=1.0, latents=20, sampling=SamplingOptions(temperature=0.7)),
        Request(seed=3, prompt=midi_file, seconds=3.0, latents=32, sampling=SamplingOptions(top_p=0.5)),
        Request(seed=2, seconds=4.0, latents=32, sampling=SamplingOptions(top_k=5)),
        Request(seed=4, seconds=1.0, latents=8, tag="small"),
    ]
    together = {piece.request.seed: piece for piece in generator.generate_many(requests, batch_size=2)}
    assert sorted(together) == [0, 1, 2, 3, 4]
    assert together[4].request.tag == "small"
    for request in requests:
        [alone] = generator.generate_many([request], batch_size=2)
        made = together[request.seed]
        assert made == alone
        assert made.request.prompt == request.prompt
        assert 0 < made.nats_per_token < 30
        assert made.continuation.duration_s <= request.seconds


def test_many_pieces_are_the_same_in_batches_of_any_size(generator, prompt):
    """To the last bit, with the native engine: its sums do not depend on the number of rows."""
    if generator.decoder.path == "jax":
        pytest.skip("XLA sums in another order for another number of rows")
    requests = [
        Request(seed=seed, seconds=3.0, prompt=None if seed % 2 else prompt, latents=32 - seed) for seed in range(5)
    ]
    alone = {request.seed: list(generator.generate_many([request], batch_size=1)) for request in requests}
    for size in (2, 3, 16):
        for piece in generator.generate_many(requests, batch_size=size):
            assert [piece] == alone[piece.request.seed]
            assert piece.performance == generator.generate(piece.request)


def test_many_pieces_are_what_generate_gives(generator):
    """Each with its own seed and sampling options."""
    hot = SamplingOptions(temperature=5.0, top_p=1.0)
    requests = [
        Request(seconds=2.0, seed=5, variations=2),
        Request(seconds=2.0, seed=7, sampling=hot),
        Request(seconds=2.0, seed=7, sampling=dataclasses.replace(hot, top_k=1)),
    ]
    pieces = list(generator.generate_many(requests, batch_size=3))
    assert sorted(piece.request.seed for piece in pieces) == [5, 6, 7, 7]
    assert len({piece.performance.onset_s.tobytes() for piece in pieces}) == 4
    for piece in pieces:
        assert piece.performance == generator.generate(piece.request)


def test_a_whole_request_keeps_its_own_options(generator, prompt):
    request = Request(prompt=prompt, seconds=1.0, seed=9, continuation_only=True)
    prompts = [prompt, request]
    pieces = {
        piece.request.seed: piece for piece in generator.generate_many(prompts, seconds=2.0, seed=3, batch_size=2)
    }
    assert pieces[9].performance == pieces[9].continuation
    assert pieces[3].performance.duration_s > prompt.duration_s
    assert (pieces[9].request.seconds, pieces[3].request.seconds) == (1.0, 2.0)


def test_requests_are_taken_as_rows_become_free(generator):
    taken = []

    def requests():
        for seed in range(6):
            taken.append(seed)
            yield Request(seed=seed, seconds=1.0, latents=32)

    pieces = generator.generate_many(requests(), batch_size=2)
    next(pieces)
    assert len(taken) < 6
    assert len(list(pieces)) == 5


def test_progress_adds_up_to_the_music(generator):
    spent_s: list[float] = []
    pieces = list(
        generator.generate_many([None], variations=3, seconds=2.0, seed=5, batch_size=3, progress=spent_s.append)
    )
    assert sum(spent_s) == pytest.approx(2.0 * len(pieces), abs=0.01)
    assert min(spent_s) >= 0


def test_a_bad_request_fails_alone(generator, midi_file):
    """Whatever is wrong with it: the file, the number of latents, or the prompt's length."""
    prompts = [
        b"no MIDI",
        midi_file,
        Request(latents=33, seconds=1.0, seed=0, variations=2),
        Request(prompt=midi_file, prompt_seconds=1e-9, seconds=1.0, seed=0),
        Request(prompt=b"no MIDI", latents="auto", seconds=1.0, seed=0),
        b"",
    ]
    pieces = list(generator.generate_many(prompts, seconds=1.0, seed=0, batch_size=2))
    assert [piece.error is None for piece in pieces].count(True) == 1
    failed = [piece for piece in pieces if piece.error is not None]
    assert len(failed) == 6
    for message, count in (("not a MIDI file", 2), ("in 2..32", 2), ("no notes", 1)):
        assert sum(message in (piece.error or "") for piece in failed) == count
    assert all(len(piece.performance) == piece.tokens == 0 and np.isnan(piece.nats_per_token) for piece in failed)


def test_the_batch_size_is_the_backends(generator):
    assert generator.batch_size() == generator.decoder.backend.batch_rows
    with pytest.raises(GenerationError, match=r"2\.\.32"):
        generator.batch_size(33)


@pytest.mark.parametrize(("context", "rows"), [(64, 256), (2**20, 16)])
def test_without_a_batch_size_caches_fill_half_of_the_memory(context, rows):
    """8 GiB for a device that does not tell. In powers of two, at most 256; a million inputs are 134 MB per row."""
    model = noisy_model(dataclasses.replace(PRESETS["tiny"], context=context))
    assert Generator(Decoder(model, Backend())).batch_size() == rows


# What is refused.


@pytest.mark.parametrize("method", ["generate", "stream", "session", "generate_many"])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"latents": 33}, GenerationError, r"latents must be in 2\.\.32.*got 33"),
        ({"latents": 1}, GenerationError, "at least 2, or auto, got 1"),
        ({"mode": "exact"}, GenerationError, "unknown option mode"),
        ({"seconds": 0.0}, GenerationError, "seconds"),
        ({"temperature": -1.0}, SamplingError, "temperature"),
    ],
)
def test_options_are_checked_at_once(generator, method, options, error, message):
    arguments = [[None]] if method == "generate_many" else []
    with pytest.raises(error, match=message):
        getattr(generator, method)(*arguments, **options)


def test_unusable_prompts_are_refused(generator, prompt):
    with pytest.raises(GenerationError, match="no notes in the first 2 s"):
        generator.stream(prompt.shift(10.0), prompt_seconds=2.0)
    with pytest.raises(GenerationError, match="no notes in the prompt"):
        generator.stream(Performance.empty())
    with pytest.raises(MidiError):
        generator.stream(b"not MIDI")


def test_no_rows_are_no_batch(generator):
    with pytest.raises(GenerationError, match="batch_size must be at least 1, got 0"):
        generator.generate_many([None], batch_size=0)


def test_a_checkpoint_that_is_not_there():
    with pytest.raises(CheckpointError, match="no-such-model"):
        Generator.from_pretrained("no-such-model")
