"""The report of a tiny model on tiny data: its metrics, its text and its charts."""

import dataclasses
import json
import re
import sys

import numpy as np
import pytest
from test_cli import refusal, run

from app.report import text
from app.report.write import draw
from data_pipeline.dataset import Pieces
from music_ar.decoding.sampling import SamplingOptions
from music_ar.embedding import PieceEmbedder
from music_ar.embedding.library import DEFAULT_ENCODER
from music_ar.evaluation.likelihood import ScoringConfig, score
from music_ar.metrics.distributions import FEATURES, features
from music_ar.midi.io import read_midi
from music_ar.midi.performance import Performance
from music_ar.model.pretrained import load_pretrained

SIZES = ["--batch-size", 4, "--stride", 16, "--max-pieces", 3, "--motifs", 2, "--seconds", 12]


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
    assert cli.main([str(each) for each in (*arguments, *SIZES, "--pieces", 3, "--generation-latents", 8)]) == 0
    return folder


@pytest.fixture(scope="module")
def metrics(folder):
    return json.loads((folder / "report.json").read_text())


def test_the_score_is_that_of_score(metrics, prepared, tiny_checkpoint):
    tokens = Pieces.open(prepared, "train").tokens[:3]
    expected = score(load_pretrained(tiny_checkpoint), tokens, ScoringConfig(stride=16)).metrics()
    assert metrics["prediction"]["train"]["score"] == pytest.approx(expected)
    types = metrics["prediction"]["train"]["kinds"]
    assert sum(of_type["share"] for of_type in types.values()) == pytest.approx(1)
    assert metrics["latents_curve"]["32"] == pytest.approx(expected["nats_per_token"], rel=1e-4)
    assert metrics["context_curve"]["64"] == pytest.approx(expected["nats_per_token"], rel=1e-4)
    assert list(metrics["context_curve"]) == ["32", "64"]
    assert list(metrics["latents_curve"]) == ["4", "8", "16", "32"]


def test_retrieval_covers_every_note(metrics):
    notes = sum(row["notes"] for row in metrics["natural_recall"]["by_distance"])
    assert notes == metrics["prediction"]["train"]["score"]["notes"]
    assert [row["distance"] for row in metrics["planted_recall"]["by_distance"]] == [32, 48]


def test_the_settings_of_the_generation_are_kept(metrics):
    assert metrics["generation"] == {
        "pieces": 3, "from": None, "seconds": 12.0, "prompt_seconds": 0.0, "budget": 8, "seed": 0,
        **dataclasses.asdict(SamplingOptions()),
    }  # fmt: skip


def test_training_pieces_are_found_in_the_training_split(metrics, prepared):
    records = Pieces.open(prepared, "train").records
    runs = metrics["copying"]["real"]
    assert [run["source"] for run in runs] == [record.name for record in records]
    assert all(run["notes"] > 50 for run in runs)
    assert metrics["copying"]["longer_than_any_real"] == 0
    apart = metrics["copying"]["apart_from_figures"]
    assert [run["source"] for run in apart["real"]] == [record.name for record in records]
    # Whole copies only: other pieces may share more without repeated patterns than with them.
    assert all(run["notes"] <= each["notes"] for run, each in zip(apart["real"], runs, strict=True))


def test_the_text_has_the_metrics_and_names_the_charts(folder, metrics):
    written = (folder / "report.md").read_text()
    assert written == text.markdown(metrics)
    charts = re.findall(r"!\[[^]]+\]\(([^)]+)\)", written)
    assert set(charts) == {path.name for path in folder.glob("*.png")}
    assert len(charts) == 5
    lines = written.splitlines()
    assert any(f"{metrics['prediction']['train']['score']['nats_per_token']:.4f}" in line for line in lines)
    for name, each in metrics["distances"].items():
        values = (each[key] for key in ("distance", "yardstick", "yardstick_most", "ratio"))
        assert f"| {name} | {each['unit']} | {' | '.join(f'{value:.4g}' for value in values)} |" in lines
    for side in ("generated", "real"):
        notes = [run["notes"] for run in metrics["copying"][side]]
        values = (f"{np.percentile(notes, rank):.0f}" for rank in (0, 50, 95, 100))
        assert f"| all | {side} | {len(notes)} | {' | '.join(values)} |" in lines


