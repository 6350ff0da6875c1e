"""`music-ar similar`: an index is made, files are searched for, and what cannot be used is named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from test_cli import refusal, run

from app import cli
from data_pipeline.dataset import Pieces
from data_pipeline.prepare import prepare_midi
from music_ar.embedding import PRESETS, PieceEncoder, library, save_encoder
from music_ar.embedding.index import PassageIndex
from music_ar.midi.io import read_midi, write_midi

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def index(tiny_encoder, prepared, tmp_path_factory):
    """An index of the training split, made by the command."""
    path = tmp_path_factory.mktemp("index") / "passages"
    command = ["similar", "--build", "--data", prepared, "--encoder", tiny_encoder, "--index", path]
    assert cli.main([str(each) for each in command]) == 0
    return path


@pytest.fixture
def options(index, tiny_encoder):
    return ["--encoder", tiny_encoder, "--index", index]


@pytest.fixture(scope="module")
def known(midi_folder, prepared):
    """A file of the training split."""
    return midi_folder / Pieces.open(prepared, "train").records[3].name


@pytest.mark.slow
def test_two_processes_make_the_same_index_and_search_it(index, tiny_encoder, prepared, known, tmp_path):
    command = [
        "similar",
        known,
        "--build",
        "--data",
        prepared,
        "--encoder",
        tiny_encoder,
        "--index",
        tmp_path / "index",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", *map(str, command)],
        cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made, file, _, first, *_ = done.stdout.splitlines()
    assert made.startswith(f"{tmp_path / 'index'}: ")
    assert "8 pieces" in made
    assert file == str(known)
    assert first.startswith(known.name)
    assert (tmp_path / "index").read_bytes() == index.read_bytes()


def test_the_index_has_the_pieces(index, prepared):
    records = Pieces.open(prepared, "train").records
    loaded = PassageIndex.load(index)
    assert [piece.name for piece in loaded.pieces] == [record.name for record in records]
    assert loaded.split == "train"


def test_a_known_piece_comes_first_with_all_its_notes(capsys, options, prepared, known):
    code, output, errors = run(capsys, "similar", known, *options, "--data", prepared, "--count", 2)
    assert code == 0, errors
    lines = output.splitlines()
    assert lines[0] == str(known)
    assert lines[2].startswith(known.name)
    notes = lines[2].split()[-2:]
    assert int(notes[0]) > 0.8 * len(read_midi(known))
    assert f"in {known.name} at 0:0" in output
    assert "without repeated patterns" in output
    code, output, _ = run(capsys, "similar", known, *options, "--data", prepared, "--json")
    found = json.loads(output)
    for shared in (found["shared"], found["matches"][0]["shared"]):
        assert shared["source"] == {"name": known.name, "title": known.name, "composer": None}
        assert shared["notes"] == int(notes[0])
        assert shared["start_s"] == pytest.approx(shared["source_start_s"], abs=0.02)


def test_json_has_a_line_for_each_file_also_for_one_that_fails(capsys, options, known, tmp_path):
    (tmp_path / "bad.mid").write_bytes(b"no music")
    write_midi(read_midi(known).crop(0, 0.6), tmp_path / "few.mid")
    code, output, _ = run(capsys, "similar", known, tmp_path, *options, "--json", "--count", 3)
    assert code == 3
    found, *failed = map(json.loads, output.splitlines())
    assert found["file"] == str(known)
    assert found["matches"][0]["name"] == known.name
    assert found["matches"][0]["similarity"] == pytest.approx(1, abs=0.01)
    assert len(found["matches"]) == 3
    assert "shared" not in found
    assert np.all(np.diff([match["similarity"] for match in found["matches"]]) <= 0)
    assert [str(tmp_path) in each["error"] for each in failed] == [True, True]
    assert "not a MIDI file" in failed[0]["error"]
    assert "at least 8" in failed[1]["error"]


def test_what_cannot_be_used_is_refused_by_name(capsys, options, index, known, tiny_encoder, midi_folder, tmp_path):
    assert "no such file" in refusal(capsys, "similar", tmp_path / "none.mid", *options)
    write_midi(read_midi(known).crop(0, 0.6), few := tmp_path / "few.mid")
    assert f"{few}: the piece has too few notes" in refusal(capsys, "similar", few, *options)
    write_midi(read_midi(known).shift(4 * 3600), long := tmp_path / "long.mid")
    assert f"{long}: the piece is 4" in refusal(capsys, "similar", long, *options)
    prepare_midi(midi_folder, other := tmp_path / "other", seed=1, workers=1)
    assert f"{index} was made from other data" in refusal(capsys, "similar", known, *options, "--data", other)
    assert "piece encoder" in refusal(capsys, "similar", known, "--encoder", "maestro-small", "--index", index)
    missing = refusal(capsys, "similar", known, "--encoder", tiny_encoder, "--index", tmp_path / "none")
    assert f"{tmp_path / 'none'}: no such file. Make the index first" in missing


def test_an_index_of_another_encoder_is_refused(capsys, index, known, tmp_path):
    save_encoder(PieceEncoder(PRESETS["tiny"], rngs=nnx.Rngs(1)), tmp_path)
    assert f"{index} was made with the encoder" in refusal(
        capsys, "similar", known, "--encoder", tmp_path, "--index", index
    )


def test_nothing_to_do(capsys, prepared, tmp_path, monkeypatch):
    code, _, errors = run(capsys, "similar")
    assert code == 2
    assert "expected a MIDI file" in errors
    code, _, errors = run(capsys, "similar", "--build")
    assert code == 2
    assert "--build makes the index from the dataset of --data" in " ".join(errors.replace("│", " ").split())
    monkeypatch.setattr(library, "SHIPPED_FOLDERS", ())
    assert "no encoder ships with this version" in refusal(
        capsys, "similar", "--build", "--data", prepared, "--index", tmp_path / "index"
    )


def test_the_shipped_index_knows_a_piece_of_the_training_split(capsys):
    """The page's example is the beginning of an étude that several pianists play there."""
    prompt = ROOT / "app" / "web" / "prompts" / "chopin-etude-op-25-no-10.mid"
    code, output, errors = run(capsys, "similar", prompt, "--json")
    assert code == 0, errors
    matches = json.loads(output)["matches"]
    assert matches[0]["title"].startswith("Etude Op. 25 No. 10")
    assert all(match["composer"] == "Frédéric Chopin" for match in matches)
