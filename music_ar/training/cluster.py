"""Training on many hosts: find the cluster that this process belongs to, join it, and keep one clock.

Process 0 decides about time, checkpoints and the end; the others follow in the same step. A process that is alone has
`Alone` in place of a `Cluster`, and nothing is started.
"""

import contextlib
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from music_ar.training.control import Channel, ClusterError, Place

DEFAULT_PORT = 8476

# JAX's own watch over the others. The control channel is quicker; this one is left for what it does not see.
_JAX_HEARTBEAT_S = 100
_JAX_SHUTDOWN_S = 60
_JAX_JOIN_S = 120

_EXPLAINED = (
    "a cluster needs --coordinator HOST:PORT (of process 0), --processes N and --process I, from a launcher that JAX "
    "knows or from these options"
)


class Decision(NamedTuple):
    """What all processes do before the next step.

    Attributes:
        progress: fraction of the run that is done; 1 or more ends it.
        save: whether to save a checkpoint.
        stop: whether to end the run early.
    """

    progress: float
    save: bool
    stop: bool


@runtime_checkable
class Hosts(Protocol):
    """The processes of a run: `Alone` or a `Cluster`."""

    process: int

    def agree(self, own: Decision) -> Decision:
        """Return what all do next: what process 0 decides, and a stop if any of them asks for it."""
        ...


class Alone:
    """The only process of a run."""

    process = 0

    def agree(self, own: Decision) -> Decision:
        """Return the decision as it is."""
        return own


class Cluster:
    """The processes of a run on many hosts, joined.

    Args:
        place: where this process stands.
        channel: its connection with process 0 or, of process 0, with the others.
    """

    def __init__(self, place: Place, channel: Channel):
        self.process, self._channel, self._stopping = place.process, channel, False

    def agree(self, own: Decision) -> Decision:
        """As `Hosts.agree`.

        Raises:
            ClusterError: another process is gone.
        """
        if self.process == 0:
            decision = own._replace(stop=own.stop or self._channel.stop_requested)
            self._channel.lead(list(decision))
            return decision
        if own.stop and not self._stopping:
            self._stopping = True
            self._channel.request_stop()
        return Decision(*self._channel.follow())

    def leave(self) -> None:
        """Wait until all have done their work, and part."""
        self._channel.finish()
        with contextlib.suppress(RuntimeError):  # all is done, whatever becomes of the others now
            jax.distributed.shutdown()

    def abandon(self, sentence: str, *, is_own_fault: bool) -> None:
        """Tell the others that this process fails; if one of them is gone, `on_lost` ends this one instead."""
        self._channel.abandon(sentence, wait_s=0.0 if is_own_fault else 5.0)


def find(coordinator: str | None, processes: int | None, process: int | None, timeout_s: float) -> Place | None:
    """Find the cluster that this process belongs to, or None if it is alone.

    What is not given is taken from the environment: `MASTER_ADDR`, `MASTER_PORT`, `WORLD_SIZE`, `RANK`, SkyPilot's
    variables, or a launcher that JAX detects (Slurm, Open MPI, TPU pods, Kubernetes Jobs).

    Args:
        coordinator: HOST:PORT of process 0.
        processes: number of processes; 1 stays alone, whatever the environment says.
        process: number of this one, from 0.
        timeout_s: how long a launcher may take to name the host of process 0.

    Raises:
        ClusterError: what is known is not enough, or makes no sense.
    """
    if processes == 1:
        return None
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    found = _announced(coordinator, processes, process) or _detected(coordinator, processes, process, timeout_s)
    address, count, number, local = found
    if count == 1 or (address is None and count is None and number is None):
        return None
    if address is None or count is None or number is None:
        given = {"--coordinator": address, "--processes": count, "--process": number}
        missing = [option for option, value in given.items() if value is None]
        raise ClusterError(f"{_EXPLAINED}; {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    if not 0 <= number < count:
        raise ClusterError(f"--process must be in 0..{count - 1}, for {count} processes; got {number}")
    host, port = _address(address)
    return Place(host=host, port=port, processes=count, process=number, local_devices=_own_devices(local))


def join(place: Place, description: dict[str, Any], *, timeout_s: float, on_lost: Callable[[str], None]) -> Cluster:
    """Join a cluster, before anything is computed with JAX.

    Args:
        place: from `find`.
        description: what must be the same in all processes, JSON-like.
        timeout_s: how long to wait for all processes.
        on_lost: ends this process when another is gone; it gets a sentence, and is called in another thread.

    Raises:
        ClusterError: some processes are missing, or differ from process 0.
    """
    channel = Channel(place, {"--processes": place.processes} | description, on_lost)
    channel.join(timeout_s)
    jax.config.update("jax_enable_preemption_service", False)  # it would take over SIGTERM
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"[{place.host}]:{place.port}" if ":" in place.host else f"{place.host}:{place.port}",
        place.processes,
        place.process,
        local_device_ids=place.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=_JAX_JOIN_S,
        heartbeat_timeout_seconds=_JAX_HEARTBEAT_S,
        shutdown_timeout_seconds=_JAX_SHUTDOWN_S,
    )
    return Cluster(place, channel)


