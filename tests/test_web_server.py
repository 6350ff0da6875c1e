"""The server of the page: attacks that do nothing, wrong values that are explained, addresses, passwords, turns."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from web_client import running_page

from app.web.addresses import AddressError, Addresses, free_port
from app.web.joins import Joins
from app.web.limits import MAX_JSON_BYTES, MAX_UPLOAD_BYTES, MAX_UPLOADED_BYTES, Refusal, UploadQuota
from app.web.passwords import CLIENT_ADDRESS, PasswordError, Passwords, read_passwords
from app.web.turns import Turns
from music_ar import read_midi

pytestmark = pytest.mark.filterwarnings("ignore")  # from Gradio's client
JOIN = "/gradio_api/queue/join"


@pytest.fixture(scope="module")
def page(tiny_checkpoint, tmp_path_factory):
    with running_page(tiny_checkpoint, tmp_path_factory.mktemp("page")) as page:
        yield page


@pytest.fixture(scope="module")
def join(page):
    """A request to join the queue."""
    return {"data": list(page.defaults().values()), "fn_index": page.config("generate"), "session_hash": "someone"}


@pytest.fixture(scope="module")
def client(page):
    from gradio_client import Client

    client = Client(page.address, verbose=False)
    yield client
    client.close()


def test_a_join_needs_a_name_and_cannot_stop_the_queue(page, join, client):
    """In Gradio 6.31, two joins with an empty session while a job runs end the queue for good."""
    job = client.submit(seconds=300, seed=1, api_name="/generate")
    for session in 2 * ["", None, " ", 5, ["a"], {}, "a" * 65, "a/b", "é", True]:
        status, answer = page.request(JOIN, join | {"session_hash": session})
        assert status == 400
        assert "session_hash must be a text of 1 to 64" in answer["detail"]
    status, _ = page.request("/gradio_api/call/generate", {"data": join["data"], "session_hash": ""})
    assert status == 400
    assert job.result(timeout=60)[0]["finished"]
    assert client.predict(seconds=1, api_name="/generate")[0]["finished"]
    assert page.request("/health")[1]["status"] == "ok"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"fn_index": "1"}, 404),
        ({"fn_index": 10**6}, 404),
        ({"fn_index": -1}, 404),
        ({"fn_index": True}, 404),
        ({"fn_index": None}, 404),
        ({"data": None}, 400),
        ({"data": {}}, 400),
        ({"data": [1]}, 400),
        ({"batched": True}, 400),
    ],
)
def test_a_malformed_join_is_refused_in_words(page, join, change, expected):
    status, answer = page.request(JOIN, join | change)
    assert status == expected
    assert answer["detail"][-1] != "."
    assert " " in answer["detail"]


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/gradio_api/queue/data?session_hash=nobody", None, 404),
        ("/gradio_api/queue/data?session_hash=", None, 400),
        ("/gradio_api/queue/data", None, 400),
        ("/gradio_api/call/generate/nobody", None, 404),
        ("/gradio_api/heartbeat/" + "a" * 100, None, 400),
        ("/gradio_api/call/nothing", {"data": []}, 404),
        ("/gradio_api/call/v2/generate", {"sconds": 3}, 400),
        ("/gradio_api/run/generate", {"data": [None] * 25}, 404),  # it would pass by the queue
        ("/gradio_api/vibe-code", {}, 404),
        ("/gradio_api/component_server", {}, 404),
        ("/gradio_api/proxy=http://example.org", None, 404),
        ("/monitoring", None, 404),
    ],
)
def test_what_the_page_does_not_need_is_refused(page, path, body, expected):
    assert page.request(path, body)[0] == expected


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"[1]", b'"text"', b'{"a":' + b"9" * 5000 + b"}"]
)
def test_a_body_that_is_no_object_is_refused(page, raw):
    assert page.request(JOIN, raw=raw)[0] == 400


def test_large_bodies_are_refused(page):
    assert page.request(JOIN, raw=b"{" + b" " * MAX_JSON_BYTES)[0] == 413
    assert page.request("/gradio_api/upload", raw=b" " * (MAX_UPLOAD_BYTES + 1))[0] == 413


def test_jobs_that_nobody_listens_to_do_not_hold_up_others(page, join, client):
    """A client joins under many names and never asks for results; those who listen are served."""
    ended = threading.Event()
    hour = join | {"data": [None, 3600, 0, 8, *join["data"][4:]]}

    def attack(name):
        for number in range(10**6):
            if ended.is_set():
                return
            with contextlib.suppress(OSError):
                page.request(JOIN, hour | {"session_hash": f"{name}{number}"})

    attackers = [threading.Thread(target=attack, args=[name]) for name in ("a", "b")]
    for attacker in attackers:
        attacker.start()
    time.sleep(1)
    results = [client.submit(seconds=2, seed=seed, api_name="/generate") for seed in range(4)]
    assert [job.result(timeout=60)[0]["seeds"] for job in results] == [[0], [1], [2], [3]]
    assert all(job.result()[0]["finished"] for job in results)
    ended.set()
    for attacker in attackers:
        attacker.join()
    assert page.request("/health")[0] == 200


@pytest.mark.parametrize(
    ("jobs", "expected"),
    [
        ({}, None),
        ({"alive": False}, 503),
        ({"of_session": 7}, None),
        ({"of_session": 8}, 429),
        ({"waiting_of": 19}, None),
        ({"waiting_of": 20}, 503),
        ({"unheard_of": 8, "is_heard": True}, None),
        ({"unheard_of": 8, "is_heard": False}, 429),
    ],
)
def test_a_client_has_a_limited_number_of_jobs(jobs, expected, monkeypatch):
    monkeypatch.setattr("app.web.joins._PATIENCE_S", 0.0)
    handler = SimpleNamespace(api_name="generate", api_visibility="public", inputs=["prompt"])
    idle = {"of_session": 0, "waiting_of": 0, "unheard_of": 0, "is_heard": False}
    counts = {name: (lambda *_, value=value: value) for name, value in (idle | jobs).items() if name != "alive"}
    queue: Any = SimpleNamespace(alive=jobs.get("alive", True), **counts)
    app: Any = SimpleNamespace(fns={3: handler})

    async def join():
        body = json.dumps({"data": [None], "fn_index": 3, "session_hash": "someone"}).encode()
        async with Joins(app, queue, 20).call("queue/join", body, "10.0.0.1") as passed_on:
            return json.loads(passed_on)["data"]

    if expected is None:
        assert asyncio.run(join()) == [None]
    else:
        with pytest.raises(Refusal) as caught:
            asyncio.run(join())
        assert caught.value.status == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seconds": "60"}, "the length must be a number of seconds from 1 to 3600, got “60”"),
        ({"seconds": None}, "the length must be a number of seconds from 1 to 3600, got nothing"),
        ({"seconds": True}, "the length must be a number of seconds from 1 to 3600, got true"),
        ({"seconds": 10**30}, "the length must be a number of seconds from 1 to 3600, got 1" + 30 * "0"),
        ({"latents": 16.5}, "the latent budget must be a whole number from 2 to 32, or 0 or “auto” for auto, got 16.5"),
        ({"latents": 99999}, "the latent budget must be .*, got 99999"),
        ({"variations": 2.7}, "the number of variations must be a whole number from 1 to 8, got 2.7"),
        ({"seed": 1.5}, "the seed must be a whole number from 0 to 2147483639, or empty for a random one, got 1.5"),
        ({"seed": 2147483640}, "the seed must be .*, got 2147483640"),
        ({"temperature": 1e9}, "the temperature must be a number from 0 to 2, got 1000000000"),
        ({"top_k": [1]}, "the top-k must be a whole number from 0 to 128, got a list"),
        ({"start_s": 9, "end_s": 3}, "the prompt must end after it starts, got 9 s to 3 s"),
        ({"prompt": "mine.mid"}, r"the prompt must be an uploaded MIDI file \(in Python: handle_file.*got “mine.mid”"),
        ({"prompt": "https://example.org/a.mid"}, "the prompt must be an uploaded MIDI file .*, got an address"),
        ({"fill": 1}, r"the choice to make a part of the prompt anew \(fill\) must be true or false, got 1"),
        ({"fill": True}, "there is no piece to fill a part of: choose one first"),
        ({"prompt": 5}, "the prompt must be an uploaded MIDI file .*, got 5"),
    ],
)
def test_wrong_values_are_explained(client, values, message):
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError, match=message):
        client.predict(**({"seconds": 2} | values), api_name="/generate")


def test_values_that_json_does_not_know_are_explained(page, join):
    for value, shown in (("NaN", "no number (NaN)"), ("Infinity", "infinity"), ("1e999", "infinity")):
        text = json.dumps({"data": [None, "VALUE", *join["data"][2:]]}).replace('"VALUE"', value)
        event = page.request("/gradio_api/call/generate", raw=text.encode())[1]["event_id"]
        answer = page.request(f"/gradio_api/call/generate/{event}")[1].decode()
        assert f"from 1 to 3600, got {shown}" in answer


def test_only_a_variation_that_exists_is_continued(client):
    from gradio_client.exceptions import AppError

    _, before = client.predict(seconds=2, variations=2, seed=5, api_name="/generate")
    for variation in (7, -1, 1.6, None, "1", True, 10**30):
        with pytest.raises(AppError, match="the variation must be"):
            client.predict(seconds=2, variation=variation, api_name="/continue")
    progress, files = client.predict(seconds=2, variation=1, api_name="/continue")
    piece, first = read_midi(files[0]), read_midi(before[1])
    assert len(piece) == progress["notes"][0]
    assert piece.onset_s[: len(first) // 2].tolist() == first.onset_s[: len(first) // 2].tolist()


def test_auto_is_a_latent_budget(client):
    assert client.predict(seconds=2, latents="auto", api_name="/generate")[0]["latents"] == 32


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, 200),
        ({"Host": "evil.example"}, 421),
        ({"Host": "localhost:1234"}, 200),
        ({"Host": "[::1]:7860"}, 200),
        ({"Host": "10.0.0.1"}, 421),
        ({"X-Forwarded-Host": "evil.example"}, 421),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
    ],
)
def test_only_own_names_and_pages_are_answered(page, headers, expected):
    assert page.request("/config", headers=headers)[0] == expected


def test_headers_of_a_proxy_that_was_not_announced_are_ignored(page):
    for headers in ({"X-Gradio-Server": "http://evil.example"}, {"X-Forwarded-Proto": "https"}):
        assert page.request("/config", headers=headers)[1]["root"] == page.address


def test_answers_have_security_headers(page):
    with urllib.request.urlopen(page.address) as answer:
        headers = answer.headers
    assert "frame-ancestors 'self'" in headers["Content-Security-Policy"]
    assert "object-src 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "SAMEORIGIN"
    assert headers["Referrer-Policy"] == "same-origin"


def test_the_log_has_a_line_for_each_request_and_job_and_no_secrets(page, client):
    from gradio_client.exceptions import AppError

    client.predict(seconds=3, api_name="/generate")
    with pytest.raises(AppError):
        client.predict(seconds=-3, api_name="/generate")
    page.request("/gradio_api/queue/data?session_hash=private-name")
    time.sleep(0.5)
    log = page.log.read_text()
    assert "POST /gradio_api/queue/join 200 " in log
    assert "job of 3 s, variations: 1: done in " in log
    assert client.session_hash not in log
    assert "private-name" not in log
    assert "Traceback" not in log


# ---------------------------------------------------------------- other servers


def test_one_with_passwords_stops_quietly_and_tells_its_clients(tiny_checkpoint, tmp_path):
    from gradio_client import Client

    environment = os.environ | {"MUSIC_AR_AUTH": "anna:one two:three"}
    with running_page(tiny_checkpoint, tmp_path, environment=environment) as page:
        assert page.request("/config")[0] == 401
        assert page.request("/health")[0] == 200
        client = Client(page.address, auth=("anna", "one two:three"), verbose=False)
        job = client.submit(seconds=3600, api_name="/generate")
        while not job.outputs():
            time.sleep(0.05)
        page.process.send_signal(signal.SIGTERM)
        with pytest.raises(Exception, match="the server is being stopped"):
            job.result(timeout=20)
        assert page.process.wait(timeout=30) == 0
    log = page.log.read_text()
    assert log.endswith("stopped\n")
    assert "Traceback" not in log
    assert "three" not in log


DYING = """
import sys, threading, urllib.error, urllib.request
from app import cli
from app.web import server

