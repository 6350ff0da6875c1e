"""The report of a tiny model on tiny data: every figure is there, and the same whether asked for here or there."""

import json
import re
import sys

import numpy as np
import pytest
from test_cli import refusal, run

from data_pipeline.loader import Pieces
from music_ar.evaluation.likelihood import score
from music_ar.midi.io import read_midi
from music_ar.model.pretrained import load_released

SIZES = ["--batch-size", 4, "--stride", 16, "--max-pieces", 3, "--themes", 2, "--seconds", 12]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, prepared, tiny_checkpoint):
    """A report on the train split, the only one of this data with more than one piece."""
    from app import cli

    folder = tmp_path_factory.mktemp("report")
    arguments = [
        "evaluate",
        "--data",
        prepared,
        "--checkpoint",
        tiny_checkpoint,
        "--report",
        folder,
        "--split",
        "train",
    ]
    assert cli.main([str(each) for each in (*arguments, *SIZES, "--pieces", 3, "--budget", 8)]) == 0
    return folder


@pytest.fixture(scope="module")
def figures(folder):
    return json.loads((folder / "report.json").read_text())


def test_the_score_is_that_of_score(figures, prepared, tiny_checkpoint):
    tokens = Pieces.open(prepared, "train").tokens[:3]
    expected = score(load_released(tiny_checkpoint), tokens, stride=16).report()
    assert figures["prediction"]["train"]["score"] == pytest.approx(expected)
    kinds = figures["prediction"]["train"]["kinds"]
    assert sum(kind["share"] for kind in kinds.values()) == pytest.approx(1)
    assert figures["latents_curve"]["32"] == pytest.approx(expected["nats_per_token"], rel=1e-4)
    assert figures["context_curve"]["64"] == pytest.approx(expected["nats_per_token"], rel=1e-4)
    assert list(figures["context_curve"]) == ["32", "64"]
    assert list(figures["latents_curve"]) == ["4", "8", "16", "32"]


def test_recall_is_of_every_note(figures):
    notes = sum(row["notes"] for row in figures["natural_recall"]["by_distance"])
    assert notes == figures["prediction"]["train"]["score"]["notes"]
    assert [row["distance"] for row in figures["planted_recall"]["by_distance"]] == [32, 48]


def test_training_pieces_are_found_in_the_training_set(figures, prepared):
    records = Pieces.open(prepared, "train").records
    runs = figures["copying"]["real"]
    assert [run["source"] for run in runs] == [record.name for record in records]
    assert all(run["notes"] > 50 for run in runs)
    assert figures["copying"]["longer_than_any_real"] == 0
    apart = figures["copying"]["apart_from_figures"]
    assert [run["source"] for run in apart["real"]] == [record.name for record in records]
    # Of whole pieces that are there as they are; others may have more in common apart from figures than with them.
    assert all(run["notes"] <= each["notes"] for run, each in zip(apart["real"], runs, strict=True))


def test_the_text_shows_the_figures_and_the_pictures_that_are_there(folder, figures):
    text = (folder / "report.md").read_text()
    beside_real = text[text.index("## Generated") :]
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert set(pictures) == {path.name for path in folder.glob("*.png")}
    assert len(pictures) == 5
    assert f"{figures['prediction']['train']['score']['nats_per_token']:.4f}" in text
    for name, each in figures["distances"].items():
        row = next(line for line in beside_real.splitlines() if line.startswith(f"| {name} |"))
        assert row.endswith(f"| {each['ratio']:.4g} |")


def test_pieces_that_are_there_are_judged_as_when_they_were_made(
    folder, figures, capsys, tmp_path, prepared, tiny_checkpoint
):
    assert all(len(read_midi(path)) for path in (folder / "pieces").iterdir())
    code, _, errors = run(
        capsys, "evaluate", "--data", prepared, "--checkpoint", tiny_checkpoint, "--report", tmp_path,
        "--split", "train", "--made", folder / "pieces", *SIZES,
    )  # fmt: skip
    assert code == 0, errors
    again = json.loads((tmp_path / "report.json").read_text())
    assert again["copying"] == figures["copying"]
    assert set(again["distances"]) == set(figures["distances"]) != set()
    for name, each in again["distances"].items():
        assert each["distance"] == pytest.approx(figures["distances"][name]["distance"], abs=0.02)
    assert not (tmp_path / "pieces").exists()


def test_prompts_are_gone_on_from_and_left_out(capsys, tmp_path, prepared, tiny_checkpoint):
    code, _, errors = run(
        capsys, "evaluate", "--data", prepared, "--checkpoint", tiny_checkpoint, "--report", tmp_path,
        "--split", "train", *SIZES, "--pieces", 2, "--prompt-seconds", 6, "--budget", 8,
    )  # fmt: skip
    assert code == 0, errors
    assert "going on from 6 s of real pieces" in (tmp_path / "report.md").read_text()
    continued = [read_midi(path) for path in sorted((tmp_path / "pieces").iterdir())]
    assert len(continued) == 2
    assert all(piece.duration_s <= 12.01 for piece in continued)


def test_what_cannot_be_reported_is_refused_before_the_work(capsys, monkeypatch, tmp_path, prepared, tiny_checkpoint):
    report = ["evaluate", "--data", prepared, "--checkpoint", tiny_checkpoint, "--report", tmp_path / "out", *SIZES]
    assert "two pieces" in refusal(capsys, *report)
    code, _, errors = run(capsys, *report, "--split", "train", "train")
    assert code == 2
    assert "different splits" in errors
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "music-ar[plot]" in refusal(capsys, *report, "--split", "train")


def test_several_splits_are_scored(capsys, tmp_path, prepared, tiny_checkpoint):
    written = tmp_path / "scores.json"
    code, output, errors = run(
        capsys, "evaluate", "--data", prepared, "--checkpoint", tiny_checkpoint, "--split", "validation", "test",
        "--stride", 32, "--output", written,
    )  # fmt: skip
    assert code == 0, errors
    scores = json.loads(written.read_text())
    assert scores["validation"]["nats_per_token"] != scores["test"]["nats_per_token"]
    assert all(f"{scores[split]['nats_per_token']:.4g}" in output for split in ("validation", "test"))
    assert np.isfinite(scores["test"]["nats_per_note"])
