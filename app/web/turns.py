"""`Turns`: several runs share one device, chunk by chunk."""

import threading
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager


class Turns:
    """Lends the device to one run at a time: of those that wait, to the one that has used it least.

    A run takes a turn for each chunk, so that a short piece is not held up by an hour of music that began before it.
    A new run begins with the least use of those under way, so it neither waits for them nor makes them wait.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._used_s: dict[Hashable, float] = {}
        self._waiting: list[Hashable] = []
        self._lent = False

    def begin(self, run: Hashable) -> None:
        """Add a run, which then takes turns until `end`."""
        with self._changed:
            self._used_s[run] = min(self._used_s.values(), default=0.0)

    def end(self, run: Hashable) -> None:
        """Remove a run."""
        with self._changed:
            self._used_s.pop(run, None)

    @contextmanager
    def turn(self, run: Hashable) -> Iterator[None]:
        """Have the device to oneself; wait for it if need be."""
        with self._changed:
            self._waiting.append(run)
            self._changed.wait_for(lambda: not self._lent and self._next() == run)
            self._waiting.remove(run)
            self._lent = True
        began_s = time.monotonic()
        try:
            yield
        finally:
            with self._changed:
                self._lent = False
                if run in self._used_s:
                    self._used_s[run] += time.monotonic() - began_s
                self._changed.notify_all()

    def _next(self) -> Hashable:
        return min(self._waiting, key=lambda run: self._used_s.get(run, 0.0))
