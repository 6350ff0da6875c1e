"""The budget of a model: which settings of latents, layers and early exits are best at each cost.

They are measured once by `music-ar bench decode`, and come with the model as `curve.json`. This module does not import
JAX.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

from music_ar.decoding.interface import depth_of
from music_ar.decoding.request import Request
from music_ar.files import parse_json
from music_ar.model.config import ModelConfig
from music_ar.model.weights import CheckpointError


class Setting(NamedTuple):
    """How much of the model decodes a token.

    Attributes:
        latents: number of latents.
        layers: number of self-attention layers, one of `ModelConfig.depths`.
        tolerance: a token leaves early at the first exit where that is expected to cost fewer nats; at 0 none does.
    """

    latents: int
    layers: int
    tolerance: float = 0.0

    def in_words(self, config: ModelConfig) -> str:
        """The setting as it is shown; layers are named if they are not all."""
        text = f"{self.latents} latents"
        if self.layers < config.layers:
            text += f", {self.layers} of {config.layers} layers"
        return f"{text}, fewer layers for easy events ({self.tolerance:g} nats)" if self.tolerance else text


def setting_of(request: Request, config: ModelConfig) -> Setting:
    """The setting of a request with a number of latents; see `Generator.setting`."""
    assert isinstance(request.latents, int)
    return Setting(request.latents, depth_of(config, request.layers), request.tolerance)


class Measured(NamedTuple):
    """A setting with what it costs and gives.

    Attributes:
        setting: the setting.
        cost: time for a token, as a share of the time with all latents and layers.
        nats_per_token: NLL of real music through the decoder.
    """

    setting: Setting
    cost: float
    nats_per_token: float


@dataclasses.dataclass(frozen=True)
class Frontier:
    """The best measured settings, in rising order of cost and quality; empty if none were measured."""

    settings: tuple[Measured, ...] = ()

    @classmethod
    def of(cls, rows: Iterable[dict[str, Any]], config: ModelConfig) -> "Frontier":
        """The frontier of some rows of `curve.json`.

        Those count that were scored and timed with one piece at a time, the model's own context and sliding windows.
        Rows without layers were measured with all of them.
        """
        timed = [
            (Setting(row["latents"], row.get("layers", config.layers), row.get("tolerance", 0.0)), row)
            for row in rows
            if row["nats_per_token"] is not None
            and (row["batch"], row["context"]) == (1, config.reach)
            and row.get("mode", "sliding") == "sliding"
        ]
        speeds = {setting: row["tokens_per_s"] for setting, row in timed}
        full = speeds.get(Setting(config.most_latents, config.layers))
        if full is None:
            return cls()
        measured = [
            Measured(setting, full / row["tokens_per_s"], row["nats_per_token"])
            for setting, row in timed
            if setting.layers in config.depths and 2 <= setting.latents <= config.most_latents
        ]
        measured.sort(key=lambda each: (each.cost, each.nats_per_token))
        least = itertools.accumulate((each.nats_per_token for each in measured), min)
        before = itertools.chain([float("inf")], least)
        return cls(tuple(each for each, nats in zip(measured, before, strict=False) if each.nats_per_token < nats))

    @classmethod
    def read(cls, text: str, config: ModelConfig) -> "Frontier":
        """The frontier in the text of a model's `curve.json`; empty if the model has none.

        Raises:
            CheckpointError: the file is damaged.
        """
        if not text:
            return cls()
        try:
            return cls.of(parse_json(text.encode())["rows"], config)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"curve.json, which comes with the model, is damaged: {error}; fetch it again"
            ) from error

    @functools.cached_property
    def least(self) -> float:
        """The lowest budget: the cost of the cheapest setting."""
        return self.settings[0].cost

    def best(self, budget: float) -> Setting | None:
        """The best setting that costs no more than `budget`, a share of the full cost; None if none does."""
        affordable = [measured.setting for measured in self.settings if measured.cost <= budget]
        return affordable[-1] if affordable else None
