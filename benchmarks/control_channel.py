"""What one clock costs: how long process 0 takes to tell the others what to do, and how soon they know.

The others are bare connections of a second process on this host, which answer nothing; one of them is a real channel.
Usage: python benchmarks/control_channel.py [--processes 2 32 256] [--words 50]
"""

import argparse
import json
import multiprocessing
import socket
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from music_ar.training.control import Channel, Place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 32, 256])
    parser.add_argument("--words", type=int, default=50)
    arguments = parser.parse_args()
    print("processes  lead (µs)  process 0's thread (µs a word)  until known (µs)")
    rows = [measure(processes, arguments.words) for processes in arguments.processes]
    print(json.dumps({"benchmark": "control_channel", "rows": rows}))


def measure(processes: int, words: int) -> dict[str, float]:
    """Medians over `words` words, one every 60 ms, a training step; CPU time is that of process 0, without waiting."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    times = context.Queue()
    others = context.Process(target=listen, args=(port, processes, words, times))
    others.start()
    leader = Channel(Place(host="localhost", port=port, processes=processes, process=0), {}, print)
    leader.join(120)
    calls, cpu_s = [], time.process_time()
    for _ in range(words):
        start_s = time.monotonic()
        leader.lead([start_s, False, False])
        calls.append(time.monotonic() - start_s)
        time.sleep(0.06)
    cpu_s = time.process_time() - cpu_s
    delays = times.get()
    others.kill()
    others.join()
    row = {
        "processes": processes,
        "lead_us": round(1e6 * statistics.median(calls)),
        "cpu_us": round(1e6 * cpu_s / words),
        "known_us": round(1e6 * statistics.median(delays)),
    }
    print(f"{processes:9}  {row['lead_us']:9}  {row['cpu_us']:30}  {row['known_us']:16}")
    return row


def listen(port: int, processes: int, words: int, times: multiprocessing.Queue) -> None:
    """Be all other processes."""
    with ThreadPoolExecutor(32) as pool:
        connections = list(pool.map(lambda number: connect(port, number), range(2, processes)))
    for connection in connections:
        threading.Thread(target=drain, args=(connection,), daemon=True).start()
    last = Channel(Place(host="localhost", port=port, processes=processes, process=1), {}, print)
    last.join(120)
    times.put([-last.follow()[0] + time.monotonic() for _ in range(words)])  # told first, then the clock
    time.sleep(60)


def connect(port: int, process: int) -> socket.socket:
    """Join as a process that never says anything again."""
    while True:
        try:
            connection = socket.create_connection(("localhost", port))
            break
        except OSError:
            time.sleep(0.1)
    hello = {"process": process, "host": "bench", "description": {}}
    connection.sendall(json.dumps({"hello": hello}).encode() + b"\n")
    return connection


def drain(connection: socket.socket) -> None:
    """Read what comes, so that nothing piles up."""
    while connection.recv(2**16):
        pass


if __name__ == "__main__":
    main()
