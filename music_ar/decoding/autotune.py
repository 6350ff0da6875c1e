"""Latency autotuning: the best setting with which this machine reaches a given speed."""

import time

import numpy as np
from jaxtyping import Int

from music_ar.decoding.budget import Frontier, Setting
from music_ar.decoding.interface import AnyDecoder, depth_of, shared_options
from music_ar.decoding.sampling import SamplingOptions
from music_ar.decoding.windows import cache_size
from music_ar.tokens import vocabulary
from music_ar.tokens.codec import length_steps

MAESTRO_TOKENS_PER_S = 40.0
"""Event tokens per second of real music, on average over MAESTRO's train split."""
# A prompt shorter than this says little about how many tokens its music needs.
_LEAST_PROMPT_S = 10.0
# Measured speed must exceed the requested one by this factor, since the load of a machine varies.
_SPEED_MARGIN = 1.15
_LEAST_LATENTS = 64
_MEASURED_S = 0.3


class Autotuner:
    """Times decoding steps, once for each setting.

    Args:
        decoder: the model.
    """

    def __init__(self, decoder: AnyDecoder):
        self._decoder = decoder
        self._seconds_per_token: dict[tuple[Setting, int], float] = {}

    def setting(
        self, speed: float, frontier: Frontier, prompt: Int[np.ndarray, " P"] | None = None, *, variations: int = 1
    ) -> Setting:
        """The best measured setting that reaches a speed; the cheapest if none does.

        Args:
            speed: seconds of music to generate per second, in each variation.
            frontier: the settings, at least one.
            prompt: as of `latents`.
            variations: samples generated at once.
        """
        longest_s = _longest_s(speed, prompt)

        def seconds(setting: Setting) -> float:
            latents, layers, tolerance = setting
            return self.seconds_per_token(latents, variations, layers=layers, tolerance=tolerance)

        full_s = seconds(frontier.settings[-1].setting) / frontier.settings[-1].cost
        fast = [measured.setting for measured in frontier.settings if measured.cost * full_s <= longest_s]
        while len(fast) > 1 and seconds(fast[-1]) > longest_s:
            fast.pop()
        return fast[-1] if fast else frontier.settings[0].setting

    def latents(
        self,
        speed: float,
        prompt: Int[np.ndarray, " P"] | None = None,
        *,
        variations: int = 1,
        layers: int | None = None,
        tolerance: float = 0.0,
    ) -> int:
        """The largest number of latents that reaches a speed, in powers of two; the smallest if none does.

        Args:
            speed: seconds of music to generate per second, in each variation.
            prompt: tokens of the prompt; if it is long enough, its own tokens per second set the pace, otherwise
                MAESTRO's.
            variations: samples generated at once.
            layers, tolerance: see `Setting`.
        """
        longest_s = _longest_s(speed, prompt)

        def seconds(latents: int) -> float:
            return self.seconds_per_token(latents, variations, layers=layers, tolerance=tolerance)

        most = self._decoder.config.most_latents
        candidates = [min(_LEAST_LATENTS, most)]
        while 2 * candidates[-1] <= most:
            candidates.append(2 * candidates[-1])
        least_s, most_s = seconds(candidates[0]), seconds(candidates[-1])
        # A step reads its caches, so its time is linear in their size.
        slope = (most_s - least_s) / max(candidates[-1] - candidates[0], 1)
        fast = [n for n in candidates if least_s + slope * (n - candidates[0]) <= longest_s]
        while len(fast) > 1 and seconds(fast[-1]) > longest_s:
            fast.pop()
        return fast[-1] if fast else candidates[0]

    def seconds_per_token(
        self,
        latents: int,
        variations: int = 1,
        *,
        layers: int | None = None,
        tolerance: float = 0.0,
        again: bool = False,
    ) -> float:
        """Seconds per step on this machine: the median over 0.3 s of chunks, at least three.

        Args:
            latents: number of latents.
            variations: samples generated at once.
            layers, tolerance: see `Setting`.
            again: measure again, since a machine that was busy looks slow.
        """
        setting = Setting(latents, depth_of(self._decoder.config, layers), tolerance)
        key = (setting._replace(latents=cache_size(latents)), variations)
        if again or key not in self._seconds_per_token:
            self._seconds_per_token[key] = self._measure(setting, variations)
        return self._seconds_per_token[key]

    def _measure(self, setting: Setting, variations: int) -> float:
        start = np.array([vocabulary.START], np.int32)
        options = shared_options(SamplingOptions())
        state = self._decoder.start(
            [start] * variations, seeds=range(variations), limit_steps=2**30, **setting._asdict()
        )
        length, spent_s = self._decoder.backend.chunk_tokens(variations), []
        while len(spent_s) < 4 or sum(spent_s[1:]) < _MEASURED_S:  # the first one compiles
            began_s = time.perf_counter()
            state, tokens = self._decoder.decode(state, options, length=length)
            np.asarray(tokens)
            spent_s.append(time.perf_counter() - began_s)
        return float(np.median(spent_s[1:])) / length


def _longest_s(speed: float, prompt: Int[np.ndarray, " P"] | None) -> float:
    """The longest time for a token with which a speed is reached."""
    return 1 / (speed * _tokens_per_s(prompt) * _SPEED_MARGIN)


def _tokens_per_s(prompt: Int[np.ndarray, " P"] | None) -> float:
    length_s = 0.0 if prompt is None else length_steps(prompt) / vocabulary.STEPS_PER_SECOND
    return MAESTRO_TOKENS_PER_S if prompt is None or length_s < _LEAST_PROMPT_S else len(prompt) / length_s
