"""The benchmarks that check something, at a small size."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import noisy_model

from data_pipeline.dataset import Pieces
from data_pipeline.wish_table import wish_table
from music_ar.features.wish_options import NUMBERS
from music_ar.model.config import PRESETS
from music_ar.model.pretrained import save_pretrained
from music_ar.tokens.vocabulary import INFILL_VOCABULARY_SIZE, PAD, START

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_unattended(tiny_checkpoint, prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    options = ["--prompts", 10, "--prompt-seconds", 2, "--seconds", 1, "--latents", 16, "--batch-size", 2]
    arguments = ["unattended.py", prepared, tmp_path, "--checkpoint", tiny_checkpoint, *options]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "benchmarks" / "unattended.py"), run_name="__main__")
    checks = json.loads(capsys.readouterr().out.splitlines()[-1])["checks"]
    assert [name for name, passed in checks.items() if not passed] == []
    assert stop.value.code == 0
    # What it reports is what the folders hold.
    lines = [json.loads(line) for line in (tmp_path / "resumed" / "manifest.jsonl").read_text().splitlines()]
    assert sorted(line["status"] for line in lines) == ["failed"] * 12 + ["made"] * 8
    assert (tmp_path / "resumed/manifest.jsonl").read_bytes() == (tmp_path / "whole/manifest.jsonl").read_bytes()


@pytest.mark.slow
def test_copy_task_trains_scores_and_decodes(tmp_path, monkeypatch, capsys):
    options = "--lengths 32 --minutes 0.02 --latents 8 --width 64 --layers 1 --held-out 2 --decoded 4"
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr("sys.argv", ["copy_task.py", "--output", str(tmp_path), *options.split()])
    runpy.run_path(str(ROOT / "benchmarks" / "copy_task.py"), run_name="__main__")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["benchmark"] for line in lines] == ["copy_task", "copy_task_decoding", "copy_task_decoding"]
    assert lines[0]["of"] == 2 * 15


@pytest.mark.slow
def test_parity_trains_and_scores_models_of_about_one_size(tmp_path, monkeypatch, capsys):
    options = "--lengths 4 --steps 2 --batch-size 4 --width 16 --layers 1 --held-out 8"
    monkeypatch.setattr("sys.argv", ["parity.py", "--output", str(tmp_path), *options.split()])
    runpy.run_path(str(ROOT / "benchmarks" / "parity.py"), run_name="__main__")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["model"] for line in lines] == ["tape", "perceiver-ar", "decoder-only"]
    assert all(list(line["scores"]) == ["2 bits", "4 bits", "8 bits"] for line in lines)
    sizes = [line["parameters"] for line in lines]
    assert max(sizes) < 1.1 * min(sizes)


def test_the_bits_of_parity_by_hand():
    parity = runpy.run_path(str(ROOT / "benchmarks" / "parity.py"))
    rows = parity["sequences"](np.random.default_rng(0), np.array([1, 3, 3, 2]), 5)
    for row, count in zip(rows.tolist(), [1, 3, 3, 2], strict=True):
        assert row[: 3 - count] == [PAD] * (3 - count)
        start, *bits, ask, answer = row[3 - count :]
        assert (start, ask, len(bits)) == (START, 2, count)
        assert answer == bits.count(1) % 2
        assert set(bits) <= {0, 1}


def test_the_runs_with_a_tape_can_be_made():
    sizes_of = runpy.run_path(str(ROOT / "benchmarks" / "ablate.py"))["sizes_of"]
    runs = json.loads((ROOT / "benchmarks" / "tape_runs.json").read_text())
    costs = [sizes_of(run).flops_per_target(2048) for run in runs]
    assert costs[0] == min(costs)
    assert {run["name"] for run in runs if sizes_of(run).tape is None} == {"plain"}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["perceiver-ar", "transformer-xl"])
def test_context_length_times_every_context(model, monkeypatch, capsys):
    options = f"--model {model} --contexts 32 16 --latents 8 --layers 1 --width 64 --steps 1"
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr("sys.argv", ["context_length.py", *options.split()])
    runpy.run_path(str(ROOT / "benchmarks" / "context_length.py"), run_name="__main__")
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [result["context"] for result in results] == [16, 32]


@pytest.mark.slow
def test_wishes_are_compared_with_what_came(prepared, tmp_path, monkeypatch, capsys):
    table = wish_table([Pieces.open(prepared, "train")], 32)
    save_pretrained(noisy_model(dataclasses.replace(PRESETS["tiny"], layers=1, wishes=table)), tmp_path / "model")
    options = f"--checkpoint {tmp_path / 'model'} --pieces 5 --seconds 6 --windows 2 --latents 8 --guidance 2"
    monkeypatch.setattr("sys.argv", ["wishes.py", str(prepared), *options.split()])
    runpy.run_path(str(ROOT / "benchmarks" / "wishes.py"), run_name="__main__")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found["rank_correlation"]) == set(NUMBERS)
    assert abs(found["rank_correlation"]["register"]) <= 1
    assert found["composers"] is None
    without, own = found["nats_per_token"].values()
    assert without != own


@pytest.mark.slow
def test_infill_scores_middles_from_both_sides_and_from_one(prepared, tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(PRESETS["tiny"], context=512, vocabulary_size=INFILL_VOCABULARY_SIZE)
    save_pretrained(noisy_model(config), tmp_path)
    options = f"--checkpoint {tmp_path} --gaps 1 2 --count 3 --filled 0 --batch-size 2"
    monkeypatch.setattr("sys.argv", ["infill.py", str(prepared), *options.split()])
    runpy.run_path(str(ROOT / "benchmarks" / "infill.py"), run_name="__main__")
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [(result["seconds"], result["count"]) for result in results] == [(1.0, 3), (2.0, 3)]
    for result in results:
        assert result["gain"] == pytest.approx(result["left"] - result["both"])
        assert result["gain"] != 0


@pytest.mark.slow
def test_an_hour_is_followed_on_both_ways(tiny_checkpoint, monkeypatch, capsys):
    options = f"--checkpoint {tiny_checkpoint} --seconds 10 --prompt-tokens 8000 --latents 16"
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr("sys.argv", ["an_hour.py", *options.split()])
    runpy.run_path(str(ROOT / "benchmarks" / "an_hour.py"), run_name="__main__")
    command_line, page = map(json.loads, capsys.readouterr().out.splitlines())
    assert command_line["a tenth"]["music_s"] <= 2
    assert 0 < command_line["a tenth"]["tokens"] < command_line["all"]["tokens"]
    assert page["parts"][-1]["music_s"] == pytest.approx(command_line["all"]["music_s"], abs=1)
    assert page["parts"][-1]["notes"] > 0
    assert page["prompt_s"] > 120


@pytest.mark.slow
@pytest.mark.parametrize(("script", "symbol", "count"), [("pixels", "pixel", 2), ("text_bytes", "byte", 3)])
def test_orders_are_compared_with_references(script, symbol, count, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr("sys.argv", [f"{script}.py", "--output", str(tmp_path), "--steps", "3", "--seeds", "1"])
    runpy.run_path(str(ROOT / "benchmarks" / f"{script}.py"), run_name="__main__")
    references, *models = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert len({model["order"] for model in models}) == len(models) == count
    uniform = {"pixel": 17, "byte": 256}[symbol]
    assert 0 < references["unigram"] < np.log(uniform)
    for model in models:
        assert 0 < model[f"nats_per_{symbol}"] < 2 * np.log(uniform)
