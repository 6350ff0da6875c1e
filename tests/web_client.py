"""What tests of a running page share: a server in a process of its own, and requests to it without a client library."""

import asyncio
import contextlib
import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

ROOT = Path(__file__).parents[1]


@dataclass
class Page:
    """A running page: its address, process, first line and log file."""

    address: str
    process: subprocess.Popen
    line: str
    log: Path

    def request(self, path, body=None, *, headers=None, raw=None) -> tuple[int, Any]:
        """Send a request, a POST if there is a body; the status and the answer, decoded if it is JSON."""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        kind = {} if data is None else {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, data, kind | (headers or {}))
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, _decoded(answer)
        except urllib.error.HTTPError as error:
            return error.code, _decoded(error)

    def config(self, name):
        """The number of an endpoint, as clients find it."""
        handlers = self.request("/config")[1]["dependencies"]
        return next(each["id"] for each in handlers if each["api_name"] == name)

    def defaults(self):
        """The default values of `/generate`."""
        parameters = self.request("/gradio_api/info")[1]["named_endpoints"]["/generate"]["parameters"]
        return {each["parameter_name"]: each["parameter_default"] for each in parameters}


def laid_out(lay_out):
    """A Gradio app with the components that a function lays out.

    In a thread with a loop of its own: otherwise Gradio makes a loop and never closes it.
    """

    async def build():
        with gr.Blocks() as app:
            lay_out()
        return app

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, build()).result()


def _decoded(answer):
    content = answer.read()
    return json.loads(content) if "json" in answer.headers.get("Content-Type", "") else content


@contextlib.contextmanager
def running_page(checkpoint, folder, *options, environment=None, script=None):
    """Run `music-ar web` with a checkpoint, or a script in its place."""
    start = ["-m", "app.cli"] if script is None else ["-c", script]
    command = [sys.executable, *start, "web", "--checkpoint", str(checkpoint), "--no-measure", *options]
    log = folder / "log.txt"
    with log.open("w") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.search(r"http://[^\s,]+", line)
        assert found is not None, log.read_text()
        yield Page(found[0].rstrip("/"), process, line, log)
    finally:
        process.terminate()
        process.wait(timeout=30)
        process.stdout.close()
