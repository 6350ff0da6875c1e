"""A folder that several processes render into, with made-up pieces and without JAX, for `test_manifest`."""

import dataclasses
import json
import os
import random
import signal
import time

from app.rendering.leases import Leases
from app.rendering.manifest import Manifest, Output, planned_line
from music_ar.decoding.request import Request
from music_ar.decoding.sampling import SamplingOptions

PIECES = 12


def requests():
    """A plan of pieces, as `Plan` makes it."""
    settings = dataclasses.asdict(SamplingOptions())
    return [
        Request(
            seed=number,
            tag=Output(
                file=f"{number}.mid",
                prompt=None,
                prompt_sha256=None,
                settings=settings,
                model={"name": "m"},
                group="all",
            ),
        )
        for number in range(PIECES)
    ]


def music(request):
    """The bytes of a piece, which only its seed decides."""
    return random.Random(request.seed).randbytes(3000 + 100 * request.seed)


def finish(manifest, request):
    line = planned_line(request) | {"status": "made", "sha256": manifest.write(request.tag.file, music(request))}
    manifest.add(line | {"score": 1.0 / (1 + request.seed)})


def render(folder):
    """What a process of `music-ar render` does with the folder; returns how many pieces it made."""
    manifest, made, plan = Manifest(folder), 0, requests()
    with Leases(folder) as leases:
        for request in plan:
            if not leases.acquire(request.tag.file):
                continue
            manifest.read()
            if not manifest.is_complete(request):
                finish(manifest, request)
                made += 1
            leases.release(request.tag.file)
        manifest.read()
        manifest.rewrite([request.tag.file for request in plan], {})
    return made


def check_complete(folder):
    manifest = Manifest(folder)
    assert all(manifest.is_complete(request) for request in requests())
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().split("\n")[:-1]]
    assert [line["file"] for line in lines] == [request.tag.file for request in requests()]
    visible = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    assert sorted(visible) == sorted(["manifest.jsonl", *(request.tag.file for request in requests())])


def render_in_many_processes(folder, rounds=30):
    """Four processes add and rewrite, again and again; a healthy one used to end in every fifth round."""
    for number in range(rounds):
        children = [_fork(folder / str(number)) for _ in range(4)]
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0, 0]
        check_complete(folder / str(number))


def render_and_be_killed(folder, kills=40):
    """Whenever a process is killed, all files that are there are whole, and another run completes the folder."""
    moments = random.Random(0)
    for _ in range(kills):
        child = _fork(folder)
        time.sleep(moments.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for request in requests():
            path = folder / request.tag.file
            assert not path.exists() or path.read_bytes() == music(request)
        Manifest(folder)
    render(folder)
    check_complete(folder)


def _fork(folder):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            render(folder)
            status = 0
        finally:
            os._exit(status)
    return child
