"""Choosing each phrase from several: which one is kept, and that a piece depends on its own request alone."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from music_ar import GenerationError, Generator, Performance, Request
from music_ar.decoding.backend import Backend
from music_ar.decoding.choosing import PHRASE_S, ChoosingDecoder
from music_ar.decoding.decoder import Decoder
from music_ar.decoding.interface import shared_options
from music_ar.decoding.sampling import SamplingOptions
from music_ar.model.pretrained import load_pretrained
from music_ar.tokens import codec, vocabulary
from music_ar.tokens.vocabulary import END, PAD, START

THEME = (60, 64, 62, 65, 71, 67, 61, 70)
OTHER = (60, 61, 62, 63, 64, 65, 66, 67)


def melody(pitches, note_s=1.0):
    """Tokens of a melody, one note after another."""
    onset_s = np.arange(len(pitches)) * note_s
    notes = {"onset_s": onset_s, "offset_s": onset_s + note_s, "pitch": np.array(pitches)}
    return codec.encode(Performance(**notes, velocity=np.full(len(pitches), 80)))


@dataclasses.dataclass(frozen=True)
class ScriptedState:
    """Rows that play what belongs to their place among the rows that were begun with one seed after another."""

    limits: tuple[int, ...]
    seeds: tuple[int, ...]
    steps: tuple[int, ...]
    ended: tuple[bool, ...]
    layers_run_B = None

    @property
    def done_B(self):
        return np.array([e or s >= n for e, s, n in zip(self.ended, self.steps, self.limits, strict=True)])

    def with_limit(self, limit_steps):
        return dataclasses.replace(self, limits=(limit_steps,) * len(self.limits))

    def with_seeds(self, seeds):
        return dataclasses.replace(self, seeds=tuple(seeds))

    def with_ended(self, ended_B):
        return dataclasses.replace(self, ended=tuple(map(bool, ended_B)))

    def rows(self, rows):
        return ScriptedState(*(tuple(each[row] for row in rows) for each in self._columns()))

    def replaced(self, row, newcomer):
        pairs = zip(self._columns(), newcomer._columns(), strict=True)
        return ScriptedState(*((*old[:row], new[0], *old[row + 1 :]) for old, new in pairs))

    def _columns(self) -> Any:
        return self.limits, self.seeds, self.steps, self.ended


class ScriptedDecoder:
    """A model that plays one of its phrases in each row, whole: the next one for each seed that it meets."""

    config = backend = None

    def __init__(self, *phrases):
        self.phrases, self.met = phrases, {}

    def start(self, prompts, *, seeds, limit_steps, **_):
        count = len(prompts)
        return ScriptedState((limit_steps,) * count, tuple(seeds), (0,) * count, (False,) * count)

    def decode_scored(self, state, options, *, length):  # noqa: ARG002
        played = [
            np.zeros(0, np.int32)
            if done
            else self.phrases[self.met.setdefault(seed, len(self.met)) % len(self.phrases)]
            for seed, done in zip(state.seeds, state.done_B, strict=True)
        ]
        longest = max(map(len, played))
        tokens = np.stack([np.pad(each, (0, longest - len(each)), constant_values=PAD) for each in played])
        steps = tuple(s + codec.length_steps(each) for s, each in zip(state.steps, played, strict=True))
        ended = tuple(e or END in each for e, each in zip(state.ended, played, strict=True))
        nats = np.where(tokens == PAD, 0, tokens).astype(np.float32)
        return dataclasses.replace(state, steps=steps, ended=ended), tokens, nats


def first_phrase(*phrases):
    """The tokens that are kept of phrases that follow the theme, with their NLL."""
    decoder = ChoosingDecoder(ScriptedDecoder(*phrases), len(phrases))
    prompt = np.concatenate([[START], melody(THEME)])
    state = decoder.start([prompt], latents=4, seeds=[0], limit_steps=10**6)
    _, tokens, nats = decoder.decode_scored(state, {}, length=16)
    return tokens[0], nats[0]


def test_the_phrase_with_the_most_of_the_theme_is_kept_in_any_key_and_tempo():
    returning = melody([pitch + 5 for pitch in THEME], note_s=1.1)
    halfway = melody([*(pitch - 2 for pitch in THEME[:6]), 30, 31, 33], note_s=0.95)
    tokens, nats = first_phrase(melody(OTHER), halfway, returning, melody(OTHER))
    np.testing.assert_array_equal(tokens, returning)
    np.testing.assert_array_equal(nats, returning)  # the script's NLL
    np.testing.assert_array_equal(first_phrase(melody(OTHER), halfway)[0], halfway)


def test_of_equals_the_first_is_kept():
    first, second = melody([40, 52] * 4), melody([41, 53] * 4)
    np.testing.assert_array_equal(first_phrase(first, second)[0], first)


def test_a_piece_ends_as_often_as_without_a_choice():
    """If the first phrase ends it; no other phrase does, whatever it plays."""
    ending = np.append(melody(THEME), END)
    np.testing.assert_array_equal(first_phrase(np.append(melody(OTHER), END), melody(THEME))[0][-1], END)
    np.testing.assert_array_equal(first_phrase(melody(OTHER), ending)[0], melody(OTHER))


def test_a_phrase_in_which_time_stands_still_is_not_kept():
    stuck = np.tile(melody(THEME, note_s=0.01)[:4], 2000)
    stuck = stuck[~vocabulary.is_shift(stuck)]
    np.testing.assert_array_equal(first_phrase(stuck, melody(OTHER))[0], melody(OTHER))


def test_a_run_may_begin_in_the_phrase_before():
    """Five notes of the theme end the prompt; one more note makes a run of six."""
    prompt = melody([*THEME, 20, *THEME[:5]])
    decoder = ChoosingDecoder(ScriptedDecoder(melody([THEME[4] + 1] * 8), melody([THEME[5]] * 8)), 2)
    state = decoder.start([np.concatenate([[START], prompt])], latents=4, seeds=[0], limit_steps=10**6)
    tokens = decoder.decode_scored(state, {}, length=16)[1][0]
    np.testing.assert_array_equal(tokens, melody([THEME[5]] * 8))


ASKED = Request(prompt=codec.decode(melody(THEME, note_s=0.3)), seconds=2 * PHRASE_S + 3, latents=8, choices=3)


def test_a_piece_depends_on_its_own_request_alone(tiny_checkpoint):
    """Alone, as a variation, in a batch with pieces of other lengths, and continued later."""
    generator = Generator.from_pretrained(tiny_checkpoint)
    alone = generator.generate(ASKED, seed=5)
    assert alone == generator.generate(ASKED, seed=5) != generator.generate(ASKED, seed=6)
    *_, both = generator.stream(ASKED, seed=4, variations=2)
    assert both.performances[1] == alone
    others = [
        Request.of(ASKED, seed=seed, seconds=seconds) for seed, seconds in ((1, 3.0), (2, 20.0), (5, ASKED.seconds))
    ]
    many = {piece.request.seed: piece.performance for piece in generator.generate_many(others, batch_size=2)}
    assert many[5] == alone
    session = generator.session(ASKED, seed=5)
    for seconds in (PHRASE_S, ASKED.seconds - PHRASE_S):
        *_, last = session.extend(seconds)
    assert last.performance.select(last.performance.onset_s < PHRASE_S) == alone.select(alone.onset_s < PHRASE_S)


def music_of(tokens_BxT):
    """The tokens of each row, without those that stand for nothing."""
    return [row[row != PAD].tolist() for row in np.asarray(tokens_BxT)]


def test_in_jax_rows_that_are_done_wait_for_the_others(tiny_checkpoint):
    """Made in two parts, each to its limit, a row is what it is when made at once."""
    decoder = Decoder(load_pretrained(tiny_checkpoint), Backend())
    options = shared_options(SamplingOptions())
    prompts = [np.array([START], np.int32)] * 3

    def started(limit_steps):
        return decoder.start(prompts, latents=8, seeds=range(3), limit_steps=limit_steps)

    _, at_once = decoder.decode(started(400), options, length=400)
    state, first = decoder.decode(started(150), options, length=300)
    assert np.asarray(state.done_B).all()
    assert len({len(row) for row in music_of(first)}) == 3
    for row in music_of(first):
        assert codec.length_steps(np.array(row[:-1])) < 150  # the last event reaches the limit
    state, second = decoder.decode(state.with_limit(400), options, length=400)
    assert np.asarray(state.done_B).all()
    parts = [a + b for a, b in zip(music_of(first), music_of(second), strict=True)]
    assert parts == music_of(at_once)


def test_choices_are_made_in_jax(tiny_checkpoint):
    decoder = ChoosingDecoder(Decoder(load_pretrained(tiny_checkpoint), Backend()), 2)
    prompt = np.concatenate([[START], melody(THEME, note_s=0.2)]).astype(np.int32)
    state = decoder.start([prompt, prompt], latents=8, seeds=[1, 2], limit_steps=1000)
    kept = [[], []]
    while not state.done_B.all():
        state, tokens, _ = decoder.decode_scored(state, shared_options(SamplingOptions()), length=16)
        for phrases, row in zip(kept, music_of(tokens), strict=True):
            if row:
                phrases.append(codec.length_steps(np.array(row)))
    for phrases in kept:
        assert len(phrases) == 2
        assert 800 <= phrases[0] < 900
        assert 1000 <= sum(phrases) < 1100
    assert Generator(decoder._decoder).generate(ASKED, seed=5).duration_s > ASKED.seconds


def test_one_choice_is_none(tiny_checkpoint):
    generator = Generator.from_pretrained(tiny_checkpoint)
    assert generator.generate(ASKED, seed=5, choices=1) == generator.generate(
        ASKED.prompt, seconds=ASKED.seconds, latents=8, seed=5
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"choices": 0}, "choices must be a whole number from 1 to 64, got 0"),
        ({"choices": 65}, "choices must be a whole number from 1 to 64, got 65"),
        ({"choices": 2, "after": Performance.empty(), "seconds": 5.0}, "choices are for music that goes on"),
    ],
)
def test_what_cannot_be_chosen_is_refused(options, message):
    with pytest.raises(GenerationError, match=message):
        Request(**options)
