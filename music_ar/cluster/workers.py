"""Workers of a cluster, and items mapped over them, whatever becomes of the nodes."""

import asyncio
import collections
import concurrent.futures
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

from music_ar.code import code_digest

MAX_LOSSES = 3
"""How often an item may lose its worker before it is given up."""
_GATHER_S = 30.0
_POLL_S = 1.0
_MANY_CALLS = 10_000  # at once in one worker; most of them only wait


class ClusterError(ValueError):
    """A cluster that cannot be used; the message says what to change."""


class Result(NamedTuple):
    """What became of an item.

    Attributes:
        item: the item.
        value: what the worker made of it; None if there is an error.
        error: why there is no value: its workers were lost, time after time.
    """

    item: Any
    value: Any
    error: str | None = None


@dataclass(eq=False)
class _Worker:
    actor: Any
    items: int = 0
    is_ready: bool = False


@dataclass(eq=False)
class _Task:
    item: Any
    losses: int = 0


class Workers:
    """Workers that hold the same thing. As a context manager, ends them on exit. Made by `Cluster.workers`."""

    def __init__(
        self,
        ray: ModuleType,
        build: Callable[..., Any],
        stored: list[Any],
        places: list[dict[str, Any]],
        patience_s: float,
    ):
        self._ray, self._patience_s = ray, patience_s
        self._starts_with = code_digest(), build, stored
        actor = ray.remote(_Actor)
        # The items are not retried by Ray, which would keep them for one worker until that has found a new place.
        options = {"max_restarts": -1, "max_task_retries": 0, "max_concurrency": _MANY_CALLS}
        self._workers = [_Worker(actor.options(**options, **place).remote()) for place in places]
        self._starting: dict[Any, _Worker] = {}
        for worker in self._workers:
            self._start(worker)
        self._began_s = time.monotonic()
        self._last_ready_s = self._began_s

    def __len__(self) -> int:
        return len(self._workers)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            self._ray.kill(worker.actor)

    def ask(self, method: str, item: Any) -> Any:
        """The answer of one worker; arguments and errors as in `map`."""
        [result] = self.map([item], method=method)
        if result.error is not None:
            raise ClusterError(result.error)
        return result.value

    def map(self, items: Iterable[Any], *, method: str = "__call__", at_once: int = 2) -> Iterator[Result]:
        """Yield a result for each item, in the order in which they are finished.

        Args:
            items: taken one by one, as workers have room.
            method: of what the workers hold, called with an item. Calls begin one after another; one that returns a
                `concurrent.futures.Future` lets the next begin.
            at_once: how many items a worker is given before it has finished the first.

        Raises:
            ClusterError: no worker is left, one cannot start or has run out of memory.
        """
        supply, again = iter(items), collections.deque[_Task]()
        running: dict[Any, tuple[_Worker, _Task]] = {}
        self._gather()
        while True:
            while (worker := self._with_room(at_once)) is not None:
                task = again.popleft() if again else next((_Task(item) for item in supply), None)
                if task is None:
                    break
                worker.items += 1
                running[worker.actor.call.remote(method, task.item)] = worker, task
            else:
                if not running:  # no worker is there, and there may be more items
                    self._wait([])
                    continue
            if not running:
                return
            for reference in self._wait(list(running)):
                worker, task = running.pop(reference)
                worker.items -= 1
                result = self._result(reference, worker, task)
                if result is None:
                    again.append(task)
                else:
                    yield result

    def _with_room(self, at_once: int) -> _Worker | None:
        ready = [worker for worker in self._workers if worker.is_ready and worker.items < at_once]
        return min(ready, key=lambda worker: worker.items, default=None)

    def _result(self, reference: Any, worker: _Worker, task: _Task) -> Result | None:
        """The result of a finished call; None if it was lost and should be made again."""
        exceptions = self._ray.exceptions
        try:
            return Result(task.item, self._ray.get(reference))
        except exceptions.RayTaskError as error:
            if not isinstance(error.cause, _NotStarted):
                raise _in_words(error.cause) from error
            self._start_again(worker)
            return None
        except exceptions.RayActorError:
            self._start_again(worker)
        except (exceptions.ObjectLostError, exceptions.RaySystemError):
            pass  # the node was lost between the call's end and the transfer of its value
        task.losses += 1
        if task.losses < MAX_LOSSES:
            return None
        lost = f"its worker was lost {task.losses} times, most likely for want of memory"
        return Result(task.item, None, error=lost)

    def _start_again(self, worker: _Worker) -> None:
        if worker.is_ready:
            self._start(worker)

    def _start(self, worker: _Worker) -> None:
        """Wait, beside the work, until Ray has started the worker (again)."""
        worker.is_ready = False
        self._starting[worker.actor.start.options(max_task_retries=-1).remote(*self._starts_with)] = worker

    def _gather(self) -> None:
        """Wait for a first worker, and a little for the others, so that they share even a few items."""
        while self._starting and not self._ready():
            self._wait([])
        until_s = self._began_s + _GATHER_S
        while self._starting and time.monotonic() < until_s:
            self._wait([])

    def _ready(self) -> bool:
        return any(worker.is_ready for worker in self._workers)

    def _wait(self, running: list[Any]) -> list[Any]:
        """Wait a moment for calls and for workers that start; return the calls that are finished."""
        if self._ready():
            self._last_ready_s = time.monotonic()
        finished, _ = self._ray.wait([*self._starting, *running], num_returns=1, timeout=_POLL_S)
        if finished and finished[0] in self._starting:
            self._started(finished.pop())
        if not self._ready() and time.monotonic() - self._last_ready_s > self._patience_s:
            raise ClusterError(
                f"no worker was there for {self._patience_s:.0f} s: the nodes of the Ray cluster are lost, or others "
                "use their cores and devices (`ray status` shows it)"
            )
        return finished

    def _started(self, reference: Any) -> None:
        worker = self._starting.pop(reference)
        try:
            error = self._ray.get(reference)
        except self._ray.exceptions.ActorUnavailableError:
            self._start(worker)
            return
        except self._ray.exceptions.RayError as failed:
            raise ClusterError(f"a worker cannot start: {_last_line(failed)}") from failed
        if error is not None:
            raise ClusterError(f"a worker cannot start: {error}")
        worker.is_ready = True


class _NotStarted(Exception):
    """A worker has been started anew since its last answer, and holds nothing yet."""


class _Actor:
    """A worker on its node. Asynchronous, so that many calls may wait in it; one thread does the work."""

    def __init__(self) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._held: Any = None

    async def start(self, code: str, build: Callable[..., Any], stored: list[Any]) -> str | None:
        """Build what the worker holds. Return why that is impossible, or None."""
        if code_digest() != code:
            return f"{socket.gethostname()} has another version of music-ar: install the same on all nodes"
        arguments = [await reference for reference in stored]
        try:
            self._held = await asyncio.get_running_loop().run_in_executor(self._thread, build, *arguments)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    async def call(self, method: str, item: Any) -> Any:
        """Call a method of what the worker holds."""
        if self._held is None:
            raise _NotStarted
        loop = asyncio.get_running_loop()
        value = await loop.run_in_executor(self._thread, getattr(self._held, method), item)
        return await asyncio.wrap_future(value) if isinstance(value, concurrent.futures.Future) else value


def _in_words(error: BaseException) -> BaseException:
    """What a call has raised; where a device was too small, the sentence about it."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return ClusterError("a worker ran out of memory: use a smaller --batch-size")
    return error


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
