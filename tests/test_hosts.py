"""Several processes that train together over loopback, as on many hosts: one clock, one writer, deaths."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_training import log_of

from music_ar.model.pretrained import load_pretrained

HERE, HOST = Path(__file__).parent, socket.gethostname()
EXACT = {"dropout": 0.0, "prefix_keep": 1.0}  # without randomness, which each device draws by itself

pytestmark = pytest.mark.slow


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def run_all(commands, **environment):
    """Run commands at the same time; return what each printed, its exit code and its errors. None outlives the call."""
    with contextlib.ExitStack() as started:
        processes = [
            started.enter_context(
                subprocess.Popen(
                    [sys.executable, *map(str, command)],
                    cwd=HERE.parent,
                    env=os.environ | environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for command in commands
        ]
        for process in processes:
            started.callback(process.kill)
        ended = [process.communicate(timeout=900) for process in processes]
    return [(printed, process.returncode, errors) for process, (printed, errors) in zip(processes, ended, strict=True)]


def train(output, processes, *, devices=1, signals=None, config=EXACT, resume=False):
    """Train in this many processes; return what each printed last, its exit code and its errors.

    `signals` gives process: (the batch at which it gets one, which).
    """
    port, signals = free_port(), signals or {}
    given = {
        "port": port, "processes": processes, "output": str(output), "resume": resume, "config": config,
    }  # fmt: skip
    commands = []
    for process in range(processes):
        at, number = signals.get(process, (None, "SIGTERM"))
        own = {"process": process, "signal_at": at, "signal": number}
        commands.append([HERE / "host_process.py", json.dumps(given | own)])
    results = run_all(commands, JAX_NUM_CPU_DEVICES=str(devices))
    return [((printed.splitlines() or [""])[-1], code, errors) for printed, code, errors in results]


def assert_all_ended(results, step, *, finished):
    for printed, code, errors in results:
        assert code == 0, errors
        assert {"step": step, "finished": finished}.items() <= json.loads(printed).items()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process with one device."""
    output = tmp_path_factory.mktemp("alone")
    assert_all_ended(train(output, 1), 6, finished=True)
    return output


def losses(output):
    return np.array([loss for (loss,) in log_of(output, "loss") if loss is not None])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_give_the_losses_of_one_process_with_as_many_devices(tmp_path, processes):
    """With dropout, which depends on the device; and all validate the same model, but one process writes."""
    config = {"validate_every": 3}
    one = train(tmp_path / "one", 1, devices=processes, config=config)
    many = train(tmp_path / "many", processes, config=config)
    assert_all_ended(one, 6, finished=True)
    assert_all_ended(many, 6, finished=True)
    found = losses(tmp_path / "many")
    assert len(found) == 6
    np.testing.assert_allclose(found, losses(tmp_path / "one"), rtol=0, atol=1e-4)
    validated = [json.loads(printed)["validated"] for printed, *_ in (*one, *many)]
    assert all(values == pytest.approx(validated[0], rel=1e-3) for values in validated)
    assert len(list((tmp_path / "many" / "tensorboard").iterdir())) == 1


def test_stopped_killed_and_resumed_by_other_numbers_of_processes_is_one_run(alone, tmp_path):
    """SIGTERM to one of two; resumed by four, of which one is killed; resumed by one to the end."""
    stopped = train(tmp_path, 2, signals={1: (1, "SIGTERM")})
    step = json.loads(stopped[0][0])["step"]
    assert_all_ended(stopped, step, finished=False)
    assert 2 <= step <= 3
    killed = train(tmp_path, 4, signals={2: (step + 1, "SIGKILL")}, resume=True)
    assert killed[2][1] == -signal.SIGKILL
    for process in (0, 1, 3):
        printed, code, errors = killed[process]
        assert (printed, code) == (f"ended: process 2 on {HOST} is gone", 4), errors
    assert_all_ended(train(tmp_path, 1, resume=True), 6, finished=True)
    assert log_of(tmp_path, "step") == log_of(alone, "step")
    np.testing.assert_allclose(losses(tmp_path), losses(alone), rtol=0, atol=1e-4)


def test_the_death_of_process_0_is_named_too(tmp_path):
    (_, killed, _), (printed, code, errors) = train(tmp_path, 2, signals={0: (1, "SIGKILL")})
    assert killed == -signal.SIGKILL
    assert (printed, code) == (f"ended: process 0 on {HOST} is gone", 4), errors


def commands(prepared, output, *own):
    """The command of each process; `own` are its own options."""
    port, train = free_port(), ["-m", "app.cli", "train", "--preset", "tiny", "--data", prepared, "--output", output]
    here = ["--coordinator", f"localhost:{port}", "--processes", len(own), "--join-timeout", 300]
    return [
        [*train, "--steps", 2, "--batch-size", 4, *here, "--process", process, *options]
        for process, options in enumerate(own)
    ]


def test_the_command_trains_one_model(prepared, tmp_path):
    (printed, code, errors), (quiet, also, _) = run_all(commands(prepared, tmp_path / "run", [], []))
    assert (code, also) == (0, 0), errors
    assert "calibrated" not in quiet
    assert "model" not in quiet  # gloo says something
    assert f"the model is in {tmp_path / 'run' / 'model'}" in printed
    assert load_pretrained(tmp_path / "run" / "model").config.layers > 0
    assert [step for (step,) in log_of(tmp_path / "run", "step")] == [2, 2]


def test_the_command_refuses_a_host_with_other_options(prepared, tmp_path):
    for _, code, errors in run_all(commands(prepared, tmp_path / "run", ["--seed", 1], ["--dropout", 0.3])):
        assert code == 2
        assert f"music-ar: process 1 on {HOST} differs from process 0 on {HOST}: " in errors
        assert "--dropout is 0.3, not 0.1; --seed is 0, not 1. Start all processes with the same" in errors
    assert not (tmp_path / "run").exists()
