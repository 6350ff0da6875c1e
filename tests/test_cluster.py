"""Work on a Ray cluster: as on one machine, whatever becomes of the nodes, and refused in one sentence."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray_nodes import Nodes
from test_cli import refusal, run
from test_rendering import contents, lines_of

from app.rendering.manifest import Output
from app.rendering.on_ray import Job, Model, RowsOnWorker, Sizes
from music_ar.cluster import connection
from music_ar.decoding.request import GenerationError, Request
from music_ar.generator import Generator
from music_ar.model.weights import read_weights

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Ray's clusters are not for Windows")


# --- without a cluster -----------------------------------------------------------------------------------------------


@pytest.fixture
def options(tiny_checkpoint, tmp_path):
    return ["--count", 1, "--checkpoint", tiny_checkpoint, "--output", tmp_path / "out"]


def test_without_the_extra_it_says_how_to_install_it(capsys, monkeypatch, options, midi_folder, prepared, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    for arguments in (
        ["render", *options, "--ray", "auto"],
        ["prepare", "--midi", midi_folder, "--output", tmp_path / "out", "--ray"],
        ["evaluate", "--data", prepared, "--ray"],
    ):
        assert "--ray needs the extra `ray` (pip install '.[ray]')" in refusal(capsys, *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("address", "said"),
    [("nowhere", 'expected HOST:PORT of a Ray cluster, got "nowhere"'), ("http://here:8265", "expected HOST:PORT"),
     ("127.0.0.1:port", "expected HOST:PORT"), ("127.0.0.1:1", "no Ray cluster at 127.0.0.1:1: Connection refused"),
     ("127.0.0.1:99999", "no Ray cluster at 127.0.0.1:99999"), ("ray://127.0.0.1:1", "Connection refused; start one")],
)  # fmt: skip
def test_an_address_without_a_cluster(capsys, options, address, said):
    pytest.importorskip("ray")
    assert said in refusal(capsys, "render", *options, "--ray", address)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["prepare", "--midi", "midi", "--ray", "--workers", 2], "does not go with --ray"),
     (["prepare", "--midi", "midi", "--ray", "a:1", "b:2"], "at most one address"),
     (["evaluate", "--data", "data", "--ray", "--report", "out"], "does not go with --ray"),
     (["render", "--count", 1, "--output", "-", "--ray", "auto"], "or --ray")],
)  # fmt: skip
def test_what_does_not_go_together(capsys, tmp_path, arguments, said):
    output = [] if "--output" in arguments else ["--output", tmp_path / "out"]
    code, _, errors = run(capsys, *arguments, *output)
    assert code == 2
    assert said in " ".join(errors.split())


def test_a_worker_makes_what_a_generator_makes(tiny_checkpoint):
    """Two sizes of batches, and a request that fails alone."""
    requests = [Request(seconds=2.0, latents=16, seed=seed, tag=output(seed)) for seed in range(6)]
    requests.append(Request(prompt=b"not MIDI", latents=16, seed=6, tag=output(6)))
    worker, generator = (
        RowsOnWorker(Model(read_weights(tiny_checkpoint), "")),
        Generator.from_pretrained(tiny_checkpoint),
    )
    futures = [worker.generate(Job(request, 2 + number // 4)) for number, request in enumerate(requests)]
    made = [future.result(timeout=60) for future in futures]
    assert [piece.request.seed for piece in made] == list(range(7))
    alone = {piece.request.seed: piece for piece in generator.generate_many(requests, batch_size=2)}
    for piece in made:
        assert piece.continuation == alone[piece.request.seed].continuation
        assert piece.error == alone[piece.request.seed].error
        assert piece.nats_per_token == pytest.approx(alone[piece.request.seed].nats_per_token, nan_ok=True)
    assert worker.batch_size(16) == generator.batch_size(16)
    assert worker.seconds_per_token(Sizes(worker.setting(Request(latents=16)), 2)) > 0
    with pytest.raises(GenerationError, match="latents must be in"):
        worker.batch_size(10**6)


def output(seed):
    return Output(file=f"{seed}.mid", prompt=None, prompt_sha256=None, settings={}, model={}, group="all")


# --- on a cluster ----------------------------------------------------------------------------------------------------


@pytest.fixture
def nodes():
    """A cluster of a head and three nodes of one core each."""
    pytest.importorskip("ray")
    with Nodes(ROOT, ROOT, ROOT) as nodes:
        yield nodes


def command(*arguments, cwd=ROOT):
    return subprocess.Popen(
        [sys.executable, "-m", "app.cli", *map(str, arguments)], cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.slow
def test_a_node_is_killed_in_the_middle(capsys, nodes, tiny_checkpoint, midi_folder, tmp_path):
    """After an interruption, too: nothing is lost, nothing is there twice, every file is as from one machine."""
    here, there = tmp_path / "here", tmp_path / "there"
    options = ["render", midi_folder, "--variations", 4, "--seconds", 40, "--batch-size", 2, "--keep-best", 3,
               "--checkpoint", tiny_checkpoint, "--log", "json"]  # fmt: skip
    run(capsys, *options, "--output", here)
    manifest = there / "manifest.jsonl"

    def start_and_wait(pieces):
        started = command(*options, "--output", there, "--ray", nodes.address)
        while started.poll() is None and not (manifest.exists() and manifest.read_text().count("\n") >= pieces):
            time.sleep(0.02)
        return started

    interrupted = start_and_wait(pieces=2)
    interrupted.send_signal(signal.SIGTERM)
    _, errors = interrupted.communicate(timeout=100)
    assert interrupted.returncode == 130
    assert "run the same command to continue" in errors
    before = len(lines_of(there))
    assert 2 <= before < 30
    started = start_and_wait(pieces=before + 4)
    nodes.kill(0)
    text, errors = started.communicate(timeout=300)
    assert started.returncode == 0, errors
    events = [json.loads(line) for line in text.splitlines()]
    made = [event["file"] for event in events if event["event"] == "piece"]
    assert len(made) == len(set(made)) == 40 - before
    assert contents(there) == contents(here)
    assert len(lines_of(there)) == 40


@pytest.mark.slow
def test_data_and_scores_are_as_from_one_machine(nodes, tiny_checkpoint, midi_folder, tmp_path):
    (tmp_path / "midi").mkdir()
    for number in range(4):  # enough for several parts
        shutil.copytree(midi_folder, tmp_path / "midi" / str(number))
    (tmp_path / "midi" / "bad.mid").write_bytes(b"not MIDI")
    data = ["--data", tmp_path / "here", "--split", "train", "test", "--batch-size", 8, "--max-pieces", 4]
    for name, ray in (("here", []), ("there", ["--ray", nodes.address])):
        folder, scores = tmp_path / name, tmp_path / f"{name}.json"
        prepared = command("prepare", "--midi", tmp_path / "midi", "--output", folder, *ray)
        _, errors = prepared.communicate(timeout=300)
        assert prepared.returncode == 3, errors
        options = ["--stride", 16, "--checkpoint", tiny_checkpoint, "--output", scores]
        scored = command("evaluate", *data, *options, *ray)
        _, errors = scored.communicate(timeout=300)
        assert scored.returncode == 0, errors
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert (tmp_path / "there.json").read_bytes() == (tmp_path / "here.json").read_bytes()


@pytest.mark.slow
def test_items_outlive_their_workers():
    pytest.importorskip("ray")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, ROOT / "tests" / "ray_items.py"]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=True, timeout=300)


@pytest.mark.slow
def test_a_node_with_another_version_is_refused(options, tmp_path):
    pytest.importorskip("ray")
    for package in ("app", "data_pipeline", "music_ar"):
        shutil.copytree(ROOT / package, tmp_path / "other" / package)
    with (tmp_path / "other" / "music_ar" / "files.py").open("a") as file:
        file.write("\n# changed\n")
    with Nodes(ROOT, tmp_path / "other") as nodes:
        # Ray's workers also look in the current folder of the process that has started the work.
        refused = command("render", *options, "--ray", nodes.address, cwd=tmp_path)
        _, errors = refused.communicate(timeout=200)
    assert refused.returncode == 2
    assert "has another version of music-ar: install the same on all" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_port_that_is_not_rays_is_given_up(capsys, monkeypatch, options):
    pytest.importorskip("ray")
    monkeypatch.setattr(connection, "_HEALTH_S", 5.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert f"no Ray cluster answers at {address}" in refusal(capsys, "render", *options, "--ray", address)
