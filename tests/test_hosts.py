"""Several processes that train together over loopback, as on many hosts: one clock, one writer, deaths."""

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

HERE, HOST = Path(__file__).parent, socket.gethostname()
EXACT = {"dropout": 0.0, "prefix_keep": 1.0}  # without randomness, which each device draws by itself

pytestmark = pytest.mark.slow


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def train(output, processes, *, devices=1, signals=None, descriptions=None, config=EXACT, resume=False, timeout_s=300):
    """Train in this many processes; return what each printed last, its exit code and its errors.

    `signals` gives process: (the batch at which it gets one, which), `descriptions` process: what it says it runs.
    """
    port, signals, descriptions = free_port(), signals or {}, descriptions or {}
    given = {
        "port": port, "processes": processes, "output": str(output), "resume": resume, "config": config,
        "timeout_s": timeout_s,
    }  # fmt: skip
    started = []
    try:
        for process in range(processes):
            at, number = signals.get(process, (None, "SIGTERM"))
            own = {"process": process, "signal_at": at, "signal": number, "description": descriptions.get(process, {})}
            started.append(
                subprocess.Popen(
                    [sys.executable, HERE / "host_process.py", json.dumps(given | own)],
                    cwd=HERE.parent,
                    env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        ended = [process.communicate(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [
        ((printed.splitlines() or [""])[-1], process.returncode, errors)
        for process, (printed, errors) in zip(started, ended, strict=True)
    ]


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