class Dying(server.Server):
    def __init__(self, app, *arguments):
        super().__init__(app, *arguments)
        threading.Timer(1, self.die).start()
    def die(self):
        self._app._queue.stopped = True
        try:
            urllib.request.urlopen(self.address + "health")
        except urllib.error.HTTPError as error:
            print(error.code, error.read().decode(), file=sys.stderr, flush=True)

server.Server = Dying
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_server_whose_queue_ends_leaves_with_an_error(tiny_checkpoint, tmp_path):
    with running_page(tiny_checkpoint, tmp_path, script=DYING) as page:
        assert page.process.wait(timeout=30) == 1
    log = page.log.read_text()
    assert '503 {"status":"failed"' in log
    assert "the queue of requests has ended; start the server again" in log


@pytest.mark.slow
def test_one_behind_a_proxy_answers_to_its_name(tiny_checkpoint, tmp_path):
    options = [
        "--host",
        "0.0.0.0",
        "--root-path",
        "https://music.example/piano",
        "--allow-origin",
        "https://other.example",
    ]
    with running_page(tiny_checkpoint, tmp_path, *options) as page:
        port = page.address.rpartition(":")[2]
        assert "and in your network at http://" in page.line or f"http://localhost:{port}" in page.line
        assert "everyone who can reach this server may use it" in page.log.read_text()
        proxied = {"Host": f"127.0.0.1:{port}", "X-Forwarded-Host": "music.example", "Origin": "https://music.example"}
        assert page.request("/config", headers=proxied)[1]["root"] == "https://music.example/piano"
        assert page.request("/piano/config", headers={"Host": "music.example"})[0] == 404  # a proxy strips its path
        assert page.request("/config", headers={"Host": "192.168.1.9:80"})[0] == 200
        assert page.request("/config", headers={"Host": "evil.example"})[0] == 421
        request = urllib.request.Request(f"{page.address}/config", headers={"Origin": "https://other.example"})
        with urllib.request.urlopen(request) as answer:
            assert answer.headers["Access-Control-Allow-Origin"] == "https://other.example"
            assert "https://other.example" in answer.headers["Content-Security-Policy"]


