"""The benchmarks of what an embedding is worth, at a small size."""

import json
import runpy
from pathlib import Path

import pytest
from conftest import make_performance

from data_pipeline.passage_index import index_split
from data_pipeline.prepare import prepare_maestro
from music_ar.embedding import PieceEmbedder
from music_ar.midi.io import write_midi
from music_ar.midi.performance import Performance

ROOT = Path(__file__).parents[1]


def run_benchmark(name, arguments, monkeypatch, capsys):
    """The lines of JSON that a benchmark prints."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr("sys.argv", [f"{name}.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name="__main__")
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def two_composers(tmp_path_factory):
    """Prepared music in which one composer writes high and the other low."""
    folder = tmp_path_factory.mktemp("two composers")
    lines = ["canonical_composer,canonical_title,split,year,midi_filename"]
    (folder / "midi").mkdir()
    for number, split in enumerate(["train"] * 12 + ["validation"] * 4 + ["test"] * 4):
        composer, low = (("Franz Liszt", 60), ("Johann Sebastian Bach", 40))[number % 2]
        notes = make_performance(number, 120)
        piece = Performance(
            onset_s=notes.onset_s, offset_s=notes.offset_s, pitch=low + notes.pitch % 20, velocity=notes.velocity
        )
        write_midi(piece, folder / "midi" / f"{number}.midi")
        lines.append(f"{composer},Piece {number},{split},2000,{number}.midi")
    (folder / "midi" / "maestro-v3.0.0.csv").write_text("\n".join(lines))
    prepare_maestro(folder / "midi", folder / "data", workers=1)
    return folder / "data"


@pytest.mark.slow
def test_retrieval_compares_an_encoder_with_hand_made_searches(two_composers, tiny_encoder, monkeypatch, capsys):
    options = [two_composers, "--encoder", tiny_encoder, "--excerpts", 12, "--length", 8, "--hop", 4]
    found = {line["search"]: line for line in run_benchmark("retrieval", options, monkeypatch, capsys)}
    assert set(found) == {"pitch classes, rotated", "interval 3-grams", "embedding"}
    assert found["interval 3-grams"]["recall_at_1"] == 1
    for line in found.values():
        assert line["recall_at_1"] <= line["recall_at_10"] <= 1
        assert line["recall_at_1"] <= line["composition_at_1"]
        assert (line["excerpts"], line["pieces"]) == (12, 16)


@pytest.mark.slow
def test_the_probe_tells_composers_who_differ(two_composers, tiny_encoder, monkeypatch, capsys):
    options = [two_composers, "--encoder", tiny_encoder, "--per-piece", 2, "--least-pieces", 4]
    found = run_benchmark("composer_probe", options, monkeypatch, capsys)
    assert {line["input"] for line in found} == {
        "pitches", "pitch classes, from the commonest", "hand-made features", "embedding"
    }  # fmt: skip
    by_pitch = [line for line in found if line["input"] == "pitches"]
    assert [line["label"] for line in by_pitch] == ["composer", "era"]
    assert all(line["piece"] == 1 and line["chance"] == 0.5 for line in by_pitch)


@pytest.mark.slow
def test_ranking_scores_real_and_generated_continuations(
    two_composers, tiny_encoder, tiny_checkpoint, tmp_path, monkeypatch, capsys
):
    encoder = PieceEmbedder.from_pretrained(tiny_encoder)
    index_split(two_composers, "train", encoder).save(tmp_path / "index")
    options = ["--encoder", tiny_encoder, "--index", tmp_path / "index", "--checkpoint", tiny_checkpoint]
    small = ["--prompts", 3, "--prompt-seconds", 6, "--seconds", 6, "--latents", 8, "--variations", 2]
    (found,) = run_benchmark("ranking", [two_composers, *options, *small], monkeypatch, capsys)
    assert set(found["scores"]) == {"plausibility", "typical", "near", "like the prompt"}
    assert all(0 <= auc <= 1 for score in found["scores"].values() for auc in score.values())
