"""Items on the workers of a cluster whose nodes and workers are lost, for `test_cluster`.

It runs in a process of its own: the checks of annotations in tests wrap functions, which then cannot be sent to a node.
"""

import os
import sys
import threading
import time

import pytest
from ray import cloudpickle
from ray_nodes import ROOT, Nodes

from music_ar.cluster import Cluster, ClusterError, Workers


class Fragile:
    """What a worker holds."""

    def slow(self, number):
        time.sleep(0.05)
        return number * number

    def deadly(self, number):
        if number == 13:
            os._exit(1)  # as the system ends a process that has too much memory
        return self.slow(number)

    def failing(self, number):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory while trying to allocate 99 bytes" if number else "a bug")


def lose_a_node(nodes: Nodes, workers: Workers):
    threading.Timer(1.0, nodes.kill, [0]).start()
    found = list(workers.map(range(90), method="slow"))
    assert sorted(result.item for result in found) == list(range(90))
    assert all(result.value == result.item**2 for result in found)


def lose_a_worker_to_one_item(workers: Workers):
    results = {result.item: result for result in workers.map(range(8, 20), method="deadly", at_once=1)}
    assert results.pop(13).error == "its worker was lost 3 times, most likely for want of memory"
    squares = {number: number * number for number in range(8, 20) if number != 13}
    assert {item: result.value for item, result in results.items()} == squares


def see_what_calls_raise(workers: Workers):
    with pytest.raises(RuntimeError, match="a bug"):
        workers.ask("failing", 0)
    with pytest.raises(ClusterError, match="use a smaller --batch-size"):
        workers.ask("failing", 1)


def wait_for_cores_in_vain(cluster: Cluster):
    with cluster.workers(Fragile, on_each="core") as others, pytest.raises(ClusterError, match="or others use"):
        others.ask("slow", 1)


def lose_all_nodes(nodes: Nodes, workers: Workers):
    nodes.kill(1)
    nodes.kill(2)
    nodes.add()  # takes the place of a lost one
    assert workers.ask("slow", 5) == 25
    nodes.kill(3)
    with pytest.raises(ClusterError, match="are lost"):
        list(workers.map(range(400), method="slow"))  # a worker outlives its node for a moment


def main():
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it
    with Nodes(ROOT, ROOT, ROOT) as nodes, Cluster(nodes.address, patience_s=15.0) as cluster:
        with cluster.workers(Fragile, on_each="device") as workers:
            assert len(workers) == 3
            lose_a_node(nodes, workers)
            lose_a_worker_to_one_item(workers)
            see_what_calls_raise(workers)
            wait_for_cores_in_vain(cluster)
            lose_all_nodes(nodes, workers)
        with pytest.raises(ClusterError, match="no node with free cores"):
            cluster.workers(Fragile, on_each="core")


if __name__ == "__main__":
    main()