@pytest.mark.slow
def test_assistants_generate_and_continue(tiny_checkpoint, tmp_path):
    mcp = pytest.importorskip("mcp", reason="pip install '.[mcp]' gives it")
    from mcp.client.streamable_http import streamablehttp_client  # pyright: ignore[reportMissingImports]

    async def talk(address):
        server = f"{address}/gradio_api/mcp/"
        async with streamablehttp_client(server) as (read, write, _), mcp.ClientSession(read, write) as session:
            await session.initialize()
            tools = {tool.name: tool for tool in (await session.list_tools()).tools}
            assert set(tools) == {"generate", "info", "similar"}
            assert "piano music" in tools["generate"].description
            assert all("description" in each for each in tools["generate"].inputSchema["properties"].values())
            calls = [session.call_tool("generate", {"seconds": 2, "seed": seed}) for seed in range(3)]
            answers = [answer.content[0].text for answer in await asyncio.gather(*calls)]
            assert all(f"'seeds': [{seed}]" in answer for seed, answer in enumerate(answers))
            file = re.search(r"http://[^']+\.mid", answers[0])
            assert file is not None
            continued = await session.call_tool("generate", {"seconds": 2, "prompt": file[0]})
            assert not continued.isError
            wrong = await session.call_tool("generate", {"seconds": -2})
            assert "got -2" in wrong.content[0].text

    # In this thread, Playwright may be running a loop.
    with running_page(tiny_checkpoint, tmp_path, "--mcp") as page, ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, talk(page.address)).result()