_Found = tuple[str | None, int | None, int | None, tuple[int, ...] | None]


def _announced(coordinator: str | None, processes: int | None, process: int | None) -> _Found | None:
    """Complete what is given by the variables of torchrun or SkyPilot, if they are set."""
    variables = os.environ
    if coordinator is not None and processes is not None and process is not None:
        return coordinator, processes, process, None
    if {"WORLD_SIZE", "RANK"} <= variables.keys():
        address, count, rank = _master(), "WORLD_SIZE", "RANK"
    elif {"SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK"} <= variables.keys():
        address = next(iter(variables.get("SKYPILOT_NODE_IPS", "").split()), None)
        count, rank = "SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK"
    else:
        return None
    address = coordinator or address
    if address is None:  # a name as common as RANK says nothing by itself
        return None
    local = (_number("LOCAL_RANK"),) if "LOCAL_RANK" in variables else None
    return (
        address,
        _number(count) if processes is None else processes,
        _number(rank) if process is None else process,
        local,
    )


def _master() -> str | None:
    host = os.environ.get("MASTER_ADDR")
    return None if host is None else f"{host}:{os.environ.get('MASTER_PORT', DEFAULT_PORT)}"


def _number(variable: str) -> int:
    text = os.environ[variable]
    if not text.isdecimal():
        raise ClusterError(f"the variable {variable} must be a whole number, got {text!r}")
    return int(text)


def _detected(coordinator: str | None, processes: int | None, process: int | None, timeout_s: float) -> _Found:
    """Complete what is given by the launcher that JAX detects, if there is one."""
    from jax._src.clusters import ClusterEnv  # jax.distributed.initialize would not say what it has found

    of_a_job = ("JOB_COMPLETION_INDEX", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES", "SLURM_JOB_ID", "OMPI_")
    if "KUBERNETES_SERVICE_HOST" in os.environ and not any(name.startswith(of_a_job) for name in os.environ):
        return coordinator, processes, process, None  # any pod; JAX would look for its Job
    try:
        address, count, number, local = ClusterEnv.auto_detect_unset_distributed_params(
            coordinator, processes, process, None, None, round(timeout_s)
        )
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise ClusterError(f"this looks like a cluster, but JAX cannot join it: {error}. {_EXPLAINED}") from error
    return address, count, number, None if local is None else tuple(local)


def _own_devices(local: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Return which of the host's accelerators belong to this process, or None for all it sees.

    A launcher that numbers the processes of a host means one accelerator for each, unless there is only one process, or
    the launcher itself has hidden the other accelerators.
    """
    tasks = next(
        (
            os.environ[name]
            for name in ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE")
            if name in os.environ
        ),
        "",
    )
    is_alone_on_its_host = re.fullmatch(r"1(\(x\d+\))?", tasks) is not None  # Slurm's "1(x4)": one on each of four
    sees_one = os.environ.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0
    return None if is_alone_on_its_host or sees_one or "JAX_LOCAL_DEVICE_IDS" in os.environ else local


def _address(text: str) -> tuple[str, int]:
    """Split HOST:PORT; a host alone gets the default port."""
    host, _, port = text.rpartition(":") if ":" in text else (text, "", str(DEFAULT_PORT))
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65_535:
        raise ClusterError(f"--coordinator must be HOST:PORT, such as node-1:{DEFAULT_PORT}, got {text!r}")
    return host.strip("[]"), int(port)
