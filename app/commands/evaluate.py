"""The command `music-ar evaluate`: how well a model predicts real music, and how like real music its own is."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from app.console import CommandError, ProgressLine, check_writable, print_table


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Scores a model: how well it predicts each token of each piece of a split, every token once.

    With --report it also writes a folder with report.md, its pictures, all figures in report.json, and the pieces that
    it made: nats by kind of event, against context and latents; what the model recalls from far back; generated music
    beside the split's; and runs of notes copied from the train split. `docs/evaluation.md` says how each is measured.

    Example: music-ar evaluate --data data/maestro --report out --max-pieces 2 --pieces 8 --seconds 60

    Attributes:
        data: folder that `music-ar prepare` wrote.
        split: which of its splits; of several, the report's other parts use the first.
        checkpoint: name of a shipped model, a folder, or a hub id (owner/name); by default the shipped one.
        context: how many tokens back the model knows of; by default as many as it attends to or recalls from.
        latents: N, how many of the last tokens that attention reads are latents; by default as many as the model has.
        stride: how many tokens each window of the model scores; a smaller one is slower and gives each more before it.
        batch_size: windows at once.
        max_pieces: score only so many pieces, the first ones.
        output: JSON file to write the scores to.
        report: folder to write a report to; needs the extra `plot`.
        pieces: report: pieces to make.
        seconds: report: how long each; music is compared with itself up to 60 s later if it is long enough.
        prompt_seconds: report: go on from so much of each real piece; by default pieces are made from nothing.
        budget: report: latents to make them with; by default 1024, or what the model has.
        temperature: report: to make them with.
        top_p: report: to make them with.
        min_p: report: to make them with.
        steadiness: report: to make them with.
        seed: report: of the first piece; also of the themes and the dealing of real pieces.
        made: report: a folder of MIDI files to judge instead of new pieces.
        themes: report: themes to plant at each distance.
    """

    data: Path
    split: tuple[Literal["train", "validation", "test"], ...] = ("validation",)
    checkpoint: str | None = None
    context: int | None = None
    latents: int | None = None
    stride: int = 512
    batch_size: int = 32
    max_pieces: int | None = None
    output: Path | None = None
    report: Path | None = None
    pieces: int = 64
    seconds: float = 120.0
    prompt_seconds: float = 0.0
    budget: int | None = None
    temperature: float = 1.0
    top_p: float = 0.97
    min_p: float = 0.0
    steadiness: float = 0.25
    seed: int = 0
    made: Path | None = None
    themes: int = 32

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.max_pieces is not None and self.max_pieces < 1):
            raise CommandError("--batch-size and --max-pieces must be at least 1")
        if min(self.pieces, self.themes) < 1 or not 0 < self.seconds < float("inf") or self.prompt_seconds < 0:
            raise CommandError(
                "expected --pieces and --themes of at least 1, --seconds above 0, --prompt-seconds of 0 or more"
            )
        if not self.split or len(set(self.split)) < len(self.split):
            raise CommandError("--split takes one or more different splits")

    def run(self) -> None:
        """Prints the scores, and writes them and the report where the options say."""
        from data_pipeline.loader import Pieces
        from music_ar.evaluation.likelihood import score
        from music_ar.files import write_atomically
        from music_ar.model.pretrained import load_released

        if self.output is not None:
            check_writable(self.output)
        pieces = {split: Pieces.open(self.data, split) for split in self.split}
        model = load_released(self.checkpoint)
        context = model.config.window if self.context is None else self.context
        most = model.config.read(context)
        latents = min(model.config.latents, most) if self.latents is None else self.latents
        if not 1 <= self.stride <= latents <= most:
            raise CommandError(
                f"expected 1 <= --stride <= --latents <= {most}, which is how many tokens attention reads of a "
                f"--context of {context}; got a stride of {self.stride} and {latents} latents"
            )
        sizes = {"context": context, "latents": latents, "stride": self.stride}
        if self.report is not None:
            from app.report.measure import write_report

            scores = write_report(self, model, pieces, **sizes)
        else:
            scores = {}
            for split in self.split:
                tokens = pieces[split].tokens[: self.max_pieces]
                with ProgressLine(title := f"scoring {len(tokens)} pieces") as line:
                    found = score(model, tokens, **sizes, batch_size=self.batch_size, on_progress=line.timed(title))
                scores[split] = found.report()
        for split, of_split in scores.items():
            print_table((split, ""), [(name.replace("_", " "), f"{value:,.4g}") for name, value in of_split.items()])
        if self.report is not None:
            print(f"the report is {self.report / 'report.md'}")
        if self.output is not None:
            write_atomically(self.output, json.dumps({**scores, **sizes}, indent=2).encode() + b"\n")
