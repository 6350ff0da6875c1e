"""Joining a Ray cluster: what is at an address, which nodes it has, and where workers go."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, Literal

from music_ar.cluster.workers import ClusterError, Workers
from music_ar.code import code_digest, look_for_code
from music_ar.ranges import shown

AUTO = "auto"
"""The address that stands for the cluster which this machine is part of."""
_CONNECT_S = 10.0
_HEALTH_S = 30.0
_ANSWER_S = 60.0


class Cluster:
    """A connection to a running Ray cluster, whose nodes have the same version of this project.

    Args:
        address: `HOST:PORT` of the cluster's head, `ray://HOST:PORT` of its server for clients, or `AUTO`.
        patience_s: how long to wait for a first worker, or for a new one when all are lost.

    Raises:
        ClusterError: Ray is not installed, there is no cluster at this address, or a node has other code.
    """

    def __init__(self, address: str, *, patience_s: float = 300.0):
        self._ray, self._patience_s = _import_ray(), patience_s
        _check_reachable(address)
        try:
            with _same_signals():
                self._ray.init(address=address, logging_level="ERROR", log_to_driver=False, runtime_env=_environment())
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise ClusterError(f"cannot join the Ray cluster at {address}: {_one_line(error)}") from error
        # Otherwise news of lost nodes would be printed to standard output, among our results; Ray has no option for it.
        self._ray._private.worker._worker_logs_enabled = False
        try:
            self._check_nodes()
        except BaseException:
            self._ray.shutdown()
            raise

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def workers(
        self,
        build: Callable[..., Any],
        *arguments: Any,
        on_each: Literal["device", "core"],
        at_most: int | None = None,
    ) -> "Workers":
        """Start workers.

        Args:
            build: called on each worker with the arguments; returns what the worker holds.
            arguments: sent to each node once.
            on_each: a worker on each device (the GPUs of the cluster; without any, its TPU hosts; without any, its
                nodes, each with all its cores), or on each core.
            at_most: number of workers that can have work.

        Raises:
            ClusterError: the cluster has no such device.
        """
        places = list(_places(self._nodes(), on_each))[:at_most]
        if not places:
            raise ClusterError("the Ray cluster has no node with free cores or devices: add one")
        stored = [self._ray.put(argument) for argument in arguments]
        return Workers(self._ray, build, stored, places, self._patience_s)

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _check_nodes(self) -> None:
        """Compare the code of each node with that of this process."""
        look, here = look_for_code(), code_digest()
        found = {}
        for node in self._nodes():
            place = _near(node) | {"num_cpus": 0}
            found[f"{node['NodeName']} ({node['NodeID'][:8]})"] = self._ray.remote(look).options(**place).remote()
        for name, answer in found.items():
            try:
                digest = self._ray.get(answer, timeout=_ANSWER_S)
            except self._ray.exceptions.GetTimeoutError as error:
                raise ClusterError(f"the Ray node {name} has not answered in {_ANSWER_S:.0f} s: remove it") from error
            except self._ray.exceptions.RayError:
                continue  # the node has gone in the meantime
            if digest is None:
                raise ClusterError(f"the Ray node {name} has no music-ar: install there what is installed here")
            if digest != here:
                raise ClusterError(f"the Ray node {name} has another version of music-ar: install the same on all")


def _import_ray() -> ModuleType:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ClusterError(f"--ray needs the extra `ray` (pip install '.[ray]'); {error}") from error
    return ray


@contextlib.contextmanager
def _same_signals() -> Iterator[None]:
    """Keep the handlers of signals: Ray would end this process on SIGTERM in its own way."""
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _environment() -> dict[str, Any]:
    """What the workers' environment has of ours: how to decode."""
    ours = {name: value for name, value in os.environ.items() if name.startswith("MUSIC_AR_")}
    return {"env_vars": ours} if ours else {}


def _check_reachable(address: str) -> None:
    """Find out whether there is a cluster: Ray itself would try for two minutes, deaf to Ctrl-C.

    Raises:
        ClusterError: there is none.
    """
    advice = "start one with `ray start --head`, or give --ray the HOST:PORT of its head"
    if address == AUTO:
        address = os.environ.get("RAY_ADDRESS", AUTO)
    if address != AUTO:
        host, colon, port = address.removeprefix("ray://").rpartition(":")
        if not (host and colon and port.isdecimal()) or "/" in host:
            raise ClusterError(f"expected HOST:PORT of a Ray cluster, got {shown(address)}")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
        except (OSError, OverflowError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise ClusterError(f"no Ray cluster at {address}: {why}; {advice}") from error
    if not address.startswith("ray://"):
        asked = [] if address == AUTO else ["--address", address]
        command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", *asked]
        try:
            found = subprocess.run(command, capture_output=True, timeout=_HEALTH_S, check=False).returncode == 0
        except subprocess.TimeoutExpired:
            found = False
        if not found:
            where = "on this machine" if address == AUTO else f"at {address}"
            raise ClusterError(f"no Ray cluster answers {where}: {advice}")


def _places(nodes: list[dict[str, Any]], on_each: Literal["device", "core"]) -> Iterator[dict[str, Any]]:
    """Ray's options for each worker: what it needs, and near which node."""
    sizes = [(node, node["Resources"]) for node in nodes]
    if on_each == "core":
        # In turns, so that a few workers are on as many nodes.
        most = int(max((size.get("CPU", 0) for _, size in sizes), default=0))
        for number in range(most):
            yield from (_near(node) | {"num_cpus": 1} for node, size in sizes if size.get("CPU", 0) > number)
        return
    if any(size.get("GPU", 0) >= 1 for _, size in sizes):
        for node, size in sizes:
            yield from (_near(node) | {"num_gpus": 1} for _ in range(int(size.get("GPU", 0))))
    elif any(size.get("TPU") for _, size in sizes):
        yield from (_near(node) | {"resources": {"TPU": size["TPU"]}} for node, size in sizes if size.get("TPU"))
    else:
        yield from (_near(node) | {"num_cpus": int(size["CPU"])} for node, size in sizes if size.get("CPU", 0) >= 1)


def _near(node: Mapping[str, Any]) -> dict[str, Any]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
