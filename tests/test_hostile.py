"""Numbers and names that no command can use: exit code 2 and a sentence that says what is possible, before any work."""

import re
import shlex

import pytest
from test_cli import run

LONG = "9" * 401
GENERATE, RENDER, EVALUATE = "generate --output x.mid", "render --output x --count 1", "evaluate --data x"
TRAIN, PREPARE = "train --data x --output y", "prepare --midi x --output y"
DECODE, SPEED = "bench decode", "bench render"

SECONDS = "seconds must be a number above 0 and at most 86400, got "
TOP_K = "top_k must be a whole number from 0 to 1000, got "
DIGITS = "a number of 401 digits"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        *((f"{command} --seconds={value}", f"{SECONDS}{shown}")
          for command in (GENERATE, RENDER, SPEED, f"{EVALUATE} --report r")
          for value, shown in (("3e7", "30000000"), ("nan", "nan"), ("inf", "inf"), ("-inf", "-inf"), ("-0.0", "-0"),
                               ("1e-400", "0"), (LONG, "inf"))),
        *((f"{command} --top-k={value}", f"{TOP_K}{shown}") for command in (GENERATE, RENDER, EVALUATE)
          for value, shown in ((2**40, str(2**40)), (-1, "-1"), (LONG, DIGITS))),
        *((f"{command} --temperature={value}", f"temperature must be a number from 0 to 100, got {value}")
          for command in (GENERATE, RENDER, EVALUATE) for value in ("nan", "inf", "-1")),
        *((f"{command} --{option} {LONG}", f"must be a whole number from {least} to {most}, got {DIGITS}")
          for command, option, least, most in (
              (GENERATE, "seed", 0, 2**31 - 1), (GENERATE, "variations", 1, 10_000), (RENDER, "seed", 0, 2**31 - 1),
              (RENDER, "variations", 1, 10_000), (RENDER, "count", 0, 10**6), (RENDER, "batch-size", 1, 4096),
              (EVALUATE, "context", 1, 2**20), (EVALUATE, "stride", 1, 2**20), (EVALUATE, "batch-size", 1, 2**16),
              (EVALUATE, "pieces", 1, 10**6), (PREPARE, "workers", 1, 1000), (f"{TRAIN} --steps 1", "folds", 2, 1000),
              (TRAIN, "steps", 1, 10**9), (f"{TRAIN} --steps 1", "seed", 0, 2**31 - 1),
              (DECODE, "latents", 1, 2**20), (DECODE, "batch", 1, 4096), (DECODE, "tokens", 1, 2**20),
              (SPEED, "pieces", 1, 2**20),
          )),
        ("render - --jobs - --output x", "standard input (-) can be a prompt or the jobs, not both"),
        (f"{RENDER} --keep-best 0", "--keep-best must be a whole number of at least 1, got 0"),
        (f"{RENDER} --latents 1", "latents must be a whole number of at least 2, or auto, got 1"),
        (f"{RENDER} --prompt-seconds nan", "prompt_seconds must be a number above 0 and at most 86400, got nan"),
        (f"{RENDER} --variations 2 --seed 2147483647", "got 2147483647 for the first of 2 variations"),
        (f"{GENERATE} --latents auto --speed inf", "speed must be a number above 0 and at most 1000, got inf"),
        (f"{PREPARE} --validation nan", "--validation must be a number from 0 to 1, got nan"),
        (f"{PREPARE} --test -0.1", "--test must be a number from 0 to 1, got -0.1"),
        (f"{TRAIN} --minutes nan", "minutes must be a number above 0 and at most 525600, got nan"),
        (f"{TRAIN} --minutes inf", "minutes must be a number above 0"),
        (f"{TRAIN} --steps 1 --muon-learning-rate inf", "muon_learning_rate must be a number from 0 to 10, got inf"),
        (f"{TRAIN} --steps 1 --max-stretch nan", "max_stretch must be a number from 1 to 2, got nan"),
        (f"{TRAIN} --steps 1 --wish-dropout 2", "wish_dropout must be a number from 0 to 1, got 2"),
        ("train --output y --steps 1", "expected either --data or --sources, got neither"),
        (f"{TRAIN} --steps 1 --sources z", "expected either --data or --sources, got both"),
        ("train --sources none.csv --output y --steps 1", "none.csv: cannot be read"),
        ("prepare --maestro x --table t.csv --output y", "--table goes with --midi"),
        (f"{GENERATE} --density -1", "density must be a number from 0 to 100, got -1"),
        (f"{GENERATE} --composer Chopin", "this model takes no wishes, got composer"),
        (f"{RENDER} --pedal-share nan", "pedal_share must be a number from 0 to 1, got nan"),
        (f"{RENDER} --era Romantic", "this model takes no wishes, got era"),
        (f"generate --output {'x' * 250}.mid", "a file's name must have at most 240 bytes, got 254"),
        (f"{GENERATE} --seed {'9' * 5000}", "seed"),
        (f"{RENDER} --jobs nowhere.jsonl", "nowhere.jsonl"),
        (f"{RENDER} --jobs /dev/zero", "/dev/zero: it is a device, not a file"),
    ],
    ids=lambda value: value[:60],
)  # fmt: skip
def test_what_is_not_possible_is_said(capsys, monkeypatch, tmp_path, command, said):
    monkeypatch.chdir(tmp_path)
    code, _, errors = run(capsys, *shlex.split(command))
    assert code == 2
    assert "Traceback" not in errors
    assert said in " ".join(re.sub("[│╭╮╰╯─]", " ", errors).split())
    assert not list(tmp_path.iterdir())
