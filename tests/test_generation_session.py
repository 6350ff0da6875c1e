"""`Session`: chunks, and what it continues with after it was stopped, extended or narrowed down."""

import gc
import itertools
import tracemalloc

import jax
import numpy as np
import pytest
from conftest import make_performance

from music_ar.decoding.request import GenerationError
from music_ar.generator import Generator
from music_ar.tokens import codec, vocabulary


@pytest.fixture(scope="module")
def generator(decoder):
    return Generator(decoder)


@pytest.fixture(scope="module")
def prompt():
    """In whole steps and lowest velocities of bins, so that tokens hold it exactly."""
    return codec.decode(codec.encode(make_performance(3, notes=40)))


def last(iterator):
    *_, chunk = iterator
    return chunk


def test_chunks_grow_into_the_piece(generator):
    chunks = list(generator.stream(seconds=20.0, seed=2, top_p=1.0))
    assert len(chunks) > 2
    assert [chunk.finished for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    for before, after in itertools.pairwise(chunks):
        assert before.seconds_made <= after.seconds_made <= after.seconds_wanted == 20.0
        assert before.tokens < after.tokens
        notes = len(before.performance)
        np.testing.assert_array_equal(after.performance.onset_s[:notes], before.performance.onset_s)
    assert chunks[-1].eta_s == 0.0
    assert all(chunk.eta_s > 0 and chunk.tokens_per_s > 0 for chunk in chunks[:-1])
    assert chunks[-1].performance == generator.generate(seconds=20.0, seed=2, top_p=1.0)


def test_final_notes_do_not_change(generator, prompt):
    chunks = list(generator.stream(prompt, seconds=20.0, seed=4))
    whole = chunks[-1].performance
    final_s = [chunk.final_s[0] for chunk in chunks]
    assert final_s == sorted(final_s)
    for chunk in chunks:
        final = chunk.performance.onset_s < chunk.final_s[0]
        assert chunk.performance.select(final) == whole.select(whole.onset_s < chunk.final_s[0])
    assert any((chunk.performance.onset_s >= chunk.final_s[0]).any() for chunk in chunks)  # some still sound


def test_added_and_open_notes_are_the_piece(generator, prompt):
    """Also after the session was extended, and for each variation."""
    session, added = generator.session(prompt, seed=4, variations=2), [[], []]
    for chunk in itertools.chain(session.extend(6.0), session.extend(4.0)):
        for number, piece in enumerate(chunk.performances):
            added[number].append(chunk.added[number])
            parts = [*added[number], chunk.open[number]]
            assert sum(map(len, parts)) == len(piece)
            onset_s = np.concatenate([part.onset_s for part in added[number]])
            np.testing.assert_array_equal(onset_s, piece.onset_s[piece.onset_s < chunk.final_s[number]])


def test_times_of_a_continuation_count_from_where_the_prompt_ended(generator, prompt):
    session = generator.session(prompt, prompt_seconds=3.0, seed=4)
    alone = generator.stream(prompt, prompt_seconds=3.0, seed=4, seconds=5.0, continuation_only=True)
    for whole, chunk in zip(session.extend(5.0), alone, strict=True):
        assert chunk.final_s[0] == pytest.approx(whole.final_s[0] - session.prompt_s)
        assert chunk.performance == whole.performance.crop(session.prompt_s, session.prompt_s + 5.0)
    assert any(chunk.final_s[0] > 0 for chunk in generator.stream(seed=4, seconds=5.0, continuation_only=True))


@pytest.mark.parametrize("variations", [1, 3])
def test_an_extended_session_is_as_if_never_interrupted(generator, prompt, variations):
    """Three times past the context, with notes that sound at each join."""
    options = {"seed": 3, "variations": variations, "top_p": 1.0}
    session = generator.session(prompt, **options)
    for seconds in (5.0, 7.0, 9.0):
        extended = last(session.extend(seconds))
    whole = last(generator.stream(prompt, seconds=21.0, **options))
    assert extended.performances == whole.performances
    assert extended.seconds_wanted == 21.0
    joins_s = [session.prompt_s + 5.0, session.prompt_s + 12.0]
    piece = whole.performance
    assert all(((piece.onset_s < join_s) & (piece.offset_s > join_s)).any() for join_s in joins_s)


def test_a_session_that_was_stopped_continues_from_there(generator):
    session = generator.session(seed=2, top_p=1.0)
    whole = list(generator.stream(seconds=20.0, seed=2, top_p=1.0))
    first = next(session.extend(20.0))
    assert first.performance == whole[0].performance
    assert not first.finished
    rest = last(session.extend(20.0 - first.seconds_made))
    assert rest.performance == whole[-1].performance


def test_a_session_knows_where_generated_music_begins(generator, prompt):
    session = generator.session(prompt, prompt_seconds=3.0, seed=3, latents=20, variations=3)
    within = np.concatenate([prompt.onset_s, prompt.offset_s])
    assert session.prompt_s == within[within <= 3.0].max()
    assert (session.seeds, session.latents, session.ended) == ((3, 4, 5), 20, (False,) * 3)
    assert generator.session(seed=0).prompt_s == 0.0


def test_chosen_variations_continue(generator, prompt):
    session = generator.session(prompt, seed=5, variations=3)
    last(session.extend(3.0))
    session.keep([2, 0])
    chunk = last(session.extend(2.0))
    assert chunk.seeds == session.seeds == (7, 5)
    for seed, piece in zip(chunk.seeds, chunk.performances, strict=True):
        assert piece == generator.generate(prompt, seconds=5.0, seed=seed)
    for wrong in ([], [2], [-1]):
        with pytest.raises(GenerationError, match=r"0\.\.1"):
            session.keep(wrong)


@pytest.fixture
def live_bytes():
    """A function that counts what JAX's and NumPy's arrays hold."""

    numpys = tracemalloc.DomainFilter(inclusive=True, domain=np.lib.tracemalloc_domain)

    def count():
        gc.collect()
        of_numpy = tracemalloc.take_snapshot().filter_traces([numpys]).traces
        return sum(array.nbytes for array in jax.live_arrays()) + sum(trace.size for trace in of_numpy)

    tracemalloc.start()
    yield count
    tracemalloc.stop()


def test_closing_frees_the_device(generator, live_bytes):
    last(generator.stream(seconds=3.0, seed=2))  # whatever is made once and kept
    before = live_bytes()
    session = generator.session(seed=2)
    stream = session.extend(20.0)
    next(stream)
    assert live_bytes() > before + 10_000  # the caches
    session.close()
    assert live_bytes() <= before + 1000  # the sampling options
    assert list(stream) == []
    for use in (lambda: session.extend(1.0), lambda: session.keep([0])):
        with pytest.raises(GenerationError, match="closed"):
            use()
    dropped = generator.stream(seconds=20.0, seed=2)
    next(dropped)
    dropped.close()
    assert live_bytes() <= before + 1000


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_only_a_length_extends(generator, seconds):
    with pytest.raises(GenerationError, match="seconds must be a number above 0"):
        generator.session(seed=2).extend(seconds)


def without_time(decode):
    """Decoding in which every token is a velocity or a note-on."""

    def stuck(*arguments, **options):
        state, tokens, *rest = decode(*arguments, **options)
        notes = np.resize(np.array([vocabulary.VELOCITY + 5, vocabulary.NOTE_ON + 60], np.int32), tokens.shape)
        return state, tokens * 0 + notes, *rest

    return stuck


def test_a_piece_that_never_lets_time_pass_has_failed(tiny_checkpoint, monkeypatch):
    generator = Generator.from_pretrained(tiny_checkpoint)
    for name in ("decode", "decode_scored"):
        monkeypatch.setattr(generator.decoder, name, without_time(getattr(generator.decoder, name)))
    with pytest.raises(GenerationError, match=r"events for 0\.0 s of music and hardly lets"):
        generator.generate(seconds=3000.0, seed=0)
    [piece] = generator.generate_many([None], seconds=3000.0, seed=0, batch_size=1)
    assert "hardly lets time pass" in (piece.error or "")
    assert len(piece.performance) == 0
