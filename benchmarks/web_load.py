"""Many clients of a page that is served already: `python benchmarks/web_load.py ADDRESS [CLIENTS]`.

Each asks for its own seed at the same time; all must be served, each with its own piece.
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gradio_client import Client

from app.console import print_table


def main() -> None:
    address, number = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 20
    clients = [Client(address, verbose=False) for _ in range(number)]
    began_s = time.monotonic()

    def ask(seed: int) -> tuple[bool, float]:
        progress, files = clients[seed].predict(seconds=5, seed=seed, api_name="/generate")
        return progress["seeds"] == [seed] and Path(files[0]).stem.endswith(f"-{seed}"), time.monotonic() - began_s

    with ThreadPoolExecutor(number) as pool:
        served = list(pool.map(ask, range(number)))
    waits_s = sorted(wait_s for _, wait_s in served)
    figures = {"clients": number, "own_piece": sum(own for own, _ in served), "last_s": round(waits_s[-1], 2)}
    print_table(("clients", "served their own piece", "first after, s", "last after, s"),
                [(str(number), str(figures["own_piece"]), f"{waits_s[0]:.1f}", f"{waits_s[-1]:.1f}")])  # fmt: skip
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
