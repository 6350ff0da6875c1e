"""The command `music-ar evaluate`: score a model on real music, and compare the music it generates with real music."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from app.console import CommandError, ProgressLine, Ray, Sampling, Unset, check_options, check_writable, print_table
from app.report.config import ReportConfig
from music_ar.decoding.sampling import SamplingOptions
from music_ar.ranges import whole

if TYPE_CHECKING:
    from data_pipeline.dataset import Pieces
    from music_ar.evaluation.likelihood import ScoresWindows, ScoringConfig
    from music_ar.model.config import ModelConfig
    from music_ar.model.perceiver_ar import PerceiverAR

Scores = dict[str, dict[str, float | int]]


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Score how well a model predicts real music: the negative log-likelihood (NLL) of each token, note and second.

    With --report, also generate pieces and write a folder with the pieces, a report with charts (report.md) and all
    metrics (report.json). It covers the NLL by token type, number of latents and context length; long-range retrieval;
    distances between generated and real music; and the longest runs of notes shared with the training split.

    Example: music-ar evaluate --data data/maestro --report out --max-pieces 2 --pieces 8 --seconds 60

    Attributes:
        data: dataset written by `music-ar prepare`: a folder, or its address (s3://bucket/data, gs://...).
        split: splits to score. If there are several, the other sections of the report use the first.
        checkpoint: name of a shipped model, a folder, or a hub id (owner/name); default: the shipped model.
        context: number of past tokens the model may use; default: the model's own. Lower it to see what a
            long context is worth.
        latents: number of latents; default: the model's maximum. Lower it to see what fewer latents cost in likelihood.
        stride: tokens scored per window. A smaller stride is slower but gives each token more context.
        batch_size: windows scored at once. Lower it if memory runs out.
        max_pieces: score only this many pieces of each split, for a quick look; default: all.
        output: JSON file to write the scores to, or its address.
        report: folder to write a report to; needs the extra `plot`.
        ray: score on all devices of a Ray cluster, by the HOST:PORT of its head; without HOST:PORT, on the cluster that
            this machine is part of. Needs the extra `ray`.
    """

    data: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    split: tuple[Literal["train", "validation", "test"], ...] = ("validation",)
    checkpoint: Unset[str] = None
    context: Unset[int] = whole(None, 1, 2**20)
    latents: Unset[int] = whole(None, 1, 2**20)
    stride: int = whole(512, 1, 2**20)
    batch_size: int = whole(32, 1, 2**16)
    max_pieces: Unset[int] = whole(None, 1)
    output: Annotated[Unset[str], tyro.conf.arg(metavar="FILE")] = None
    report: Unset[Path] = None
    ray: Ray = None
    reporting: Annotated[ReportConfig, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="report")] = field(
        default_factory=ReportConfig
    )
    sampling: Sampling = SamplingOptions()

    def __post_init__(self) -> None:
        check_options(self)
        if not self.split or len(set(self.split)) < len(self.split):
            raise CommandError(f"--split must be one or more different splits, got {' '.join(self.split) or 'none'}")
        if self.ray is not None and self.report is not None:
            raise CommandError("--report measures on this machine and does not go with --ray")

    def run(self) -> None:
        """Print the scores, and write them and the report where the options say."""
        from data_pipeline.dataset import Pieces
        from music_ar.storage import write_path

        if self.output is not None:
            check_writable(self.output)
        splits = {split: Pieces.open(self.data, split) for split in self.split}
        scores, scoring = self._here(splits) if self.ray is None else self._on_ray(self.ray, splits)
        for split, of_split in scores.items():
            print_table((split, ""), [(name.replace("_", " "), f"{value:,.4g}") for name, value in of_split.items()])
        if self.report is not None:
            print(f"report: {self.report / 'report.md'}")
        if self.output is not None:
            sizes = {"context": scoring.context, "latents": scoring.latents, "stride": scoring.stride}
            write_path(self.output, json.dumps({**scores, **sizes}, indent=2).encode() + b"\n")

    def _here(self, splits: "dict[str, Pieces]") -> "tuple[Scores, ScoringConfig]":
        from music_ar.decoding import backend
        from music_ar.model.pretrained import load_pretrained

        model = load_pretrained(self.checkpoint, compute=backend.select().compute)
        scoring = self._scoring(model.config)
        if self.report is None:
            return self._score(model, splits, scoring), scoring
        return self._report(model, splits, scoring), scoring

    def _on_ray(self, address: str, splits: "dict[str, Pieces]") -> "tuple[Scores, ScoringConfig]":
        from music_ar.cluster import Cluster
        from music_ar.evaluation.on_ray import RayModel
        from music_ar.model.weights import read_weights

        weights = read_weights(self.checkpoint)
        scoring = self._scoring(weights.config)
        with Cluster(address) as cluster, RayModel(cluster, weights) as model:
            return self._score(model, splits, scoring), scoring

    def _scoring(self, config: "ModelConfig") -> "ScoringConfig":
        """The scoring config for this model, with the defaults filled in."""
        from music_ar.evaluation.likelihood import ScoringConfig

        scoring = ScoringConfig(
            context=self.context, latents=self.latents, stride=self.stride, batch_size=self.batch_size
        )
        try:
            context, latents = scoring.sizes(config)
        except ValueError as error:
            raise CommandError(f"--context, --latents and --stride do not fit: {error}") from error
        return dataclasses.replace(scoring, context=context, latents=latents)

    def _score(
        self, model: "PerceiverAR | ScoresWindows", splits: "dict[str, Pieces]", scoring: "ScoringConfig"
    ) -> Scores:
        from music_ar.evaluation.likelihood import score

        scores = {}
        for split, pieces in splits.items():
            tokens = pieces.tokens[: self.max_pieces]
            with ProgressLine(title := f"scoring {len(tokens)} pieces") as line:
                found = score(model, tokens, scoring, on_progress=line.timed(title))
            scores[split] = found.metrics()
        return scores

    def _report(self, model: "PerceiverAR", splits: "dict[str, Pieces]", scoring: "ScoringConfig") -> Scores:
        from app.report.write import write_report
        from data_pipeline.dataset import Pieces

        assert self.report is not None
        return write_report(
            self.report,
            model,
            splits,
            Pieces.open(self.data, "train"),
            checkpoint=self.checkpoint,
            scoring=scoring,
            max_pieces=self.max_pieces,
            config=self.reporting,
            sampling=self.sampling,
        )
