"""A Ray cluster on this machine: a head without cores, and nodes that come and are killed.

It runs in a process of its own, because Ray forks, and a process with JAX must not.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MEMORY = {"object_store_memory": 80 * 2**20}


class Nodes:
    """Starts a cluster. As a context manager, ends it.

    Args:
        paths: where the processes of each node import the project from.
    """

    def __init__(self, *paths):
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        self.address = self._answer()
        for path in paths:
            self.add(path)

    def add(self, path=ROOT):
        """Adds a node with one core."""
        self._ask("add", str(path))

    def kill(self, number):
        """Kills a node, counted in the order in which they came."""
        self._ask("kill", number)

    def _ask(self, *request):
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        self._answer()

    def _answer(self):
        assert self._process.stdout is not None
        while not (line := self._process.stdout.readline()).startswith("done "):
            assert line, "the cluster has ended"
        return line.split()[1]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.communicate()  # the end of its input ends it


def serve():
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **MEMORY})
    print("done", cluster.address, flush=True)
    nodes = []
    for line in sys.stdin:
        request, value = json.loads(line)
        if request == "add":
            options: dict[str, Any] = {"num_cpus": 1, "env_vars": {"PYTHONPATH": value}, **MEMORY}
            nodes.append(cluster.add_node(**options))
        else:
            cluster.remove_node(nodes[value], allow_graceful=False)
        print("done", request, flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    serve()