# ---------------------------------------------------------------- parts


def test_addresses():
    own = Addresses("127.0.0.1", "https://music.example/piano", ["https://other.example:8443"])
    assert own.answers_to("localhost:7860")
    assert own.answers_to("MUSIC.example")
    assert own.answers_to("other.example")
    assert not own.answers_to("music.example.evil.example")
    assert not own.answers_to("")
    assert not own.answers_to("[")
    assert own.may_use("https://music.example", "127.0.0.1:7860")
    assert own.may_use("https://music.example:443", "127.0.0.1:7860")
    assert own.may_use("https://other.example:8443", "x")
    assert own.may_use("http://localhost:7860", "localhost:7860")
    assert not own.may_use("https://other.example", "x")
    assert not own.may_use("http://localhost:7861", "localhost:7860")
    assert not own.may_use("https://music.example@evil.example", "localhost:7860")
    for wrong in ("other.example", "ftp://a.example", "https://", "https://a.example/path", "*"):
        with pytest.raises(AddressError, match=r"such as https://music\.example"):
            Addresses("127.0.0.1", "", [wrong])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "PORT"], "port PORT is taken"),
        (["--port", "0"], "--port must be from 1 to 65535"),
        (["--host", "192.0.2.1"], "not an address of this machine"),
        (["--auth", "secret"], "--auth must be user:password"),
        (["--auth", "a:b", "--auth-file", "visitors.txt"], "choose one of --auth and --auth-file"),
        (["--auth-file", "no such file"], "no such file: No such file"),
        (["--allow-origin", "example.org"], "expected an address such as"),
        (["--root-path", "music"], "expected a path such as /music or an address"),
    ],
)
def test_what_cannot_be_served_is_told_before_the_model_is_loaded(options, message, capsys):
    from app.cli import main

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        try:
            code = main(["web", *(option.replace("PORT", port) for option in options)])
        except SystemExit as exit_:  # from the parser of options
            code = exit_.code
    assert code == 2
    printed = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message.replace("PORT", port) in printed
    assert "loading" not in printed


