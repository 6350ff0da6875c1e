"""The largest number of latents that keeps a speed: from given times, and on this machine."""

import dataclasses

import numpy as np
import pytest
from conftest import noisy_model
from event_tokens import SECOND, on, tokens_of

from music_ar.decoding.autotune import MAESTRO_TOKENS_PER_S, Autotuner
from music_ar.decoding.decoder import Decoder
from music_ar.generator import Generator
from music_ar.model.config import PRESETS
from music_ar.tokens.vocabulary import START

# Seconds per token. Interpolation promises 2 ms at 128 latents.
SECONDS = {64: 0.001, 128: 0.0025, 256: 0.004}


class Given(Autotuner):
    """Times that are given instead of measured."""

    def __init__(self, decoder):
        super().__init__(decoder)
        self.asked = set()

    def seconds_per_token(self, latents, variations=1, *, layers=None, tolerance=0.0, again=False):
        del layers, tolerance
        self.asked.add((latents, variations, again))
        return SECONDS[latents]


@pytest.fixture(scope="module")
def decoder():
    return Decoder(noisy_model(dataclasses.replace(PRESETS["tiny"], context=256, latents=256)))


# As many times real time as the smallest number of latents is fast.
FASTEST = 1 / (MAESTRO_TOKENS_PER_S * 0.001)


@pytest.mark.parametrize(
    ("speed", "latents"),
    [
        (0.2 * FASTEST, 256),
        (0.3 * FASTEST, 128),
        (0.4 * FASTEST, 64),  # 128 do not keep what interpolation promised
        (5 * FASTEST, 64),  # none keeps it
    ],
)
def test_the_largest_number_of_latents_that_keeps_the_speed(decoder, speed, latents):
    assert Given(decoder).latents(speed) == latents


def test_variations_are_timed_together(decoder):
    given = Given(decoder)
    given.latents(0.2 * FASTEST, variations=4)
    assert {variations for _, variations, _ in given.asked} == {4}


def test_a_long_prompt_says_how_many_tokens_its_music_needs(decoder):
    dense = np.concatenate([[START], np.tile([on(60), SECOND, *[on(61)] * 98], 20)]).astype(np.int32)
    assert Given(decoder).latents(0.2 * FASTEST, dense) < 256
    assert Given(decoder).latents(0.2 * FASTEST, dense[:900]) == 256  # 9 s say little
    assert Given(decoder).latents(2.0 * FASTEST, tokens_of(START, *[SECOND] * 20)) == 256  # a token a second


def test_steps_are_timed_once_on_this_machine(decoder, monkeypatch):
    """With a clock that gives each chunk a second more than the last: the median leaves out the first."""
    now, calls = iter(np.cumsum(np.arange(1000.0))), []

    def clock():
        calls.append(None)
        return next(now)

    monkeypatch.setattr("music_ar.decoding.autotune.time.perf_counter", clock)
    tuner, chunk = Autotuner(decoder), decoder.backend.chunk_tokens(1)
    measured = tuner.seconds_per_token(8)
    # Chunks take 1, 3, 5 and 7 s.
    assert measured == 5.0 / chunk
    count = len(calls)
    assert tuner.seconds_per_token(7) == measured  # of the same cache
    assert len(calls) == count
    assert tuner.seconds_per_token(8, again=True) > measured


def test_auto_is_the_number_that_the_tuner_finds(tiny_checkpoint):
    """Two times real time is kept by any machine, a million times by none; the model has 32 latents at the most."""
    generator = Generator.from_pretrained(tiny_checkpoint)
    generator.autotuner.seconds_per_token(32)
    slow = generator.session(latents="auto", speed=1e-6, seed=1)
    assert slow.latents == generator.config.latents
    expected = generator.generate(seconds=3.0, latents=slow.latents, seed=1)
    assert generator.generate(seconds=3.0, latents="auto", speed=1e-6, seed=1) == expected
