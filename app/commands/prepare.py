"""The command `music-ar prepare`: tokenize MIDI files for training."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from app.console import SOME_FAILED, CommandError, ProgressLine, Ray, Unset, check_options, print_table
from music_ar.ranges import number, whole

if TYPE_CHECKING:
    from data_pipeline.prepare import Prepared
    from music_ar.cluster import Cluster


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Prepare MIDI files for `music-ar train`: token shards and a manifest. If nothing has changed, it does nothing.

    Exit code 0: all files are in the dataset; 3: some were skipped, and the manifest says why; 2: wrong usage.

    Example: music-ar prepare --maestro maestro-v3.0.0-midi.zip --output data/maestro

    Attributes:
        output: dataset folder to write, or its address (s3://bucket/data, gs://...); created if missing.
        maestro: the official MAESTRO zip, or the folder it unpacks to. Its official splits are kept.
        midi: a folder or zip of your own MIDI files. They are split by a hash of their names; unusable ones are
            skipped.
        table: CSV file with a row for each file of --midi, to keep its composer and title: the columns file (its path)
            and composer, and perhaps title. Files without a row are prepared, too. Training with --wishes or --folds
            uses it.
        validation: fraction of the files that go to the validation split (with --midi). Raise it for a small
            collection, which otherwise keeps too few to detect overfitting.
        test: fraction of the files that go to the test split (with --midi).
        seed: random seed of the split assignment (with --midi). Change it for another split of the same files.
        workers: number of processes; default: one per core.
        ray: encode the files on all cores of a Ray cluster, by the HOST:PORT of its head; without HOST:PORT, on the
            cluster that this machine is part of. Files are read and written here. Needs the extra `ray`.
    """

    output: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    maestro: Unset[Path] = None
    midi: Unset[Path] = None
    table: Unset[Path] = None
    validation: float = number(0.1, least=0, most=1)
    test: float = number(0.1, least=0, most=1)
    seed: int = 0
    workers: Unset[int] = whole(None, 1, 1000)
    ray: Ray = None

    def __post_init__(self) -> None:
        check_options(self)
        if (self.maestro is None) == (self.midi is None):
            got = "neither" if self.midi is None else "both"
            raise CommandError(f"expected either --maestro or --midi, got {got}")
        if self.table is not None and self.midi is None:
            raise CommandError("--table goes with --midi: MAESTRO has a table of its own")
        if self.workers is not None and self.ray is not None:
            raise CommandError("--workers is for processes on this machine and does not go with --ray")

    def run(self) -> int:
        """Write the shards and print a table of the splits; return the exit code."""
        from data_pipeline.prepare import describe_skipped
        from music_ar.cluster import Cluster

        with ProgressLine(f"preparing {self.output}") as line:
            on_progress = line.timed("reading MIDI files")
            if self.ray is None:
                manifest, was_up_to_date = self._prepare(self.workers, on_progress)
            else:
                with Cluster(self.ray) as cluster:
                    manifest, was_up_to_date = self._prepare(cluster, on_progress)
        if was_up_to_date:
            print(f"{self.output} is up to date", file=sys.stderr)
        if manifest.skipped:
            files = len(manifest.skipped) + sum(count.pieces for count in manifest.splits.values())
            reasons = describe_skipped(manifest.skipped)
            print(f"skipped {len(manifest.skipped)} of {files} files: {reasons}", file=sys.stderr)
        rows = [
            (split, f"{count.pieces:,}", f"{count.hours:,.2f}", f"{count.notes:,}", f"{count.tokens:,}")
            for split, count in manifest.splits.items()
        ]
        print_table(("split", "pieces", "hours", "notes", "tokens"), rows)
        return SOME_FAILED if manifest.skipped else 0

    def _prepare(self, workers: "int | Cluster | None", on_progress: Callable[[float], None]) -> "Prepared":
        from data_pipeline.prepare import prepare_maestro, prepare_midi

        if self.maestro is not None:
            return prepare_maestro(self.maestro, self.output, workers=workers, on_progress=on_progress)
        assert self.midi is not None
        return prepare_midi(
            self.midi,
            self.output,
            table=self.table,
            validation=self.validation,
            test=self.test,
            seed=self.seed,
            workers=workers,
            on_progress=on_progress,
        )
