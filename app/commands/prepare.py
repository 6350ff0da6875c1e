"""The command `music-ar prepare`: MIDI files to token shards."""

from dataclasses import dataclass
from pathlib import Path

from app.console import CommandError, print_table


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Turns MIDI files into token shards and a manifest that `music-ar train` reads.

    Example: music-ar prepare --maestro maestro-v3.0.0-midi.zip --output data/maestro

    Attributes:
        output: folder to write.
        maestro: the official MAESTRO zip, or the folder that it unpacks to; its official splits are kept.
        midi: a folder or zip of your own MIDI files, dealt to splits by file name.
        validation: share of your own files for the validation split.
        test: share of your own files for the test split.
        seed: another number deals your own files otherwise.
        workers: processes; by default one a core.
    """

    output: Path
    maestro: Path | None = None
    midi: Path | None = None
    validation: float = 0.1
    test: float = 0.1
    seed: int = 0
    workers: int | None = None

    def __post_init__(self) -> None:
        if (self.maestro is None) == (self.midi is None):
            raise CommandError("give either --maestro or --midi")

    def run(self) -> None:
        """Writes the shards and prints a table of the splits."""
        from data_pipeline.prepare import prepare_maestro, prepare_midi

        if self.midi is None:
            assert self.maestro is not None
            manifest = prepare_maestro(self.maestro, self.output, workers=self.workers)
        else:
            manifest = prepare_midi(
                self.midi,
                self.output,
                validation=self.validation,
                test=self.test,
                seed=self.seed,
                workers=self.workers,
            )
        rows = [
            (split, f"{count.pieces:,}", f"{count.hours:,.2f}", f"{count.notes:,}", f"{count.tokens:,}")
            for split, count in manifest.splits.items()
        ]
        print_table(("split", "pieces", "hours", "notes", "tokens"), rows)
