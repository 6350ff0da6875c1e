"""Attack the page while others use it: `python benchmarks/web_attack.py [CLIENTS] [CHECKPOINT]`.

Serves a model, by default the shipped one. One client asks for an hour of eight variations. An attacker sends what
would stop Gradio's queue, joins under new names without ever listening, and asks for results that are not there.
Meanwhile CLIENTS clients ask for a piece each. Counts those that get their piece and measures how long they wait;
`/health` must say ok at the end.
"""

import itertools
import json
import statistics
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gradio_client import Client
from served import served

from app.console import print_table

SECONDS = 5
LATENTS = 256


class Attacker(threading.Thread):
    """Sends requests as fast as they are answered, until `ended`.

    Attributes:
        answers: number of answers by status.
    """

    def __init__(self, address: str, ended: threading.Event):
        super().__init__(daemon=True)
        self._address, self._ended = address.rstrip("/"), ended
        self.answers: dict[int, int] = {}

    def run(self) -> None:
        """Attack; each piece that it joins for would be an hour of eight variations."""
        options = [1.0, 0.97, None, 0.0, None, 0.25, 0, 0.0, 0, 127]
        values = {"data": [None, 3600.0, 0, 8, *options], "fn_index": self._number_of_generate()}
        for number in itertools.count():
            if self._ended.is_set():
                return
            for session in ("", None, 5, "x" * 1000, f"{self.name}-{number}"):
                self._send("/gradio_api/queue/join", values | {"session_hash": session})
            self._send(f"/gradio_api/queue/data?session_hash=nobody{number}")
            self._send("/gradio_api/cancel", {"session_hash": "", "fn_index": 0, "event_id": ""})

    def _number_of_generate(self) -> int:
        with urllib.request.urlopen(f"{self._address}/config") as answer:
            handlers = json.load(answer)["dependencies"]
        return next(each["id"] for each in handlers if each["api_name"] == "generate")

    def _send(self, path: str, body: dict[str, Any] | None = None) -> None:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._address + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                status = answer.status
        except urllib.error.HTTPError as error:
            status = error.code
        except OSError:
            status = 0
        self.answers[status] = self.answers.get(status, 0) + 1


def main() -> None:
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    checkpoint = sys.argv[2] if len(sys.argv) > 2 else None
    with served(measure=False, checkpoint=checkpoint) as (address, _):
        info = Client(address, verbose=False).predict(api_name="/info")
        latents = min(LATENTS, info["most_latents"])
        waits = {"alone": ask_at_once(address, 1, latents)}
        long_job = Client(address, verbose=False).submit(
            seconds=3600, variations=8, latents=latents, api_name="/generate"
        )
        waits["beside an hour of eight variations"] = ask_at_once(address, number, latents)
        ended = threading.Event()
        attackers = [Attacker(address, ended) for _ in range(4)]
        for attacker in attackers:
            attacker.start()
        waits["and under attack"] = ask_at_once(address, number, latents)
        ended.set()
        with urllib.request.urlopen(f"{address.rstrip('/')}/health") as answer:
            health = json.load(answer)
        still_running = not long_job.done()
    rows = [
        (name, f"{len(each)}", f"{statistics.median(each):.1f}", f"{max(each):.1f}") for name, each in waits.items()
    ]
    print_table((f"pieces of {SECONDS} s", "served", "median wait, s", "last, s"), rows)
    answers = [attacker.answers for attacker in attackers]
    print(json.dumps({"waits_s": waits, "health": health, "long_job_runs": still_running, "answers": answers}))


def ask_at_once(address: str, number: int, latents: int) -> list[float]:
    """So many new clients ask for a piece at once: how long each of those waited that got one."""
    clients = [Client(address, verbose=False) for _ in range(number)]
    began_s = time.monotonic()

    def ask(client: Client) -> float | None:
        try:
            _, files = client.predict(seconds=SECONDS, latents=latents, api_name="/generate")
        except Exception as error:
            print(error, file=sys.stderr)
            return None
        return round(time.monotonic() - began_s, 2) if files else None

    with ThreadPoolExecutor(number) as pool:
        waits = list(pool.map(ask, clients))
    for client in clients:
        client.close()
    return [wait for wait in waits if wait is not None]


if __name__ == "__main__":
    main()