def test_existing_pieces_are_compared_as_when_they_were_generated(
    folder, metrics, capsys, tmp_path, prepared, tiny_checkpoint, tiny_encoder
):
    assert all(len(read_midi(path)) for path in (folder / "pieces").iterdir())
    code, _, errors = run(
        capsys, "evaluate", "--data", prepared, "--checkpoint", tiny_checkpoint, "--report", tmp_path,
        "--split", "train", "--generated", folder / "pieces", "--encoder", tiny_encoder, *SIZES,
    )  # fmt: skip
    assert code == 0, errors
    again = json.loads((tmp_path / "report.json").read_text())
    assert again["copying"] == metrics["copying"]
    assert set(again["distances"]) == set(metrics["distances"]) != set()
    for name, each in again["distances"].items():
        assert each["distance"] == pytest.approx(metrics["distances"][name]["distance"], abs=0.02)
    assert not (tmp_path / "pieces").exists()
    frechet = again["frechet_music_distance"]
    assert frechet["encoder"] == PieceEmbedder.from_pretrained(tiny_encoder).digest
    assert metrics["frechet_music_distance"]["encoder"] == PieceEmbedder.from_pretrained(DEFAULT_ENCODER).digest
    assert 0 < frechet["yardstick"] <= frechet["yardstick_most"]
    assert f"{frechet['distance']:.4g} generated to real" in (tmp_path / "report.md").read_text()


def test_prompts_are_continued_and_left_out(capsys, tmp_path, prepared, tiny_checkpoint):
    code, _, errors = run(
        capsys, "evaluate", "--data", prepared, "--checkpoint", tiny_checkpoint, "--report", tmp_path,
        "--split", "train", *SIZES, "--pieces", 2, "--prompt-seconds", 6, "--generation-latents", 8,
    )  # fmt: skip
    assert code == 0, errors
    assert "continuing 6 s of real pieces" in (tmp_path / "report.md").read_text()
    continued = [read_midi(path) for path in sorted((tmp_path / "pieces").iterdir())]
    assert len(continued) == 2
    assert all(piece.duration_s <= 12.01 for piece in continued)


def test_an_impossible_report_is_rejected_before_the_work(capsys, monkeypatch, tmp_path, prepared, tiny_checkpoint):
    report = ["evaluate", "--data", prepared, "--checkpoint", tiny_checkpoint, "--report", tmp_path / "out", *SIZES]
    assert "two pieces" in refusal(capsys, *report)
    code, _, errors = run(capsys, *report, "--split", "train", "train")
    assert code == 2
    assert "different splits" in errors
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert ".[plot]" in refusal(capsys, *report, "--split", "train")


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


# Charts: real and generated music that differ in everything, and metrics in which no two numbers are equal.


def piece(pitch, velocity, length_s, notes=40):
    onset_s = np.arange(notes) * length_s
    return Performance(
        onset_s=onset_s,
        offset_s=onset_s + length_s / 2,
        pitch=pitch + np.arange(notes) % 5,
        velocity=np.full(notes, velocity),
    )


REAL = [piece(40, 30, 0.5), piece(41, 31, 0.5), piece(42, 32, 0.5)]
GENERATED = [piece(80, 90, 0.25), piece(81, 91, 0.25)]
CHARTED = {
    "latents_curve": {64: 2.5, 128: 2.25, 256: 2.0},
    "context_curve": {1024: 1.9, 2048: 1.8},
    "natural_recall": {
        "by_distance": [
            {"tokens_ago": "never", "pitch_nats": {1024: 4.0, 2048: 3.9}},
            {"tokens_ago": "0 to 1,024", "pitch_nats": {1024: 1.4, 2048: 1.3}},
            {"tokens_ago": "1,024 to 2,048", "pitch_nats": {1024: 3.1, 2048: 2.1}},
        ]
    },
    "planted_recall": {
        "by_distance": [
            {"distance": 256, "unheard": 1.7, "heard": 0.2},
            {"distance": 512, "unheard": 1.6, "heard": 0.3},
        ]
    },
    "copying": {
        "real": [{"notes": 9}, {"notes": 20}, {"notes": 14}],
        "generated": [{"notes": 11}, {"notes": 7}],
    },
}


