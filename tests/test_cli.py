"""The command line, in this process: what it prints, what it rejects, and with which exit code."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import mido
import numpy as np
import pytest
import soundfile

from app import cli
from app.commands import inspect
from app.output import AUDIO_ENDINGS, MIDI_ENDINGS
from music_ar.audio import AudioFormat
from music_ar.audio.synthesis import TAIL_S
from music_ar.decoding import backend
from music_ar.decoding.sampling import SamplingOptions
from music_ar.midi.io import read_midi, write_midi
from music_ar.midi.performance import Performance
from music_ar.tokens import codec, vocabulary

ROOT = Path(__file__).parents[1]


def run(capsys, *arguments):
    """(exit code, standard output, standard error) of `music-ar arguments`."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def refusal(capsys, *arguments):
    """The one line on standard error with which `music-ar arguments` is rejected as bad input."""
    code, _, errors = run(capsys, *arguments)
    lines = [line for line in errors.splitlines() if line.startswith("music-ar: ")]
    assert code == 2
    assert len(lines) == 1
    assert "Traceback" not in errors
    return lines[0]


def test_help_names_every_command(capsys):
    code, output, _ = run(capsys, "--help")
    assert code == 0
    assert {line.split()[0] for line in output.splitlines() if line.startswith("    ")} >= set(cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_its_options(capsys, command):
    code, output, _ = run(capsys, command, "--help")
    assert code == 0
    [example] = [line.removeprefix("Example: music-ar ") for line in output.splitlines() if "Example:" in line]
    assert type(cli.parse(shlex.split(example))).__name__.lower() == command.replace("-", "")
    assert "(default: )" not in output


def test_help_does_not_wait_for_jax():
    script = """
import contextlib, io, sys
from app import cli

def show_help(*commands):
    for command in commands:
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as output:
            cli.main([*command, "--help"])
        assert "--help" in output.getvalue()

show_help([], ["prepare"], ["evaluate"], ["generate"], ["render"], ["inspect"], ["similar"], ["web"], ["bench"])
print("numpy" in sys.modules)
show_help(["train"], ["bench", "decode"], ["bench", "render"])
print("jax" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["False", "False"]


@pytest.mark.parametrize("command", ["generate --output x.mid", "render --output x --count 1", "evaluate --data x"])
def test_every_sampling_option_is_an_option(capsys, command):
    name, *arguments = shlex.split(command)
    fields = dataclasses.fields(SamplingOptions)
    ranges = {field.name: (field.metadata["minimum"], field.metadata["maximum"]) for field in fields}
    given = {field.name: next(end for end in ranges[field.name] if end != field.default) for field in fields}
    flags = [text for option, value in given.items() for text in (f"--{option.replace('_', '-')}", str(value))]
    assert vars(cli.parse([name, *arguments]))["sampling"] == SamplingOptions()
    assert vars(cli.parse([name, *arguments, *flags]))["sampling"] == SamplingOptions(**given)
    code, _, errors = run(capsys, name, *arguments, "--top-p", 2)
    assert code == 2
    assert "top_p" in errors


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["compose"],
        ["inspect"],
        ["inspect", "a.mid", "--loud"],
        ["prepare", "--output", "x"],
        ["prepare", "--output", "x", "--midi", "a", "--maestro", "b"],
        ["generate"],
        ["generate", "--output", "x.mid", "--seconds", "long"],
        ["generate", "--output", "x.mid", "--continuation-only"],
        ["train", "--data", "x", "--output", "y"],
        ["train", "--data", "x", "--output", "y", "--steps", "1", "--preset", "huge"],
        ["evaluate", "--data", "x", "--split", "rest"],
        ["evaluate", "--data", "x", "--seconds", "0"],
        ["bench"],
        ["bench", "decode", "--latents", "0"],
        ["bench", "decode", "--seconds", "1"],
        ["bench", "render", "--pieces", "1", "--loop-pieces", "2"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2_and_an_explanation(capsys, arguments):
    code, output, errors = run(capsys, *arguments)
    assert code == 2
    assert output == ""
    assert errors
    assert "Traceback" not in errors


def readme_commands():
    text = (ROOT / "README.md").read_text()
    commands = re.findall(rf"music-ar ((?:{'|'.join(cli.COMMANDS)}) [^`\n]*)", text)
    return [command for command in commands if "--help" not in command]


@pytest.mark.parametrize("command", readme_commands())
def test_commands_in_the_readme_can_be_typed(command):
    assert type(cli.parse(shlex.split(command, comments=True))).__name__.lower() == command.split()[0]


def test_inspect_prints_statistics(capsys, tmp_path):
    piece = Performance(
        onset_s=np.array([0.0, 1.0, 7.0]),
        offset_s=np.array([2.0, 3.0, 8.0]),
        pitch=np.array([60, 64, 21]),
        velocity=np.array([40, 80, 60]),
    )
    write_midi(piece, tmp_path / "three.mid")
    code, output, _ = run(capsys, "inspect", tmp_path / "three.mid")
    rows = {line[:18].strip(): re.split("  +", line[18:].strip()) for line in output.splitlines()[1:]}
    assert code == 0
    assert rows == {
        "notes": ["3"],
        "length": ["8.00 s (0:08)"],
        "first onset": ["0.00 s"],
        "notes per second": ["0.38", "1.42 / 10.2 / 23.2"],
        "mean polyphony": ["0.62", "1 / 3.9 / 16.7"],
        "lowest pitch": ["A0 (21)", "23 / 32 / 52"],
        "highest pitch": ["E4 (64)", "74 / 89 / 104"],
        "lowest velocity": ["40", "1 / 7 / 39"],
        "median velocity": ["60", "37.5 / 63.5 / 84"],
        "highest velocity": ["80", "67 / 99 / 123"],
        "longest silence": ["4.00 s", "0 / 0.31 / 5.14"],
        "event tokens": [str(len(codec.encode(piece)))],
    }


def test_inspect_compares_and_draws(capsys, tmp_path, midi_file):
    piece = read_midi(midi_file)
    write_midi(piece.crop(0, 10), tmp_path / "beginning.mid")
    picture = tmp_path / "rolls.png"
    code, output, _ = run(capsys, "inspect", midi_file, tmp_path / "beginning.mid", "--plot", picture)
    assert code == 0
    assert re.search(r"notes in common  (\d+) of \d+ and \1, first difference at 10\.", output)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_inspect_finds_copies_from_the_training_split(capsys, midi_folder, prepared, tmp_path):
    from data_pipeline.dataset import Pieces

    name = Pieces.open(prepared, "train").records[3].name
    write_midi(read_midi(midi_folder / name), tmp_path / "copy.mid")
    code, output, errors = run(capsys, "inspect", tmp_path / "copy.mid", "--data", prepared)
    assert code == 0, errors
    assert output.splitlines()[-1] == (
        f"copy.mid: longest run of notes shared with the training split: 200 (in {name}); "
        f"without repeated patterns: 200 (in {name})"
    )


def test_plotting_without_matplotlib_is_rejected_with_one_line(capsys, monkeypatch, tmp_path, midi_file):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert ".[plot]" in refusal(capsys, "inspect", midi_file, "--plot", tmp_path / "roll.png")


def test_inspect_prints_every_token_with_its_time(capsys, midi_file):
    code, output, _ = run(capsys, "inspect", midi_file, "--tokens")
    time_s, token, _ = zip(*(line.split(maxsplit=2) for line in output.splitlines()), strict=True)
    expected = codec.encode(read_midi(midi_file))
    assert code == 0
    np.testing.assert_array_equal(np.array(token, int), expected)
    np.testing.assert_allclose(np.array(time_s, float), codec.event_steps(expected) / vocabulary.STEPS_PER_SECOND)


@pytest.mark.parametrize(
    ("token", "meaning"),
    [
        (vocabulary.NOTE_ON + 60, "note-on 60 (C4)"),
        (vocabulary.NOTE_OFF + 21, "note-off 21 (A0)"),
        (vocabulary.NOTE_OFF - 1, "note-on 127 (G9)"),
        (vocabulary.TIME_SHIFT, "time shift 0.01 s"),
        (vocabulary.VELOCITY - 1, "time shift 1.00 s"),
        (vocabulary.VELOCITY, "velocity 1 of 32"),
        (vocabulary.EVENT_CLASSES - 1, "velocity 32 of 32"),
    ],
)
def test_tokens_are_described(token, meaning):
    assert inspect.describe_token(token) == meaning


@pytest.mark.parametrize(
    "command", [["inspect"], ["generate", "--output", "never.mid", "--prompt"]], ids=lambda c: c[0]
)
@pytest.mark.parametrize("content", [None, b"", b"RIFF and so on", b"MThd\0\0\0\6\0\1\0\1\1\xe0MTrk\0\0\1\0"])
def test_a_file_that_is_not_midi_is_rejected_by_name(capsys, tmp_path, monkeypatch, command, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "not a piece.mid"
    if content is not None:
        path.write_bytes(content)
    assert str(path) in refusal(capsys, *command, path)
    assert not (tmp_path / "never.mid").exists()


@pytest.mark.parametrize("output", ["no such folder/piece.mid", "."])
def test_an_output_that_cannot_be_written_is_rejected_before_the_work(capsys, tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    assert output in refusal(capsys, "generate", "--output", output, "--checkpoint", "never/read")


def test_missing_data_is_rejected(capsys, tmp_path):
    assert "no MIDI file" in refusal(capsys, "prepare", "--midi", tmp_path, "--output", tmp_path / "data")
    assert "maestro" in refusal(capsys, "prepare", "--maestro", tmp_path, "--output", tmp_path / "data")
    train = ["train", "--preset", "tiny", "--steps", "1", "--output", tmp_path / "run"]
    assert "manifest.json" in refusal(capsys, *train, "--data", tmp_path / "nowhere")


def test_a_folder_without_a_checkpoint_is_rejected(capsys, tmp_path, prepared):
    refused = refusal(capsys, "generate", "--output", tmp_path / "piece.mid", "--checkpoint", tmp_path)
    assert str(tmp_path) in refused
    assert str(tmp_path) in refusal(capsys, "evaluate", "--data", prepared, "--checkpoint", tmp_path)


@pytest.mark.parametrize("error", [ValueError("shapes do not match"), RuntimeError("out of memory"), KeyError("x")])
def test_bugs_are_not_reported_as_bad_input(monkeypatch, midi_file, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(inspect, "read_performance", fail)
    with pytest.raises(type(error)):  # Python prints the traceback and ends with 1
        cli.main(["inspect", str(midi_file)])


def test_errors_are_one_line():
    assert cli.error_line(ValueError("first\n  second")) == "first second"
    assert cli.error_line(OSError(28, "No space left on device", "piece.mid")) == "piece.mid: No space left on device"


def generate(capsys, tmp_path, checkpoint, *options, name="piece.mid"):
    output = tmp_path / name
    code, printed, errors = run(
        capsys, "generate", "--output", output, "--checkpoint", checkpoint, "--seconds", 3, *options
    )
    assert code == 0, errors
    return output, printed


def test_the_printed_seed_gives_the_same_piece(capsys, tmp_path, tiny_checkpoint):
    first, printed = generate(capsys, tmp_path, tiny_checkpoint)
    seed = printed.rpartition("seed ")[2].split()[0]
    again, _ = generate(capsys, tmp_path, tiny_checkpoint, "--seed", seed, name="again.mid")
    other, _ = generate(capsys, tmp_path, tiny_checkpoint, "--seed", int(seed) + 1, name="other.mid")
    assert again.read_bytes() == first.read_bytes()
    assert other.read_bytes() != first.read_bytes()
    assert str(first) in printed
    assert f"{len(read_midi(first))} notes" in printed


def test_a_prompt_is_continued(capsys, tmp_path, tiny_checkpoint, midi_file):
    options = ["--prompt", midi_file, "--prompt-seconds", 5, "--seed", 1]
    whole = read_midi(generate(capsys, tmp_path, tiny_checkpoint, *options)[0])
    prompt = read_midi(midi_file)
    before = prompt.onset_s < 4.5  # later notes may be followed by generated ones before the prompt ends
    assert whole.duration_s > 5
    np.testing.assert_array_equal(whole.pitch[: before.sum()], prompt.pitch[before])
    alone = read_midi(generate(capsys, tmp_path, tiny_checkpoint, *options, "--continuation-only")[0])
    assert len(alone) < len(whole)


def test_a_prompts_file_comes_back_with_its_own_events(capsys, tmp_path, tiny_checkpoint):
    """Names, tempo, pedal and velocities; variations, too."""
    prompt, buffer = mido.MidiFile(ticks_per_beat=384), tmp_path / "prompt.mid"
    prompt.tracks.append(
        mido.MidiTrack([mido.MetaMessage("track_name", name="Étude"), mido.MetaMessage("set_tempo", tempo=654_321)])
    )
    messages = [mido.Message("control_change", control=64, value=value, time=5) for value in (0, 71, 127)]
    messages += [mido.Message("note_on", note=60 + number, velocity=31 + number, time=77) for number in range(6)]
    messages += [mido.Message("note_off", note=60 + number, velocity=3, time=11) for number in range(6)]
    prompt.tracks.append(mido.MidiTrack([*messages, mido.Message("control_change", control=64, value=0, time=100)]))
    prompt.save(buffer)
    generate(capsys, tmp_path, tiny_checkpoint, "--prompt", buffer, "--seed", 3, "--variations", 2, "--pedal")
    for name in ("piece-1.mid", "piece-2.mid"):
        written = mido.MidiFile(tmp_path / name)
        assert written.ticks_per_beat == 384
        assert [list(track)[:-1] for track in written.tracks[:2]] == [list(track) for track in prompt.tracks]
        new = [track.name for track in written.tracks[2:]]
        assert new == ["Continuation"] * (len(read_midi(tmp_path / name)) > 6)  # some pieces end at once


@pytest.mark.parametrize("ending", [".wav", ".mp3", ".flac", ".OGG"])
def test_an_output_that_ends_like_sound_is_sound(capsys, tmp_path, tiny_checkpoint, ending):
    path, _ = generate(capsys, tmp_path, tiny_checkpoint, "--seed", 2, name=f"piece{ending}")
    midi, _ = generate(capsys, tmp_path, tiny_checkpoint, "--seed", 2)
    with soundfile.SoundFile(path) as file:
        assert file.format == {".OGG": "OGG"}.get(ending, ending[1:].upper())
        assert file.frames / file.samplerate == pytest.approx(read_midi(midi).duration_s + TAIL_S, abs=0.1)
        assert "seed 2" in file.comment


@pytest.mark.parametrize("name", ["piece.aiff", "piece.mid.txt", "piece"])
def test_an_output_with_another_ending_is_refused_before_the_work(capsys, tmp_path, name):
    refused = refusal(capsys, "generate", "--output", tmp_path / name, "--checkpoint", "never/read")
    for ending in (*MIDI_ENDINGS, *AUDIO_ENDINGS):
        assert ending in refused


def test_sound_without_its_extra_is_refused_before_the_work(capsys, tmp_path, monkeypatch):
    for name in ("music_ar.audio", "music_ar.audio.synthesis"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "soundfile", None)
    refused = refusal(capsys, "generate", "--output", tmp_path / "piece.mp3", "--checkpoint", "never/read")
    assert "pip install '.[audio]'" in refused


def test_sound_has_the_pedal_in_any_case(capsys, tmp_path):
    refused = refusal(capsys, "generate", "--output", tmp_path / "piece.mp3", "--pedal", "--checkpoint", "never/read")
    assert "--pedal is for MIDI" in refused


def test_all_formats_of_sound_have_an_ending():
    assert {ending[1:] for ending in AUDIO_ENDINGS} == set(get_args(AudioFormat))


def test_evaluate_prints_and_writes_the_score(capsys, tmp_path, prepared, tiny_checkpoint):
    from data_pipeline.dataset import Pieces
    from music_ar.evaluation.likelihood import ScoringConfig, score
    from music_ar.model.pretrained import load_pretrained

    written = tmp_path / "scores.json"
    sizes = ["--context", 48, "--latents", 32, "--stride", 16, "--max-pieces", 1]
    code, output, _ = run(
        capsys, "evaluate", "--data", prepared, "--split", "test", "--checkpoint", tiny_checkpoint, "--output", written,
        *sizes,
    )  # fmt: skip
    pieces = [Pieces.open(prepared, "test").tokens[0].astype(np.int32)]
    expected = score(
        load_pretrained(tiny_checkpoint), pieces, ScoringConfig(context=48, latents=32, stride=16)
    ).metrics()
    scores = json.loads(written.read_text())
    assert code == 0
    assert scores["test"] == pytest.approx(expected)
    assert (scores["context"], scores["latents"], scores["stride"]) == (48, 32, 16)
    assert f"{expected['nats_per_token']:.4g}" in output


def test_evaluate_rejects_sizes_that_do_not_fit(capsys, prepared, tiny_checkpoint):
    refused = refusal(capsys, "evaluate", "--data", prepared, "--checkpoint", tiny_checkpoint, "--stride", 33)
    assert "--stride" in refused
    assert "33" in refused


def test_bench_times_and_scores_each_number_of_latents(capsys, tmp_path, tiny_checkpoint, prepared):
    written = tmp_path / "bench.json"
    code, output, errors = run(
        capsys, "bench", "decode", "--checkpoint", tiny_checkpoint, "--latents", 8, 16, "--batch", 1, 2, "--tokens", 1,
        "--data", prepared, "--piece-tokens", 100, "--output", written,
    )  # fmt: skip
    assert code == 0, errors
    result = json.loads(output.splitlines()[-1])
    assert json.loads(written.read_text()) == result
    assert [(row["latents"], row["batch"]) for row in result["rows"]] == [(8, 1), (8, 2), (16, 1), (16, 2)]
    assert all(row["tokens_per_s"] > 0 and row["first_note_s"] > 0 for row in result["rows"])
    assert all(row["mode"] == "sliding" for row in result["rows"])
    assert result["rows"][0]["nats_per_token"] == result["rows"][1]["nats_per_token"]  # of the latents, not the batch
    assert result["rows"][0]["nats_per_token"] != result["rows"][2]["nats_per_token"]
    assert all((row["layers"], row["tolerance"], row["mean_layers"]) == (2, 0, 2) for row in result["rows"])


def test_bench_render_compares_batches_with_a_loop(capsys, tiny_checkpoint):
    code, output, errors = run(
        capsys, "bench", "render", "--checkpoint", tiny_checkpoint, "--latents", 8, "--batch", 2, 3,
        "--pieces", 4, "--loop-pieces", 1, "--seconds", 1,
    )  # fmt: skip
    assert code == 0, errors
    rows = json.loads(output.splitlines()[-1])["rows"]
    assert [(row["way"], row["batch"], row["pieces"]) for row in rows] == [
        ("loop", 1, 1),
        ("render", 2, 4),
        ("render", 3, 4),
    ]
    assert all(row["tokens_per_s"] > 0 and row["seconds_of_music"] > 0 for row in rows)


def test_bench_rejects_more_latents_than_the_model_has(capsys, tiny_checkpoint):
    assert "at most 32" in refusal(capsys, "bench", "decode", "--checkpoint", tiny_checkpoint, "--latents", 64)


def test_the_version_is_printed(capsys):
    code, output, _ = run(capsys, "--version")
    assert code == 0
    assert output[0].isdigit()


@pytest.mark.parametrize(
    ("command", "many_rows"),
    [
        ("generate --output x.mid", False),
        ("web", False),
        ("render --output x --count 1", True),
        ("bench decode", False),
        ("bench render", True),
    ],
)
def test_jax_is_set_up_to_suit_the_command(monkeypatch, command, many_rows):
    """A CPU is split into devices; for few rows, memory of a GPU is not reserved."""
    chosen = cli.parse(shlex.split(command))
    monkeypatch.setattr(type(chosen), "run", lambda _: None)
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(backend, "cpu_devices", lambda *, many_rows: 3 + many_rows)
    assert cli.main(shlex.split(command)) == 0
    assert os.environ["JAX_NUM_CPU_DEVICES"] == str(3 + many_rows)
    assert os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE") == (None if many_rows else "false")
