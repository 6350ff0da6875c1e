"""`Generator`: prompts, joins, seeds, limits, and what it refuses."""

import gc
import io

import jax
import numpy as np
import pytest
from conftest import make_performance
from jaxtyping import TypeCheckError

from music_ar.decoding.sampling import SamplingOptions
from music_ar.generator import MAESTRO_TOKENS_PER_S, GenerationError, Generator, Request, final_until_s
from music_ar.midi.io import write_midi
from music_ar.midi.performance import MidiError, Performance
from music_ar.model.pretrained import CheckpointError
from music_ar.tokens import codec, vocabulary


@pytest.fixture(scope="module")
def generator(tiny_checkpoint):
    return Generator.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def prompt():
    """About 6.5 s, on the events' time step and at the middle of velocity bins, so that events hold it exactly."""
    return codec.decode(codec.encode(make_performance(3, notes=40)))


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


def test_variations_are_the_pieces_of_their_seeds(generator, prompt):
    chunks = list(generator.stream(prompt, seconds=3.0, seed=5, variations=3))
    assert chunks[-1].seeds == (5, 6, 7)
    assert len({len(piece) for piece in chunks[-1].performances}) > 1
    for seed, piece in zip(chunks[-1].seeds, chunks[-1].performances, strict=True):
        assert piece == generator.generate(prompt, seconds=3.0, seed=seed)


@pytest.mark.parametrize("mode", ["exact", "sliding"])
@pytest.mark.parametrize("variations", [1, 2])
def test_extending_is_as_if_never_interrupted(generator, prompt, mode, variations):
    """Three times past the context, with notes that sound at each join."""
    options = {"seed": 3, "mode": mode, "variations": variations, "options": SamplingOptions(top_p=1.0)}
    composition = generator.compose(prompt, **options)
    for seconds in (5.0, 7.0, 9.0):
        extended = list(composition.stream(seconds))[-1]
    whole = list(generator.stream(prompt, seconds=21.0, **options))[-1]
    assert extended.performances == whole.performances
    assert extended.seconds_wanted == 21.0
    joins_s = [prompt.duration_s + 5.0, prompt.duration_s + 12.0]
    piece = whole.performance
    assert all(((piece.onset_s < join_s) & (piece.offset_s > join_s)).any() for join_s in joins_s)


def test_a_stream_that_is_stopped_is_the_beginning_of_the_whole(generator):
    composition = generator.compose(seed=2, options=SamplingOptions(top_p=1.0))
    whole = list(generator.stream(seconds=20.0, seed=2, options=SamplingOptions(top_p=1.0)))
    first = next(composition.stream(20.0))
    assert first.performance == whole[0].performance
    assert not first.finished
    rest = list(composition.stream(20.0 - first.seconds_made))  # goes on from there
    assert rest[-1].performance == whole[-1].performance


def test_closing_frees_the_device(generator):
    def live_bytes():
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    list(generator.stream(seconds=20.0, seed=2))  # whatever is made once and kept
    before = live_bytes()
    composition = generator.compose(seed=2)
    stream = composition.stream(20.0)
    next(stream)
    assert live_bytes() > before + 10_000  # the caches
    composition.close()
    assert live_bytes() <= before + 1000  # the sampling options
    assert list(stream) == []
    with pytest.raises(GenerationError, match="closed"):
        composition.stream(1.0)
    dropped = generator.stream(seconds=20.0, seed=2)
    next(dropped)
    dropped.close()
    assert live_bytes() <= before + 1000


def test_going_on_with_chosen_variations(generator, prompt):
    composition = generator.compose(prompt, seed=5, variations=3)
    list(composition.stream(3.0))
    composition.keep([2, 0])
    last = list(composition.stream(2.0))[-1]
    assert last.seeds == (7, 5)
    for seed, piece in zip(last.seeds, last.performances, strict=True):
        assert piece == generator.generate(prompt, seconds=5.0, seed=seed)
    for wrong in ([], [2], [-1]):
        with pytest.raises(GenerationError, match=r"0\.\.1"):
            composition.keep(wrong)


def test_final_notes_do_not_change(generator, prompt):
    chunks = list(generator.stream(prompt, seconds=20.0, seed=4))
    whole = chunks[-1].performance
    finals = [chunk.final_s[0] for chunk in chunks]
    assert finals == sorted(finals)
    for chunk in chunks:
        final = chunk.performance.onset_s < chunk.final_s[0]
        assert chunk.performance.select(final) == whole.select(whole.onset_s < chunk.final_s[0])
    assert any((chunk.performance.onset_s >= chunk.final_s[0]).any() for chunk in chunks)  # some still sound