@pytest.fixture(scope="module")
def charts():
    return draw(CHARTED, GENERATED, REAL)


def lines_of(axis):
    """Label -> the points of a line."""
    return {line.get_label(): line.get_xydata().tolist() for line in axis.lines}


def test_curves_are_drawn_over_latents_and_context(charts):
    latents, context = charts["curves.png"].axes
    assert [[*point] for point in CHARTED["latents_curve"].items()] in lines_of(latents).values()
    assert [[*point] for point in CHARTED["context_curve"].items()] in lines_of(context).values()
    assert "latents" in latents.get_xlabel()
    assert "context" in context.get_xlabel()


def test_retrieval_is_drawn_by_context_and_by_whether_a_motif_occurred_before(charts):
    natural, planted = charts["recall.png"].axes
    assert lines_of(natural) == {
        "context 1,024": [[0, 4.0], [1, 1.4], [2, 3.1]],
        "context 2,048": [[0, 3.9], [1, 1.3], [2, 2.1]],
    }
    assert [label.get_text() for label in natural.get_xticklabels()] == ["never", "0 to 1,024", "1,024 to 2,048"]
    assert lines_of(planted) == {
        "did not occur before": [[0, 1.7], [1, 1.6]],
        "occurred before": [[0, 0.2], [1, 0.3]],
    }


def test_distributions_are_drawn_with_their_own_samples(charts):
    axes = {axis.get_title(loc="left"): axis for axis in charts["distributions.png"].axes}
    for name in ("velocity", "duration", "inter-onset", "pitch class"):
        axis = axes[name]
        [bars], [outline] = axis.containers, [patch for patch in axis.patches if patch.get_label() == "generated"]
        assert bars[0].get_label() == "real"
        filled = [bar.get_bbox().intervalx for bar in bars if bar.get_height() > 0]
        corners = outline.get_xy()
        for pieces, edges in ((REAL, np.ravel(filled)), (GENERATED, corners[corners[:, 1] > 0, 0])):
            samples = np.concatenate([features(each)[name] for each in pieces])
            assert edges.min() <= samples.min() <= samples.max() <= edges.max() + 1e-9
            assert np.ptp(edges) <= np.ptp(samples) + 2  # two bins at most beyond the samples
    assert set(axes) - {""} <= set(FEATURES)


def test_shared_runs_are_drawn_as_falling_shares(charts):
    [axis] = charts["copying.png"].axes
    assert lines_of(axis) == {
        "real": [[20, 1 / 3], [14, 2 / 3], [9, 1]],
        "generated": [[11, 1 / 2], [7, 1]],
    }


def test_piano_rolls_show_the_notes_of_the_pieces_they_name(charts):
    axes = charts["rolls.png"].axes
    assert [axis.get_title(loc="left") for axis in axes] == ["real", "real", "generated", "generated"]
    for axis, shown in zip(axes, (*REAL[:2], *GENERATED), strict=True):
        bars = np.array([(bar.get_y() + bar.get_height() / 2, bar.get_x(), bar.get_width()) for bar in axis.patches])
        np.testing.assert_allclose(bars[:, 0], shown.pitch)
        np.testing.assert_allclose(bars[:, 1], shown.onset_s)
        np.testing.assert_allclose(bars[:, 2], shown.offset_s - shown.onset_s)
    quiet, *_, loud = (np.mean([bar.get_facecolor()[:3] for bar in axis.patches]) for axis in axes)
    assert loud < quiet  # darker