def test_a_taken_port_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(AddressError, match=f"port {port} is taken"):
            free_port("127.0.0.1", port)
    assert free_port("127.0.0.1", port) == port
    with pytest.raises(AddressError, match="not an address of this machine"):
        free_port("192.0.2.1", port)


def test_passwords_come_from_one_place(tmp_path):
    file = tmp_path / "visitors.txt"
    file.write_text("anna:a:b\n\n bert : c \n")
    assert read_passwords(None, file, {}) == {"anna": "a:b", "bert": " c"}
    assert read_passwords("anna:x", None, {"MUSIC_AR_AUTH": "bert:y"}) == {"anna": "x"}
    assert read_passwords(None, None, {"MUSIC_AR_AUTH": "bert:y"}) == {"bert": "y"}
    assert read_passwords(None, None, {}) == {}
    with pytest.raises(PasswordError, match="choose one"):
        read_passwords("anna:x", file, {})
    for wrong in ("", "secret", ":x", "anna:"):
        with pytest.raises(PasswordError) as caught:
            read_passwords(None, None, {"MUSIC_AR_AUTH": wrong})
        assert not wrong or wrong not in str(caught.value)


def test_wrong_passwords_slow_down_only_who_gives_them():
    from fastapi import HTTPException

    async def attempts():
        passwords = Passwords({"anna": "right", "bert": "right"}, wait_s=60)
        CLIENT_ADDRESS.set("10.0.0.1")
        for _ in range(3):
            assert not await passwords.check("anna", "wrong")
        with pytest.raises(HTTPException) as caught:
            await passwords.check("anna", "right")
        assert caught.value.status_code == 429
        assert await passwords.check("bert", "right")
        CLIENT_ADDRESS.set("10.0.0.2")
        assert await passwords.check("anna", "right")
        assert not await passwords.check("nobody", "")

    asyncio.run(attempts())


def test_uploads_have_a_quota_an_hour(monkeypatch):
    quota = UploadQuota()
    quota.add("10.0.0.1", MAX_UPLOADED_BYTES)
    quota.check("10.0.0.2")
    with pytest.raises(Refusal, match="at most 50 MB of files are taken an hour; try again in 60 minutes"):
        quota.check("10.0.0.1")
    now_s = time.monotonic()
    monkeypatch.setattr("app.web.limits.time.monotonic", lambda: now_s + 3601)
    quota.check("10.0.0.1")
    for _ in range(1000):  # small files count too
        quota.add("10.0.0.3", 1)
    with pytest.raises(Refusal):
        quota.check("10.0.0.3")


def test_runs_take_turns_and_a_new_one_need_not_wait_for_an_old_one():
    turns, order, ready = Turns(), [], threading.Event()

    def run(name, chunks, chunk_s):
        turns.begin(name)
        for _ in range(chunks):
            with turns.turn(name):
                order.append(name)
                time.sleep(chunk_s)
                if len(order) == 3:
                    ready.set()
        turns.end(name)

    long = threading.Thread(target=run, args=("long", 40, 0.01))
    long.start()
    ready.wait(10)
    short = threading.Thread(target=run, args=("short", 5, 0.01))
    short.start()
    short.join()
    long.join()
    last = len(order) - 1 - order[::-1].index("short")
    assert order.count("short") == 5
    assert order[:last].count("long") < 25
