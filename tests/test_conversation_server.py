"""Conversations on a real server: whom it lets in, and what it survives."""

import json
import os
import re
import socket
import urllib.request
from urllib.parse import urlsplit

import pytest
from web_client import running_page
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect as connect_to

PHRASE = [[0.5, "on", 60, 80], [0.9, "off", 60], [1.0, "on", 64, 70], [1.5, "off", 64]]


def _refusal(address, host=None, **headers):
    """Why a connection is refused: to an address, perhaps by another name of the host."""
    named = address if host is None else re.sub(r"//[^/]+", f"//{host}", address)
    url = urlsplit(address)
    with pytest.raises(InvalidStatus) as refused:
        connect_to(named, sock=socket.create_connection((url.hostname, url.port)), additional_headers=headers)
    answer = refused.value.response
    return answer.status_code, json.loads(answer.body)["detail"]


@pytest.mark.slow
def test_a_real_server_lets_in_whom_it_may(tiny_checkpoint, tmp_path):
    environment = os.environ | {"MUSIC_AR_AUTH": "anna:secret"}
    with running_page(tiny_checkpoint, tmp_path, "--root-path", "/music", environment=environment) as page:
        address = re.sub(r"http://([^/]+).*", r"ws://\1", page.address)
        host = re.sub(r"\D+([\d.]+:\d+).*", r"\1", page.address)
        assert _refusal(f"{address}/conversation") == (401, "log in first")
        assert _refusal(f"{address}/conversation", Origin="https://evil.example")[0] == 403
        assert _refusal(f"{address}/gradio_api/queue/data")[0] == 404
        assert _refusal(f"{address}/conversation", host="evil.example")[0] == 421
        assert page.request("/conversation", {"timeline": {"played": PHRASE}})[0] == 401
        login = urllib.request.Request(f"http://{host}/login", b"username=anna&password=secret")
        with urllib.request.urlopen(login, timeout=30) as answer:
            cookies = "; ".join(each.partition(";")[0] for each in answer.headers.get_all("Set-Cookie"))
        for path in ("/conversation", "/music/conversation"):
            headers = {"Cookie": cookies, "Origin": f"http://{host}"}
            with connect_to(address + path, additional_headers=headers) as connection:
                connection.send(json.dumps({"type": "open", "session": None, "latents": 16}))
                ready = json.loads(connection.recv(timeout=30))
                connection.send(json.dumps({"type": "play", "events": PHRASE}))
                connection.send(json.dumps({"type": "answer", "id": 1, "from": 2, "seconds": 1}))
                while json.loads(connection.recv(timeout=30))["type"] != "end":
                    pass
            status, content = page.request(f"/conversation/{ready['session']}.mid", headers={"Cookie": cookies})
            assert (status, content[:4]) == (200, b"MThd")
        with connect_to(f"{address}/conversation", additional_headers={"Cookie": cookies}) as connection:
            connection.send("x" * (2 * 2**20 + 1))
            with pytest.raises(ConnectionClosed) as closed:
                connection.recv(timeout=30)
            assert closed.value.rcvd is None or closed.value.rcvd.code == 1009
        with connect_to(f"{address}/conversation", additional_headers={"Cookie": cookies}) as connection:
            connection.send(b"\x00\x01")
            with pytest.raises(ConnectionClosed):
                connection.recv(timeout=30)
        assert page.request("/health")[1]["status"] == "ok"
        assert "Traceback" not in page.log.read_text()
        assert ready["session"] not in page.log.read_text()