def test_until_when_music_is_final():
    on, off, wait = vocabulary.NOTE_ON, vocabulary.NOTE_OFF, vocabulary.TIME_SHIFT + 99  # a second
    tokens = [vocabulary.START, vocabulary.VELOCITY, on + 60, wait, on + 64, wait, on + 60, wait]
    after = {
        8: 0.0,
        9: 1.0,
        10: 2.0,
        11: 3.0,
    }  # note-offs end the older of the two at pitch 60, then 64, then the other
    for length, until_s in after.items():
        made = np.array([*tokens, off + 60, off + 64, off + 60][:length])
        assert final_until_s(made) == until_s


def test_the_budget_that_keeps_a_speed(generator, monkeypatch):
    seconds = {8: 0.001, 16: 0.0025, 32: 0.004}  # a token; interpolation promises 0.002 at 16
    asked = []

    def seconds_per_token(latents, variations=1, mode="sliding"):
        asked.append((latents, variations, mode))
        return seconds[latents]

    monkeypatch.setattr(generator, "seconds_per_token", seconds_per_token)
    monkeypatch.setattr("music_ar.generator._SMALLEST_AUTO", 8)
    fastest = 1 / (MAESTRO_TOKENS_PER_S * 0.001)  # times real time at 8 latents
    assert generator.calibrate(fastest * 0.2) == 32
    assert generator.calibrate(fastest * 0.3) == 16
    assert generator.calibrate(fastest * 0.4) == 8  # 16 does not keep what the interpolation promised
    assert generator.calibrate(fastest * 0.8, variations=4, mode="exact") == 8
    assert generator.calibrate(fastest * 5) == 8  # none keeps it
    assert (8, 4, "exact") in asked
    dense = np.concatenate([[vocabulary.START], np.tile([200, 100, 258], 500)])  # more tokens a second than MAESTRO
    assert generator.calibrate(fastest * 0.2, dense) < 32


def test_auto_calibrates_on_this_machine(generator):
    slow = generator.compose(latents="auto", speed=1e-6, seed=1)
    assert slow.latents == generator.model.config.latents
    assert generator.compose(latents="auto", speed=1e6, seed=1).latents <= slow.latents
    expected = generator.generate(seconds=3.0, latents=slow.latents, seed=1)
    assert generator.generate(seconds=3.0, latents="auto", speed=1e-6, seed=1) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latents": 33}, r"2\.\.32"),
        ({"latents": 1}, r"2\.\.32"),
        ({"seconds": 0.0}, "seconds"),
        ({"seconds": float("inf")}, "seconds"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**31}, "seed"),
        ({"seed": 2**31 - 2, "variations": 3}, "seed"),
        ({"variations": 0}, "variations"),
        ({"speed": 2.0}, "auto"),
        ({"latents": "auto", "speed": 0.0}, "speed"),
        ({"prompt_seconds": 3.0}, "prompt"),
    ],
)
def test_requests_that_cannot_be_met(generator, options, message):
    with pytest.raises(GenerationError, match=message):
        generator.stream(**options)


def test_an_unknown_mode(generator):
    with pytest.raises((GenerationError, TypeCheckError), match="exact"):  # the tests check types before we can
        generator.stream(mode="other")


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


def test_many_pieces_are_what_they_are_alone(generator, midi_file):
    """Whatever is made before and beside them, in the same size of batch."""
    requests = [
        Request(seed=0, seconds=2.0, latents=32),
        Request(seed=1, prompt=midi_file, seconds=1.0, latents=20, options=SamplingOptions(temperature=0.7)),
        Request(seed=2, seconds=4.0, latents=32, options=SamplingOptions(top_k=5)),
        Request(seed=3, prompt=midi_file, seconds=3.0, latents=32, options=SamplingOptions(top_p=0.5)),
        Request(seed=4, seconds=1.0, latents=8, mode="exact"),
    ]
    together = {piece.request.seed: piece for piece in generator.generate_many(requests, batch_size=2)}
    assert sorted(together) == [0, 1, 2, 3, 4]
    for request in requests:
        [alone] = generator.generate_many([request], batch_size=2)
        made = together[request.seed]
        assert made.performance == alone.performance
        assert (made.tokens, made.nats_per_token) == (alone.tokens, alone.nats_per_token)
        assert made.continuation.duration_s <= request.seconds


def test_many_pieces_are_what_generate_makes(generator):
    pieces = list(generator.generate_many([None], variations=3, seconds=2.0, seed=5, batch_size=3))
    for piece in pieces:
        assert piece.performance == generator.generate(seconds=2.0, seed=piece.request.seed)


def test_a_bad_prompt_costs_nobody_else(generator, midi_file):
    prompts = [b"no MIDI", midi_file, b""]
    pieces = list(generator.generate_many(prompts, seconds=1.0, seed=0, batch_size=2))
    assert [piece.error is None for piece in pieces].count(True) == 1
    assert any("not a MIDI file" in (piece.error or "") for piece in pieces)
