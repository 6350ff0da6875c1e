"""The command `music-ar similar`: find the music of a dataset that is most like MIDI files."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from app.console import (
    SOME_FAILED,
    CommandError,
    ProgressLine,
    Unset,
    check_options,
    check_writable,
    clock,
    error_line,
    midi_files_at,
    print_table,
    read_performance,
)
from music_ar.ranges import whole

if TYPE_CHECKING:
    from data_pipeline.dataset import Pieces
    from music_ar.embedding.library import Library
    from music_ar.embedding.search import Overlap
    from music_ar.midi.performance import Performance


@dataclass(frozen=True, kw_only=True)
class Similar:
    """Find the music of a dataset that is most like MIDI files: pieces, with the passages that are alike.

    An encoder turns passages of 30 s into embeddings; those of a dataset are kept in an index. Similarity is the cosine
    of two embeddings. Keys and tempi hardly matter to it. With --data, also count the notes that are the same.

    Example: music-ar similar mine.mid --data data/maestro

    Attributes:
        files: MIDI files, pipes, "-" for standard input, or folders. A file that cannot be read is named, and the exit
            code is then 3.
        encoder: name of a shipped encoder, a folder, or a hub id (owner/name); default: the shipped encoder.
        index: file of the index; default: passages.safetensors in the folder of the encoder.
        data: dataset written by `music-ar prepare`, from which the index was made: a folder, or its address
            (s3://bucket/data, gs://...). Also print the longest run of notes that each file shares with the pieces that
            are like it, and with any piece, in any key and rhythm.
        count: number of pieces to name for each file.
        json: print a line of JSON for each file instead.
        build: make the index from --data first. MAESTRO takes about nine minutes of a CPU core.
        split: which pieces of the dataset to index.
    """

    files: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FILE [FILE ...]", help_behavior_hint="")
    ] = ()
    encoder: Unset[str] = None
    index: Unset[Path] = None
    data: Annotated[Unset[str], tyro.conf.arg(metavar="FOLDER")] = None
    count: int = whole(5, 1, 1000)
    json: bool = False
    build: bool = False
    split: Literal["train", "validation", "test"] = "train"

    def __post_init__(self) -> None:
        check_options(self)
        if not self.files and not self.build:
            raise CommandError("expected a MIDI file, a folder, or - for standard input; or --build to make an index")
        if self.build and self.data is None:
            raise CommandError("--build makes the index from the dataset of --data; name one")

    def run(self) -> int:
        """Make the index if asked to, and print what is like each file; return the exit code."""
        if self.build:
            self._build()
        if not self.files:
            return 0
        from music_ar.embedding.library import Library
        from music_ar.embedding.notes import EmbeddingError
        from music_ar.embedding.search import SearchError

        files = [found for file in self.files for found in midi_files_at(file)]
        library = Library.open(self.encoder, self.index)
        corpus = None if self.data is None else self._corpus(library)
        failed = 0
        for file in files:
            try:
                found = self._search(library, corpus, file)
            except (CommandError, EmbeddingError, SearchError) as error:
                if len(files) == 1:
                    raise CommandError(_about(file, error)) from error
                failed += 1
                found = {"file": str(file), "error": _about(file, error)}
            if self.json:
                print(json.dumps(found), flush=True)
            else:
                _show(found)
        return SOME_FAILED if failed else 0

    def _build(self) -> None:
        from data_pipeline.passage_index import index_split
        from music_ar.embedding.library import index_beside, load_encoder_or_shipped

        assert self.data is not None
        path = self.index or index_beside(self.encoder)
        check_writable(path)
        encoder = load_encoder_or_shipped(self.encoder)
        with ProgressLine(title := f"indexing the {self.split} split") as line:
            index = index_split(self.data, self.split, encoder, on_progress=line.timed(title))
        index.save(path)
        size_mb = path.stat().st_size / 1e6
        if not self.json:
            print(f"{path}: {len(index):,} passages of {len(index.pieces):,} pieces, {size_mb:.1f} MB")

    def _corpus(self, library: "Library") -> "_Corpus":
        """The indexed split, checked to be the one that was indexed."""
        from data_pipeline.dataset import Pieces
        from data_pipeline.manifest import Manifest
        from music_ar.embedding.library import index_beside

        assert self.data is not None
        split, path = library.index.split, self.index or index_beside(self.encoder)
        library.index.check_data(Manifest.load(self.data).split_digest(split), path)
        return _Corpus(Pieces.open(self.data, split))

    def _search(self, library: "Library", corpus: "_Corpus | None", file: Path) -> dict[str, Any]:
        """What is printed about a file, as in the JSON."""
        piece = read_performance(file)
        matches = library.nearest(piece, self.count)
        found: dict[str, Any] = {
            "file": str(file),
            "usual_similarity": [round(float(each), 4) for each in library.index.usual],
            "matches": [match.values() for match in matches],
        }
        if corpus is not None:
            for match, line in zip(matches, found["matches"], strict=True):
                line["shared"] = corpus.shared_with(piece, [match.number])
            found["shared"] = corpus.shared_with(piece, range(len(corpus)))
        return found


class _Corpus:
    """The pieces of a split, to look for the same notes in.

    Args:
        pieces: the split.
    """

    def __init__(self, pieces: "Pieces"):
        self._pieces = pieces

    def __len__(self) -> int:
        return len(self._pieces)

    def shared_with(self, piece: "Performance", numbers: Sequence[int]) -> dict[str, Any]:
        """The longest run of notes shared with some of the pieces: over all notes, and without repeated patterns."""
        from music_ar.embedding.search import overlap_with

        sources = [self._performances[number] for number in numbers]
        counted, without = (
            overlap_with(piece, sources, repeated_patterns=repeated_patterns) for repeated_patterns in (True, False)
        )
        return self._in_json(counted, numbers) | {"apart_from_figures": self._in_json(without, numbers)}

    @functools.cached_property
    def _performances(self) -> "list[Performance]":
        from music_ar.tokens.codec import decode

        return [decode(tokens) for tokens in self._pieces.tokens]

    def _in_json(self, overlap: "Overlap", numbers: Sequence[int]) -> dict[str, Any]:
        values = dataclasses.asdict(overlap)
        found = numbers[values.pop("source")]
        record = self._pieces.records[found] if overlap.notes else None
        source = None if record is None else {"name": record.name, "title": record.title, "composer": record.composer}
        return {key: round(value, 2) for key, value in values.items()} | {"source": source}


def _about(file: Path, error: Exception) -> str:
    text = error_line(error)
    return text if isinstance(error, CommandError) else f"{file}: {text}"  # the others do not know the file


def _show(found: dict[str, Any]) -> None:
    """Print what is like a file."""
    if "error" in found:
        print(found["error"], flush=True)
        return
    print(found["file"])
    matches, has_data = found["matches"], "shared" in found
    header = ["most like it", "similarity", "here", "there"]
    rows = [[_title(each), f"{each['similarity']:.3f}", _span(each, "query_"), _span(each)] for each in matches]
    if has_data:
        header += ["same notes", "without patterns"]
        for row, each in zip(rows, matches, strict=True):
            row += [str(each["shared"]["notes"]), str(each["shared"]["apart_from_figures"]["notes"])]
    print_table(header, rows)
    low, middle, high = found["usual_similarity"]
    print(
        f"usual similarity of an indexed piece and the one most like it: {middle:.3f} (90 %: {low:.3f} to {high:.3f})"
    )
    if has_data:
        print(f"longest run of notes shared with any piece: {_run(found['shared'])}")
        print(f"without repeated patterns: {_run(found['shared']['apart_from_figures'])}")
    print(flush=True)


def _title(piece: dict[str, Any]) -> str:
    return f"{piece['composer']}: {piece['title']}" if piece["composer"] else piece["title"]


def _span(values: dict[str, Any], prefix: str = "") -> str:
    return f"{clock(values[f'{prefix}start_s'])}-{clock(values[f'{prefix}end_s'])}"


def _run(run: dict[str, Any]) -> str:
    if not run["notes"]:
        return "0"
    return f"{run['notes']}, at {_span(run)}; in {_title(run['source'])} at {_span(run, 'source_')}"
