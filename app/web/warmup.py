"""Measure the model's speed on this machine, and compile its programs, before anyone has to wait for that."""

import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from app.web.memory import release_freed_memory
from app.web.settings import AUTO
from music_ar import Generator, Performance, encode, read_midi
from music_ar.decoding.autotune import MAESTRO_TOKENS_PER_S
from music_ar.decoding.budget import Measured, Setting
from music_ar.decoding.request import DEFAULT_SPEED, Request
from music_ar.decoding.windows import cache_size

_AS_GOOD, _NEARLY_AS_GOOD = 0.005, 0.06  # nats per token
_BUDGETS = (256, 512, 1024, 2048)  # that "auto" chooses from; 64 is hardly faster and costs 0.16 nats per token
_PROMPT_NOTES = (100, 50, 800, 1600, 20)  # of prompts to compile for, besides the examples: one per program
_VARIATIONS = (1, 2, 4, 3, 8, 6, 5, 7)  # in this order: the most likely first
_MAX_PROGRAMS = 6  # each compiled program takes 50 to 140 MB


class Machine:
    """The model's speed on this machine, and the compiled programs that are kept.

    Args:
        generator: generates the music.
        curve: rows of `curve.json`, if known: the NLL in nats per token at each latent budget.
        prompt_notes: lengths of the prompts that `warm_up_further` compiles for, in notes.
        variations: the numbers of variations that it measures.
        max_programs: maximum number of compiled programs to keep.

    Attributes:
        warm: whether `warm_up_further` has finished.
    """

    def __init__(
        self,
        generator: Generator,
        curve: list[dict[str, Any]] | None = None,
        *,
        prompt_notes: tuple[int, ...] = _PROMPT_NOTES,
        variations: tuple[int, ...] = _VARIATIONS,
        max_programs: int = _MAX_PROGRAMS,
    ):
        self.generator = generator
        self.most_latents = generator.config.most_latents
        self.warm = False
        self._nll = {
            int(row["latents"]): float(row["nats_per_token"])
            for row in curve or []
            if row.get("mode", "sliding") == "sliding"
            and row.get("layers", generator.config.layers) == generator.config.layers
            and row.get("tolerance", 0) == 0
        }
        self._prompt_notes, self._variations, self._max_programs = prompt_notes, variations, max_programs
        self._measuring = threading.Lock()
        self._measured = {1}
        self._programs: set[tuple[int, int]] = set()

    def warm_up(self, prompts: Iterable[Path] = ()) -> None:
        """Measure the speed, and compile what new pieces and prompts like these need.

        This also covers prompts of half their length, and of the same length with more or fewer notes.
        """
        whole = list(map(read_midi, prompts))
        for prompt in (None, *whole, *(prompt.crop(0, prompt.duration_s / 2) for prompt in whole)):
            for latents in {self.auto_budget(None, 1), self.auto_budget(prompt, 1)}:
                self._try(prompt, latents)

    def warm_up_further(self, prompts: Iterable[Path], ended: threading.Event, activity: "Activity") -> None:
        """Measure more variations and compile for other prompts, while the page is idle and until `ended` is set.

        The programs take much memory, so all but those of `warm_up` are then dropped. JAX keeps them in its cache on
        disk and loads them from there when they are needed.
        """
        for notes in self._prompt_notes:
            if activity.wait_until_idle(ended):
                self._try(_even_notes(notes), self.auto_budget(None, 1))
        for variations in self._variations:
            for latents in sorted({min(budget, self.most_latents) for budget in (64, *_BUDGETS)}):
                self._measure_undisturbed(latents, variations, ended, activity)
            if not ended.is_set():
                self._measured.add(variations)
        if activity.wait_until_idle(ended):
            self._drop_programs()
            self.warm_up(prompts)
            self.warm = True

    def _measure_undisturbed(self, latents: int, variations: int, ended: threading.Event, activity: "Activity") -> None:
        while activity.wait_until_idle(ended):
            runs = activity.runs
            with self._measuring:
                self.make_room(latents, variations)
                self.generator.autotuner.seconds_per_token(latents, variations, again=True)
            if activity.runs == runs:  # otherwise a run has disturbed the measurement
                return

    def make_room(self, latents: int, variations: int) -> None:
        """Drop the compiled programs if the one for these settings would be one too many."""
        program = cache_size(latents), variations
        if program not in self._programs and len(self._programs) >= self._max_programs:
            self._drop_programs()
        self._programs.add(program)

    def _drop_programs(self) -> None:
        self._programs.clear()
        self.generator.decoder.free_programs()
        release_freed_memory()

    def _try(self, prompt: Performance | None, latents: int) -> None:
        self.make_room(latents, 1)
        for _ in self.generator.stream(prompt, seconds=0.01, latents=latents, seed=0):
            pass

    @functools.cached_property
    def _frontier(self) -> tuple[Measured, ...]:
        """What a latent budget chooses from, if it buys layers too; otherwise empty."""
        settings = self.generator.frontier.settings if self.generator.config.exits else ()
        return settings if len(settings) > 1 else ()

    def spend(self, request: Request) -> Request:
        """The request with what its latent budget buys: so many latents or, if the model has exits, latents and layers.

        With exits, budgets divide the costs from the cheapest measured setting to the full one into even steps.
        """
        assert isinstance(request.latents, int)
        return dataclasses.replace(request, **self._bought(request.latents).setting._asdict())

    def _bought(self, budget: int) -> Measured:
        """A latent budget's setting; cost and likelihood are unknown (NaN) for a model without exits."""
        if not self._frontier:
            return Measured(Setting(budget, self.generator.config.layers), math.nan, math.nan)
        most = 1 - (1 - self._frontier[0].cost) * (1 - budget / self.most_latents)
        return [measured for measured in self._frontier if measured.cost <= max(most, self._frontier[0].cost)][-1]

    def budget_of(self, setting: Setting) -> int:
        """The smallest latent budget that buys a setting."""
        cost = next((measured.cost for measured in self._frontier if measured.setting == setting), None)
        if cost is None:
            return setting.latents
        share = 1 - (1 - cost) / (1 - self._frontier[0].cost)
        return max(2, math.ceil(share * self.most_latents - 1e-6))

    def _affordable(self, prompt: Performance | None, variations: int) -> int:
        """The latent budget of the best setting that keeps ahead of playback."""
        tokens = [None] if prompt is None else [None, encode(prompt)]
        settings = (
            self.generator.autotuner.setting(DEFAULT_SPEED, self.generator.frontier, each, variations=variations)
            for each in tokens
        )
        return min(map(self.budget_of, settings))

    def auto_budget(self, prompt: Performance | None, variations: int) -> int:
        """The largest latent budget that keeps ahead of playback, even if the music gets denser than its prompt."""
        with self._measuring if variations not in self._measured else nullcontext():
            if self._frontier:
                return self._affordable(prompt, variations)
            autotuner = self.generator.autotuner
            budget = autotuner.latents(DEFAULT_SPEED, variations=variations)
            if prompt is not None:
                budget = min(budget, autotuner.latents(DEFAULT_SPEED, encode(prompt), variations=variations))
        self._measured.add(variations)
        return max(budget, min(_BUDGETS[0], self.most_latents))

    def knows(self, variations: int) -> bool:
        """Whether the speed of this number of variations has been measured."""
        return variations in self._measured

    def tokens_per_s(self, latents: int, variations: int = 1) -> float:
        """The estimated speed of each variation at a latent budget, interpolated between measurements."""
        least, most = min(64, self.most_latents), self.most_latents
        if self._frontier:
            full_s = self.generator.autotuner.seconds_per_token(most, variations)
            return 1 / (full_s * self._bought(latents).cost)
        slow_s, fast_s = (self.generator.autotuner.seconds_per_token(n, variations) for n in (most, least))
        share = (latents - least) / max(most - least, 1)
        return 1 / max(fast_s + share * (slow_s - fast_s), 0.5 * fast_s)

    def in_short(self, latents: int, variations: int = 1, prompt: Performance | None = None) -> str:
        """What a latent budget means here to someone who plays: whether it plays at once, and how coherent it is."""
        if not self.knows(variations):
            return self.cost(latents, variations)
        budget = self.auto_budget(prompt, variations) if latents == AUTO else max(2, latents)
        keeps_up = self.tokens_per_s(budget, variations) >= MAESTRO_TOKENS_PER_S
        fits = f"**Auto**: {budget:,} latents fit this machine. " if latents == AUTO else ""
        plays = "Plays at once." if keeps_up else "Playback pauses now and then to wait for more music."
        loss = self._loss(budget)
        if loss is None:
            return fits + plays
        if loss < _AS_GOOD:
            return f"{fits}{plays} Best coherence."
        coherence = "Almost the best coherence." if loss < _NEARLY_AS_GOOD else "Less than the best coherence."
        return f"{fits}{plays} {coherence}"

    def cost(self, latents: int, variations: int = 1, prompt: Performance | None = None) -> str:
        """One line on the speed and quality of a latent budget here; what "auto" chooses depends on the prompt."""
        if not self.knows(variations):
            return f"Measuring how fast {variations} pieces at once are on this machine …"
        budget = self.auto_budget(prompt, variations) if latents == AUTO else max(2, latents)
        each = self.tokens_per_s(budget, variations)
        bought = self._bought(budget).setting.in_words(self.generator.config)
        chosen = f"**Auto** chooses {bought}" if latents == AUTO else bought
        times = each / MAESTRO_TOKENS_PER_S
        if variations > 1:
            text = f"{chosen}: music comes about {times:.1f}× as fast as it plays, in each of {variations} at once."
        else:
            text = f"{chosen}: music comes about {times:.1f}× as fast as it plays."
        text += self._quality(budget)
        if each < MAESTRO_TOKENS_PER_S:
            text += " Playback will pause now and then to wait for more music."
        return text

    def _quality(self, latents: int) -> str:
        loss = self._loss(latents)
        if loss is None:
            return ""
        if loss < _AS_GOOD:
            return " Best quality."
        if loss < _NEARLY_AS_GOOD:
            return f" Almost the best quality ({loss:.2f} nats per token worse)."
        return f" Less coherent than with more ({loss:.2f} nats per token worse)."

    def _loss(self, latents: int) -> float | None:
        """How much worse the music is predicted than with the best budget, in nats per token; None if not known."""
        if not self._nll:
            return None
        nearest = min(self._nll, key=lambda n: abs(math.log(n / latents)))
        nll = self._bought(latents).nats_per_token if self._frontier else self._nll[nearest]
        return nll - min(self._nll.values())


class Activity:
    """Whether anyone is generating music.

    Args:
        busy: whether a run is in progress.

    Attributes:
        runs: number of runs that have begun.
    """

    def __init__(self, busy: Callable[[], bool]):
        self._busy = busy
        self.runs = 0

    def wait_until_idle(self, ended: threading.Event) -> bool:
        """Wait until no run is in progress. False once `ended` is set."""
        while not ended.is_set():
            if not self._busy():
                return True
            ended.wait(0.5)
        return False


def _even_notes(number: int) -> Performance:
    """A scale of single notes; each takes four tokens."""
    onset_s = 0.2 * np.arange(number)
    pitch = 60 + np.arange(number) % 12
    return Performance(onset_s=onset_s, offset_s=onset_s + 0.1, pitch=pitch, velocity=np.full(number, 64))
