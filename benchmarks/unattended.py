"""Render a folder of prompts unattended, kill the process half-way, resume, and check the result.

    python benchmarks/unattended.py maestro-v3.0.0-midi.zip FOLDER
    python benchmarks/unattended.py data/maestro FOLDER --seconds 8 --latents 256 --prompt-seconds 10

Takes MAESTRO's zip or folder, or a dataset written by `music-ar prepare`. FOLDER gets `prompts`: excerpts of the test
split, six of them damaged in different ways; `whole`: the output of one run of `music-ar render`; and `resumed`: the
output of the same command, killed (kill -9) half-way and run again. It checks the exit codes, that both folders are
identical to the byte, that the manifest has each prompt, and that the resident memory of the uninterrupted run, taken
at each finished piece, rises by no more than a tenth from the 10th piece to the last. Exit code 1 if a check fails.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np

from app.console import print_table
from data_pipeline.dataset import Pieces
from data_pipeline.maestro import MidiFiles, read_table
from music_ar import Performance, decode, read_midi, write_midi

ROOT = Path(__file__).parents[1]
SOME_FAILED = 3
DAMAGES = ("empty", "truncated", "text", "no notes", "random bytes", "dead link")
_NO_NOTES = bytes.fromhex("4d546864000000060000000103e84d54726b0000000400ff2f00")
_LEVEL_FROM = 10
# By what fraction the median of the last quarter of the samples may exceed that of the first. It is not 0, because each
# power of two of prompt tokens is compiled when it first occurs, and freed memory returns to the system late.
_MAX_RISE = 0.1


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of the command.

    Attributes:
        code: exit code.
        seconds: time it took.
        memory_mb: resident memory at each finished piece.
        summary: last line of its log.
    """

    code: int
    seconds: float
    memory_mb: list[float]
    summary: dict[str, object]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="MAESTRO's zip or folder, or a dataset written by `music-ar prepare`")
    parser.add_argument("folder", type=Path, help="new folder to work in")
    parser.add_argument("--prompts", type=int, default=200, help="number of prompts, including the six damaged ones")
    parser.add_argument("--prompt-seconds", type=float, default=20.0, help="length of each excerpt")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each continuation")
    parser.add_argument("--variations", type=int, default=2)
    parser.add_argument("--latents", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, help="default: that of the command")
    parser.add_argument("--checkpoint", help="default: the shipped model")
    arguments = parser.parse_args()
    if arguments.prompts <= len(DAMAGES):
        parser.error(f"--prompts must be more than {len(DAMAGES)}")

    prompts, whole, resumed = (arguments.folder / name for name in ("prompts", "whole", "resumed"))
    damaged = write_prompts(arguments.data, prompts, count=arguments.prompts, seconds=arguments.prompt_seconds)
    options = [str(prompts), "--log", "json"]
    for name in ("seconds", "variations", "latents", "batch_size", "checkpoint"):
        value = getattr(arguments, name)
        options += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]

    good = (arguments.prompts - len(damaged)) * arguments.variations
    first = render(options, whole)
    killed = render(options, resumed, kill_after=good // 2)
    finished = sum(line["status"] == "made" for line in read_manifest(resumed))
    again = render(options, resumed)

    checks = {
        "exit code of the uninterrupted run": first.code == SOME_FAILED,
        "killed half-way": killed.code < 0 and 0 < finished < good,
        "exit code of the second run": again.code == SOME_FAILED,
        "the second run generated only the missing pieces": again.summary.get("made") == good - finished,
        "identical bytes, including the manifest": contents(whole) == contents(resumed),
    } | check_manifest(whole, prompts, damaged, arguments.variations)
    memory = memory_trend(first.memory_mb)
    checks["memory does not grow"] = memory["rise"] <= _MAX_RISE

    lines = read_manifest(whole)
    music_s = sum(line["seconds"] for line in lines if line["status"] == "made")
    print_table(("failed", "error"), sorted({(PurePath(x["prompt"]).name, x["error"]) for x in lines if x["error"]}))
    print_table(("memory of the uninterrupted run", ""), [(name, f"{value:.4g}") for name, value in memory.items()])
    print_table(("check", ""), [(name, "yes" if passed else "NO") for name, passed in checks.items()])
    result = {
        "benchmark": "unattended",
        "prompts": arguments.prompts,
        "pieces": len(lines),
        "music_s": round(music_s, 1),
        "seconds": round(first.seconds, 1),
        "killed_after": finished,
        "seconds_of_killed_and_second": [round(killed.seconds, 1), round(again.seconds, 1)],
        "latents": arguments.latents,
        "memory": {name: round(value, 4) for name, value in memory.items()},
        "checks": checks,
    }
    print(json.dumps(result))
    return 0 if all(checks.values()) else 1


def write_prompts(data: Path, folder: Path, *, count: int, seconds: float) -> dict[str, str]:
    """Write the prompts, in a folder per year as in MAESTRO; return the damaged ones, and how each is damaged.

    Each prompt is the beginning of a test piece; if there are too few pieces, the seconds after it come next.
    """
    pieces = test_pieces(data)
    excerpts = (
        (name, turn, piece.crop(piece.onset_s[0] + turn * seconds, piece.onset_s[0] + (turn + 1) * seconds))
        for turn in range(count)
        for name, piece in pieces
    )
    usable = ((f"{name} {turn + 1}.midi", excerpt) for name, turn, excerpt in excerpts if len(excerpt) > 1)
    names = []
    for _, (name, excerpt) in zip(range(count), usable, strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_midi(excerpt, folder / name)
        names.append(name)
    if len(names) < count:
        raise SystemExit(f"expected music for {count} excerpts of {seconds:g} s in {data}, found {len(names)}")
    damaged = {names[(2 * place + 1) * count // (2 * len(DAMAGES))]: how for place, how in enumerate(DAMAGES)}
    for name, how in damaged.items():
        damage(folder / name, how)
    return damaged


def test_pieces(data: Path) -> list[tuple[str, Performance]]:
    """The pieces of the test split, with their names without extension."""
    if (data / "manifest.json").exists():
        pieces = Pieces.open(data, "test")
        named = zip(pieces.records, pieces.tokens, strict=True)
        return [(str(PurePath(r.name).with_suffix("")), decode(tokens.astype(np.int32))) for r, tokens in named]
    with MidiFiles(data) as files:
        listed = [piece for piece in read_table(files) if piece.split == "test"]
        return [(str(PurePath(p.name).with_suffix("")), read_midi(files.read(p.path))) for p in listed]


def damage(path: Path, how: str) -> None:
    """Make a prompt unusable, in one of the ways of `DAMAGES`."""
    whole = path.read_bytes()
    path.unlink()
    if how == "dead link":
        path.symlink_to(path.with_name("nowhere.midi"))
        return
    path.write_bytes(
        {
            "empty": b"",
            "truncated": whole[: len(whole) // 2],
            "text": b"Not found. The file that you asked for has moved.\n",
            "no notes": _NO_NOTES,
            "random bytes": random.Random(0).randbytes(len(whole)),
        }[how]
    )


def render(options: list[str], output: Path, *, kill_after: int | None = None) -> Run:
    """Run `music-ar render`; with `kill_after`, kill it after that many pieces."""
    began_s, memory_mb, event = time.monotonic(), [], {}
    command = [sys.executable, "-m", "app.cli", "render", *options, "--output", str(output)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] != "piece" or event["status"] != "made":
                continue
            memory_mb.append(resident_mb(process.pid))
            if len(memory_mb) == kill_after:
                process.kill()
    return Run(code=process.returncode, seconds=time.monotonic() - began_s, memory_mb=memory_mb, summary=event)


def resident_mb(process_id: int) -> float:
    """Resident memory of a process on Linux; NaN once it has ended."""
    try:
        status = Path(f"/proc/{process_id}/status").read_text(encoding="ascii")
    except OSError:
        return np.nan
    sizes = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(sizes[0]) / 1024 if sizes else np.nan


def memory_trend(memory_mb: list[float]) -> dict[str, float]:
    """Medians of the quarters of the samples and the rise, without the first ten (of fewer than 20: the first half)."""
    level = np.array(memory_mb[min(_LEVEL_FROM, len(memory_mb) // 2) :])
    level = level[np.isfinite(level)]
    quarters = [float(np.median(part)) if len(part) else np.nan for part in np.array_split(level, 4)]
    named = {f"quarter_{number}_mb": quarter for number, quarter in enumerate(quarters, start=1)}
    return {
        "samples": len(level),
        **named,
        "most_mb": float(level.max(initial=0)),
        "rise": quarters[3] / quarters[0] - 1,
    }


def check_manifest(output: Path, prompts: Path, damaged: dict[str, str], variations: int) -> dict[str, bool]:
    """Check that each prompt has its lines, finished pieces their files, and failed ones an error."""
    lines = read_manifest(output)
    wanted = sorted(path.as_posix() for path in prompts.rglob("*.midi") for _ in range(variations))
    failed = [line for line in lines if line["status"] == "failed"]
    made = [line for line in lines if line["status"] == "made"]
    bad = sorted((prompts / name).as_posix() for name in damaged for _ in range(variations))
    return {
        f"the manifest has all {len(wanted) // variations} prompts": wanted == sorted(_prompts(lines)),
        f"{len(damaged)} failed, each with an error": sorted(_prompts(failed)) == bad
        and all(line["error"] for line in failed),
        f"{len(made) // variations} finished, each with its file": len(made) == len(wanted) - len(bad)
        and all((output / line["file"]).is_file() for line in made),
    }


def _prompts(lines: list[dict]) -> Iterator[str]:
    return (line["prompt"] for line in lines)


def read_manifest(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder, including hidden ones."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


if __name__ == "__main__":
    sys.exit(main())
