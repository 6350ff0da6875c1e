"""Load the page with many clients at once: `python benchmarks/web_load.py [CLIENTS] [ROUNDS]`.

Serves the shipped model. In each round, CLIENTS new clients ask for a piece at the same time, each with its own seed.
Counts the clients that get the same piece as when nobody else asks. Measures how long they wait, and the memory of the
server before the first round and after each.
"""

import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gradio_client import Client
from served import served

from app.console import print_table

SECONDS = 5
LATENTS = 256


def main() -> None:
    number, rounds = (int(sys.argv[place]) if len(sys.argv) > place else given for place, given in ((1, 20), (2, 3)))
    rows, results = [], []
    with served() as (address, process):
        alone = Client(address, verbose=False)
        expected = [piece_of(alone, seed) for seed in range(number)]
        held_mb = [resident_mb(process)]
        for _ in range(rounds):
            own, waits_s = ask_at_once(address, expected)
            time.sleep(2)
            held_mb.append(resident_mb(process))
            results.append({"clients": number, "own_piece": own, "waits_s": waits_s, "held_mb": held_mb[-1]})
            rows.append((f"{number}", f"{own}", f"{statistics.median(waits_s):.1f}", f"{max(waits_s):.1f}",
                         f"{held_mb[-1]:.0f}"))  # fmt: skip
    print(f"the server used {held_mb[0]:.0f} MB before")
    print_table(("clients", "got their own piece", "median wait, s", "last, s", "MB used after"), rows)
    print(json.dumps({"held_before_mb": held_mb[0], "rounds": results}))


def ask_at_once(address: str, expected: list[bytes]) -> tuple[int, list[float]]:
    """One client per piece asks for it at once: how many got theirs, and how long each waited."""
    clients = [Client(address, verbose=False) for _ in expected]
    began_s = time.monotonic()

    def ask(seed: int) -> tuple[bool, float]:
        return piece_of(clients[seed], seed) == expected[seed], time.monotonic() - began_s

    with ThreadPoolExecutor(len(clients)) as pool:
        served = list(pool.map(ask, range(len(clients))))
    for client in clients:
        client.close()
    return sum(own for own, _ in served), [round(wait_s, 2) for _, wait_s in served]


def piece_of(client: Client, seed: int) -> bytes:
    """The MIDI file that a seed gives."""
    _, files = client.predict(seconds=SECONDS, latents=LATENTS, seed=seed, api_name="/generate")
    return Path(files[0]).read_bytes()


def resident_mb(process: int) -> float:
    """Resident memory of a process, in megabytes."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * 4096 / 1e6


if __name__ == "__main__":
    main()
