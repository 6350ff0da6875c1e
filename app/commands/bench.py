"""The command `music-ar bench`: measure decoding speed here, and what each setting costs in NLL."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from app.console import CommandError, Unset, check_options, print_table
from music_ar.ranges import MAX_SECONDS, number, whole

if TYPE_CHECKING:
    from app.commands.timing import DecodeRow, RenderRow
    from music_ar.decoding.budget import Setting
    from music_ar.model.config import ModelConfig
    from music_ar.model.weights import Weights

_MOST = 2**20  # of latents, tokens and pieces


@dataclass(frozen=True, kw_only=True)
class Decode:
    """Time the decoding of tokens after a full prompt; with --data, also score each setting.

    A setting is a number of latents with a number of layers, or with all layers and a tolerance of early exits.

    Two bounds are measured in the same run. A step must read every weight and every cache once, so memory bandwidth
    limits its speed; it is taken from a large matrix-vector product and a sum. And a step must multiply its int8
    matrices, which the native engine also times by themselves. "path" says what computed: the instructions that the
    native engine uses on a CPU ("vnni", "avx2" or "portable"), or "jax".

    Attributes:
        checkpoint: name of a shipped model, a folder, or a hub id (owner/name); default: the shipped model.
        latents: numbers of latents to compare.
        layers: numbers of layers to compare; default: all after which the model was trained to predict.
        tolerance: tolerances of early exits to compare, with all layers: an event leaves early once that is expected to
            cost fewer nats than this. Default: none.
        context: context lengths to compare, in tokens; default: the model's own. Retrieval still uses all tokens.
        batch: numbers of pieces decoded at once.
        tokens: tokens to time per piece, after the first chunk. Raise it on a noisy machine.
        data: dataset written by `music-ar prepare`, a folder or its address (s3://bucket/data, gs://...); score its
            validation split. The timed runs then continue its music, which matters for early exits. Default: no scores.
        pieces: number of validation pieces to score (with --data).
        piece_tokens: tokens to score of each piece, from its start (with --data).
        output: JSON file to write the result to.
    """

    checkpoint: Unset[str] = None
    latents: tuple[int, ...] = whole((64, 256, 1024, 2048), 1, _MOST)
    layers: Annotated[tuple[int, ...], tyro.conf.arg(help_behavior_hint="")] = whole((), 1, 1000)
    tolerance: Annotated[tuple[float, ...], tyro.conf.arg(help_behavior_hint="")] = number((), least=0, most=100)
    context: Annotated[tuple[int, ...], tyro.conf.arg(help_behavior_hint="")] = whole((), 1, _MOST)
    batch: tuple[int, ...] = whole((1, 4), 1, 2**12)
    tokens: int = whole(256, 1, _MOST)
    data: Annotated[Unset[str], tyro.conf.arg(metavar="FOLDER")] = None
    pieces: int = whole(8, 1, _MOST)
    piece_tokens: int = whole(4096, 1, _MOST)
    output: Unset[Path] = None

    def __post_init__(self) -> None:
        check_options(self)
        _check_given(self, "latents", "batch")

    def measure(self, weights: "Weights") -> "tuple[list[DecodeRow], dict[str, Any]]":
        """The rows of the table, and what is the same for all of them."""
        from app.commands.timing import decode_rows
        from data_pipeline.dataset import Pieces

        scored = []
        if self.data is not None:
            validation = Pieces.open(self.data, "validation").tokens[: self.pieces]
            scored = [tokens[: self.piece_tokens] for tokens in validation]
        contexts = self.context or (weights.config.context,)
        return decode_rows(weights, contexts, self._settings(weights.config), self.batch, self.tokens, scored)

    def _settings(self, config: "ModelConfig") -> "list[Setting]":
        """What to compare."""
        from music_ar.decoding.budget import Setting

        if unknown := set(self.layers) - set(config.depths):
            raise CommandError(
                f"--layers must be among {', '.join(map(str, config.depths))}, after which the model predicts; got "
                f"{', '.join(map(str, sorted(unknown)))}"
            )
        if self.tolerance and not config.exits:
            raise CommandError("--tolerance needs a model with early exits, trained with --exits")
        depths = [(layers, 0.0) for layers in self.layers or config.depths]
        depths += [(config.layers, tolerance) for tolerance in self.tolerance]
        return [Setting(latents, *depth) for latents in self.latents for depth in depths]


@dataclass(frozen=True, kw_only=True)
class Render:
    """Time `Generator.generate_many`, which `music-ar render` uses, against a loop over `Generator.stream`.

    Both are warmed up first, and both use the seeds 0, 1, 2 and so on.

    Attributes:
        checkpoint: name of a shipped model, a folder, or a hub id (owner/name); default: the shipped model.
        latents: numbers of latents to compare.
        batch: numbers of pieces generated at once; default: what `music-ar render` uses.
        pieces: number of pieces to generate.
        loop_pieces: number of pieces that the loop generates; lower it to save time.
        seconds: length of each piece.
        output: JSON file to write the result to.
    """

    checkpoint: Unset[str] = None
    latents: tuple[int, ...] = whole((64, 256, 1024, 2048), 1, _MOST)
    batch: Annotated[tuple[int, ...], tyro.conf.arg(help_behavior_hint="")] = whole((), 1, 2**12)
    pieces: int = whole(32, 1, _MOST)
    loop_pieces: int = whole(4, 1, _MOST)
    seconds: float = number(60.0, above=0, most=MAX_SECONDS)
    output: Unset[Path] = None

    def __post_init__(self) -> None:
        check_options(self)
        _check_given(self, "latents")
        if not 1 <= self.loop_pieces <= self.pieces:
            raise CommandError(f"expected 1 <= --loop-pieces <= --pieces, got {self.loop_pieces} and {self.pieces}")

    def measure(self, weights: "Weights") -> "tuple[list[RenderRow], dict[str, Any]]":
        """The rows of the table, and what is the same for all of them."""
        from app.commands.timing import render_rows

        rows, facts = render_rows(weights, self.latents, self.batch, self.pieces, self.loop_pieces, self.seconds)
        return rows, {**facts, "seconds": self.seconds}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure decoding speed on this machine; print a table and, as the last line, the result as JSON.

    For the options, see `music-ar bench decode --help` and `music-ar bench render --help`.

    Example: music-ar bench render --latents 1024 --pieces 32 --seconds 60
    """

    benchmark: tyro.conf.OmitSubcommandPrefixes[tyro.conf.OmitArgPrefixes[Decode | Render]]

    @property
    def many_rows(self) -> bool:
        """Whether it fills large batches; see `app.cli.Command`."""
        return isinstance(self.benchmark, Render)

    def run(self) -> None:
        """Print the table and the line of JSON."""
        from music_ar.files import write_atomically
        from music_ar.model.weights import read_weights

        benchmark = self.benchmark
        weights = read_weights(benchmark.checkpoint)
        if max(benchmark.latents) > weights.config.most_latents:
            raise CommandError(f"--latents must be at most {weights.config.most_latents}, got {max(benchmark.latents)}")
        rows, facts = benchmark.measure(weights)
        records = [dataclasses.asdict(row) for row in rows]
        for name, value in facts.items():
            print(f"{name.replace('_', ' ')}: {_cell(value)}")
        print_table([name.replace("_", " ") for name in records[0]], [[_cell(v) for v in r.values()] for r in records])
        result = {
            "benchmark": type(benchmark).__name__.lower(),
            "checkpoint": benchmark.checkpoint,
            **facts,
            "rows": records,
        }
        if benchmark.output is not None:
            write_atomically(benchmark.output, json.dumps(result).encode() + b"\n")
        print(json.dumps(result))


def _check_given(benchmark: Decode | Render, *options: str) -> None:
    for option in options:
        if not getattr(benchmark, option):
            raise CommandError(f"--{option} must be one or more whole numbers, got nothing")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:,.4g}"
