"""Continue a prompt of 65,536 tokens for an hour, on the command line and through the page: memory, and cost over time.

    python benchmarks/an_hour.py [--seconds 3600] [--prompt-tokens 65536] [--latents 1024]

The prompt is the page's example prompts, one after another, again and again. Prints one line of JSON for each way: the
seconds that a tenth of the music and all of it take with the most memory used; and on the page, when each tenth of the
music was there, with its notes and the server's memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gradio_client import Client, handle_file
from served import served
from web_load import resident_mb

from music_ar import Performance, encode, read_midi, write_midi

EXAMPLES = sorted((Path(__file__).parents[1] / "app" / "web" / "prompts").glob("*.mid"))
_REST_S = 2.0  # between two examples
_PARTS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--prompt-tokens", type=int, default=65_536)
    parser.add_argument("--latents", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prompt = Path(folder) / "prompt.mid"
        piece = long_prompt(arguments.prompt_tokens)
        write_midi(piece, prompt)
        for way, run in (("command line", on_command_line), ("page", on_page)):
            result = {"benchmark": "an_hour", "way": way, "prompt_s": round(piece.duration_s)}
            print(json.dumps(result | run(prompt, piece, arguments)), flush=True)


def long_prompt(tokens: int) -> Performance:
    """The examples one after another, with at least so many tokens."""
    examples = [read_midi(path) for path in EXAMPLES]
    repeats = -(-tokens // sum(len(encode(example)) for example in examples))
    parts, begin_s = [], 0.0
    for example in examples * repeats:
        parts.append((example.onset_s + begin_s, example.offset_s + begin_s, example.pitch, example.velocity))
        begin_s += example.duration_s + _REST_S
    onset_s, offset_s, pitch, velocity = map(np.concatenate, zip(*parts, strict=True))
    return Performance(onset_s=onset_s, offset_s=offset_s, pitch=pitch, velocity=velocity)


def on_command_line(prompt: Path, piece: Performance, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time `music-ar generate` for a tenth of the music and for all of it, and find the most memory it used."""
    found = {}
    for name, seconds in (("a tenth", arguments.seconds / _PARTS), ("all", arguments.seconds)):
        output = prompt.with_name(f"{name}.mid")
        command = [sys.executable, "-m", "app.cli", "generate", "--prompt", str(prompt), "--output", str(output)]
        command += ["--seconds", str(seconds), "--latents", str(arguments.latents), "--seed", str(arguments.seed)]
        command += [] if arguments.checkpoint is None else ["--checkpoint", arguments.checkpoint]
        began_s, most_mb = time.monotonic(), 0.0
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            most_mb = max(most_mb, resident_mb(process.pid))
            time.sleep(0.1)
        made = read_midi(output)
        new = len(encode(made)) - len(encode(piece))
        found[name] = {
            "seconds": round(time.monotonic() - began_s, 1),
            "music_s": round(made.duration_s - piece.duration_s),
            "tokens": new,
            "most_mb": round(most_mb),
        }
    return found


def on_page(prompt: Path, piece: Performance, arguments: argparse.Namespace) -> dict[str, Any]:
    """Follow the music as the page makes it."""
    with served(measure=False, checkpoint=arguments.checkpoint) as (address, process):
        client = Client(address, verbose=False)
        began_s = time.monotonic()
        job = client.submit(
            prompt=handle_file(str(prompt)),
            seconds=arguments.seconds,
            latents=arguments.latents,
            seed=arguments.seed,
            api_name="/generate",
        )
        parts = list(tenths(job, process, began_s, piece, arguments.seconds))
        client.close()
    return {"first_music_s": parts[0]["at_s"], "parts": parts}


def tenths(
    job: Any, process: int, began_s: float, piece: Performance, seconds: float
) -> Iterator[dict[str, float | int]]:
    """The time, the notes made and the server's memory at the first music and after each tenth of it."""
    due_s = 0.0
    for progress, _ in job:
        made_s, notes = progress["seconds"][0] - piece.duration_s, progress["notes"][0] - len(piece.pitch)
        if made_s > due_s or progress["finished"]:
            at_s = round(time.monotonic() - began_s, 1)
            yield {"music_s": round(made_s), "at_s": at_s, "notes": notes, "mb": round(resident_mb(process))}
            due_s += seconds / _PARTS


if __name__ == "__main__":
    main()
