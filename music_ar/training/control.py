"""The control channel of a run on many hosts: who has joined, what to do next, and who is gone.

Process 0 listens at the coordinator's address before JAX does. The others connect, say who they are, and stay
connected, so that the end of a process is known at once and by name. JAX notices it too, but ends the process with
abort() and a stack trace. Messages are lines of JSON; a thread reads them and answers while the main thread computes or
waits for a device.
"""

import asyncio
import contextlib
import json
import queue
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

HEARTBEAT_S = 5.0
SILENCE_S = 40.0
"""A process that was not heard of for so long is gone. The end of a process is known at once, that of a machine not."""

_LINE_BYTES = 2**22
_HELLO_S = 10.0
_RETRY_S = 0.5


class ClusterError(ValueError):
    """The processes of a run cannot work together; the message names the process, its host and what to do."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process stands in a cluster.

    Attributes:
        host: name or address of the host of process 0.
        port: port at which process 0 listens.
        processes: number of processes.
        process: number of this one, from 0.
        local_devices: numbers of the host's accelerators that are its own; None for all it sees.
    """

    host: str
    port: int
    processes: int
    process: int
    local_devices: tuple[int, ...] | None = None


@dataclass(kw_only=True, eq=False)
class _Peer:
    """Another process: its number, host, connection, when it was last heard of, and whether it has done its work."""

    process: int
    host: str
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    heard_s: float
    done: asyncio.Event = field(default_factory=asyncio.Event)
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message, if there is still somebody to read it."""
        with contextlib.suppress(OSError, RuntimeError):
            self.writer.write(json.dumps(message).encode() + b"\n")


class Channel:
    """The connections of process 0 with each of the others.

    Args:
        place: where this process stands.
        description: what must be the same in all processes, JSON-like.
        on_lost: called in another thread with a sentence when the run cannot go on because of another process. It
            should end this one, whose main thread may wait for a device forever.
    """

    def __init__(self, place: Place, description: dict[str, Any], on_lost: Callable[[str], None]):
        self._place, self._on_lost = place, on_lost
        self._description = json.loads(json.dumps(description, default=str))  # as the others will read it
        self._peers: dict[int, _Peer] = {}
        self._refused: list[_Peer] = []
        self._refusals: list[str] = []
        self._joined, self._closing, self._failed_here = False, False, threading.Event()
        self._lost: str | None = None
        self._words: queue.SimpleQueue[list[Any] | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._complete = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="control channel", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait until all processes are connected.

        Raises:
            ClusterError: some are missing, or differ from process 0.
        """
        try:
            self._run(self._gather(timeout_s) if self._place.process == 0 else self._connect(timeout_s))
        except ClusterError:
            self.close()
            raise

    def lead(self, word: list[Any]) -> None:
        """Tell the others what to do. Called by process 0."""
        self._loop.call_soon_threadsafe(self._tell, {"word": word})

    def follow(self) -> list[Any]:
        """Wait for the next word of process 0.

        Raises:
            ClusterError: another process is gone.
        """
        word = self._words.get()
        if word is None:
            raise ClusterError(self._lost or "the run has ended")
        return word

    def request_stop(self) -> None:
        """Ask process 0 to end the run after this step."""
        self._loop.call_soon_threadsafe(self._tell, {"stop": True})

    @property
    def stop_requested(self) -> bool:
        """Whether another process has asked to end the run."""
        return self._stop.is_set()

    def finish(self) -> None:
        """Wait until all processes have done their work, and close the connections."""
        self._run(self._finish())
        self.close()

    def close(self) -> None:
        """Close the connections and end the thread."""
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def abandon(self, sentence: str, *, wait_s: float) -> None:
        """Tell the others that this process fails.

        If another process is gone, this one is ended by `on_lost` instead: its error most likely comes from that.

        Args:
            sentence: what is wrong here.
            wait_s: how long to wait for news of another process first.
        """
        self._run(self._abandon(sentence, wait_s))

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)  # asyncio itself keeps no reference
        task.add_done_callback(self._tasks.discard)

    def _tell(self, message: dict[str, Any]) -> None:
        for peer in self._connected():
            peer.tell(message)

    def _connected(self) -> list[_Peer]:
        return [*self._peers.values(), *self._refused]

    # --- joining -----------------------------------------------------------------------------------------------------

    async def _gather(self, timeout_s: float) -> None:
        """As process 0: wait for the others, and let them begin or refuse them."""
        port = self._place.port
        try:
            server = await asyncio.start_server(self._welcome, port=port, limit=_LINE_BYTES)
        except OSError as error:
            raise ClusterError(
                f"process 0 cannot listen on port {port} of {socket.gethostname()} ({error.strerror}): choose another "
                "port with --coordinator HOST:PORT, the same for all processes"
            ) from error
        self._start(self._beat())
        try:
            async with asyncio.timeout(timeout_s):
                await self._complete.wait()
        except TimeoutError:
            self._refusals.insert(0, self._missing(timeout_s))
        finally:
            server.close()  # JAX listens there next
        if self._refusals:
            sentence = ". ".join(self._refusals)
            self._closing = True
            self._tell({"failed": sentence})
            await self._until_closed(2.0)
            raise ClusterError(sentence)
        self._joined = True
        self._tell({"joined": socket.gethostname()})

    def _missing(self, timeout_s: float) -> str:
        """Say which processes have not come."""
        here = {0: f"process 0 on {socket.gethostname()}"} | {peer.process: str(peer) for peer in self._connected()}
        numbers = [number for number in range(self._place.processes) if number not in here]
        there = [here[number] for number in sorted(here)]
        which = f"process {numbers[0]} has" if len(numbers) == 1 else f"processes {_listed(numbers)} have"
        return (
            f"{which} not joined within {timeout_s:g} s, of {self._place.processes}; there are {', '.join(there)}. "
            "Start those that are missing, or wait longer with --join-timeout"
        )

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """As process 0: hear who connects, and listen to it from then on."""
        hello = await _hello(reader)
        if hello is None:  # a port scan, say
            writer.close()
            return
        process, host, description = hello["process"], hello["host"], hello["description"]
        peer = _Peer(process=process, host=host, reader=reader, writer=writer, heard_s=self._loop.time())
        refusal = self._refusal(peer, description)
        peer.tell({})
        if refusal is None:
            self._peers[process] = peer
        else:
            self._refused.append(peer)
            self._refusals.append(refusal)
            self._loop.call_later(_RETRY_S * 4, self._complete.set)  # time for the others to be heard as well
        if len(self._connected()) == self._place.processes - 1:
            self._complete.set()
        await self._listen(peer)

    def _refusal(self, peer: _Peer, description: dict[str, Any]) -> str | None:
        """Say why a process cannot take part, if so."""
        here = f"process 0 on {socket.gethostname()}"
        differences = [
            f"{name} is {_shown(theirs)}, not {_shown(ours)}"
            for name, ours, theirs in _differing(self._description, description)
        ]
        if differences:
            return (
                f"{peer} differs from {here}: {'; '.join(differences)}. Start all processes with the same code, data "
                "and options"
            )
        other = here if peer.process == 0 else self._peers.get(peer.process)
        count = self._place.processes
        if other is not None or peer.process >= count:
            taken = "" if other is None else f", which is also the number of {other}"
            return (
                f"a process on {peer.host} has the number {peer.process}{taken}: {count} processes have the numbers 0 "
                f"to {count - 1}, each once"
            )
        return None

    async def _connect(self, timeout_s: float) -> None:
        """As another process: find process 0, and wait until all are there."""
        place, end_s = self._place, self._loop.time() + timeout_s
        while self._loop.time() < end_s:
            answer = await self._knock()
            if answer is not None and "failed" in answer:
                raise ClusterError(answer["failed"])
            if answer is not None:
                self._peers[0].host, self._joined = answer["joined"], True
                self._start(self._listen(self._peers[0]))
                self._start(self._beat())
                return
            await asyncio.sleep(_RETRY_S)
        raise ClusterError(
            f"process {place.process} on {socket.gethostname()} found no process 0 at {place.host}:{place.port} within "
            f"{timeout_s:g} s. Start it there, check the address, or wait longer with --join-timeout"
        )

    async def _knock(self) -> dict[str, Any] | None:
        """Connect and introduce this process; return whether the run begins or fails, or None if nobody answers."""
        place = self._place
        try:
            reader, writer = await asyncio.open_connection(place.host, place.port, limit=_LINE_BYTES)
        except OSError:
            return None
        peer = _Peer(process=0, host=place.host, reader=reader, writer=writer, heard_s=self._loop.time())
        me = {"process": place.process, "host": socket.gethostname(), "description": self._description}
        peer.tell({"hello": me})
        self._peers[0] = peer
        with contextlib.suppress(OSError, ValueError, TimeoutError):
            while line := await asyncio.wait_for(reader.readline(), SILENCE_S):
                answer = json.loads(line)
                if answer:
                    return answer
                peer.tell({})  # a heartbeat
        writer.close()
        return None

    # --- together ----------------------------------------------------------------------------------------------------

    async def _listen(self, peer: _Peer) -> None:
        """Read the messages of a process until its connection ends."""
        with contextlib.suppress(OSError, ValueError):
            while line := await peer.reader.readline():
                peer.heard_s = self._loop.time()
                self._handle(peer, json.loads(line))
        peer.closed.set()
        peer.writer.close()
        if not self._joined and self._peers.get(peer.process) is peer:
            del self._peers[peer.process]  # it may come again
        elif self._joined and not peer.done.is_set():
            # JAX aborts a process whose process 0 has gone, in a fraction of a second; this is quicker.
            self._lose(f"{peer} is gone", grace_s=0.0 if peer.process == 0 else 1.0)

    def _handle(self, peer: _Peer, message: dict[str, Any]) -> None:
        if "word" in message:
            self._words.put(message["word"])
        elif "stop" in message:
            self._stop.set()
        elif "failed" in message:
            self._lose(message["failed"])
        elif "done" in message:
            peer.done.set()
            self._closing = self._place.process > 0  # process 0 says it last

    async def _beat(self) -> None:
        """Say every few seconds that this process lives, and look who else does."""
        last_s = self._loop.time()
        while not self._closing:
            now_s = self._loop.time()
            for peer in list(self._peers.values()):
                peer.tell({})
                if now_s - last_s > 2 * HEARTBEAT_S:  # it was this process that slept
                    peer.heard_s = now_s
                elif self._joined and now_s - peer.heard_s > SILENCE_S:
                    self._lose(f"{peer} has not answered for {SILENCE_S:g} s")
            last_s = now_s
            await asyncio.sleep(HEARTBEAT_S)

    def _lose(self, sentence: str, grace_s: float = 1.0) -> None:
        if self._lost is None and not self._closing and not self._failed_here.is_set():
            self._lost = sentence
            self._start(self._end(sentence, grace_s))

    async def _end(self, sentence: str, grace_s: float) -> None:
        """End this process because of another, unless it ends by itself with the same error in time."""
        self._tell({"failed": sentence})
        await asyncio.sleep(grace_s)
        if self._place.process == 0:  # the last to go
            await self._until_closed(5.0)
        if not self._failed_here.is_set():
            self._words.put(None)
            self._on_lost(sentence)
        self._hang_up()

    async def _finish(self) -> None:
        if self._place.process == 0:
            for peer in self._peers.values():
                await peer.done.wait()
            self._tell({"done": True})
        else:
            self._tell({"done": True})
            await self._peers[0].done.wait()

    async def _close(self) -> None:
        self._closing = True
        self._hang_up()  # which ends the tasks that listen
        for peer in self._connected():
            with contextlib.suppress(OSError):
                await peer.writer.wait_closed()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _abandon(self, sentence: str, wait_s: float) -> None:
        end_s = self._loop.time() + wait_s
        while self._lost is None and self._loop.time() < end_s:
            await asyncio.sleep(0.05)
        if self._lost is not None and wait_s > 0:
            await asyncio.sleep(SILENCE_S)  # `on_lost` comes first
        self._failed_here.set()
        self._tell({"failed": f"process {self._place.process} on {socket.gethostname()} has failed: {sentence}"})
        if self._place.process == 0:
            await self._until_closed(5.0)
        else:
            await asyncio.sleep(0.2)  # until it is sent
        self._hang_up()

    def _hang_up(self) -> None:
        for peer in self._connected():
            peer.writer.close()

    async def _until_closed(self, most_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(most_s):
                for peer in self._connected():
                    await peer.closed.wait()


async def _hello(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """Read how a process introduces itself; None if it is not one of ours."""
    try:
        hello = json.loads(await asyncio.wait_for(reader.readline(), _HELLO_S))["hello"]
        known = isinstance(hello["process"], int) and isinstance(hello["host"], str)
        return hello if known and isinstance(hello["description"], dict) else None
    except (OSError, ValueError, TimeoutError, KeyError, TypeError):
        return None


def _differing(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, our value, their value) of each setting that differs, sorted; nested names are joined by dots."""
    for name in sorted(ours.keys() | theirs.keys()):
        left, right = ours.get(name), theirs.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            yield from _differing(left, right, f"{prefix}{name}.")
        elif left != right:
            yield f"{prefix}{name}", left, right


def _shown(value: Any) -> str:
    return "not given" if value is None or value is False or value == [] else str(value)


def _listed(numbers: list[int]) -> str:
    """Write some numbers, and of many only the first."""
    some = ", ".join(map(str, numbers[:8]))
    return some if len(numbers) <= 8 else f"{some} and {len(numbers) - 8} more"
