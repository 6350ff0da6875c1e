"""Names and passwords of the page: where they come from, and how wrong ones are slowed down."""

import asyncio
import hmac
import time
from collections import OrderedDict
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path

from fastapi import HTTPException

AUTH_VARIABLE = "MUSIC_AR_AUTH"
CLIENT_ADDRESS: ContextVar[str] = ContextVar("client_address", default="")
"""Address of the client whose request is being answered."""
_FREE_ATTEMPTS = 3  # typing errors
_MAX_WAIT_S = 60.0
_MAX_ASLEEP_S = 4.0  # beyond that, the answer is to come back later
_MAX_REMEMBERED = 20_000


class PasswordError(ValueError):
    """No passwords can be read; the message says what was expected."""


def read_passwords(argument: str | None, file: Path | None, environment: Mapping[str, str]) -> dict[str, str]:
    """Read names and passwords from a file, an option or the environment; empty if none are given.

    Args:
        argument: value of `--auth`.
        file: value of `--auth-file`: a line user:password for each visitor.
        environment: variables, in which `MUSIC_AR_AUTH` is like the file.

    Raises:
        PasswordError: there are two sources, or a line is something else.
    """
    if argument is not None and file is not None:
        raise PasswordError("choose one of --auth and --auth-file")
    if argument is not None:
        return _parsed(argument, "--auth")
    if file is not None:
        try:
            return _parsed(file.read_text(encoding="utf-8"), str(file))
        except UnicodeDecodeError as error:
            raise PasswordError(f"{file} is not a text file: expected a line user:password for each visitor") from error
    return _parsed(environment[AUTH_VARIABLE], AUTH_VARIABLE) if AUTH_VARIABLE in environment else {}


def _parsed(text: str, source: str) -> dict[str, str]:
    passwords: dict[str, str] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, colon, password = line.partition(":")
        if not (colon and name.strip() and password):  # the line is not shown: it may hold a password
            raise PasswordError(f"{source} must hold user:password, with neither of them empty")
        passwords[name.strip()] = password
    if not passwords:
        raise PasswordError(f"{source} is empty: expected user:password")
    return passwords


class Passwords:
    """Checks passwords, ever more slowly for an address and a name that were wrong.

    Someone who guesses slows down nobody but those who give the same name from the same address.

    Args:
        passwords: by name.
        wait_s: time to wait after the first wrong password that is not taken for a typing error; it doubles each time.
    """

    def __init__(self, passwords: Mapping[str, str], *, wait_s: float = 1.0):
        self._passwords, self._wait_s = passwords, wait_s
        self._wrong: OrderedDict[tuple[str, str], tuple[int, float]] = OrderedDict()  # times, and when to try again
        self._asleep: set[tuple[str, str]] = set()

    async def check(self, name: str, password: str) -> bool:
        """Whether a name and a password are right.

        Raises:
            HTTPException: there were too many wrong ones; try again later.
        """
        key = CLIENT_ADDRESS.get(), name[:100]
        await self._wait(key)
        expected = self._passwords.get(name)
        if hmac.compare_digest(password.encode(), (expected or "").encode()) and expected is not None:
            self._wrong.pop(key, None)
            return True
        times = self._wrong.get(key, (0, 0.0))[0] + 1
        wait_s = self._wait_s * 2.0 ** min(times - _FREE_ATTEMPTS, 16) if times >= _FREE_ATTEMPTS else 0.0
        self._wrong[key] = times, time.monotonic() + min(wait_s, _MAX_WAIT_S)
        self._wrong.move_to_end(key)
        while len(self._wrong) > _MAX_REMEMBERED:
            self._wrong.popitem(last=False)
        return False

    async def _wait(self, key: tuple[str, str]) -> None:
        left_s = self._wrong.get(key, (0, 0.0))[1] - time.monotonic()
        if left_s <= 0:
            return
        if left_s > _MAX_ASLEEP_S or key in self._asleep:
            raise HTTPException(
                429,
                f"too many wrong passwords: wait {left_s:.0f} seconds, then try again",
                {"Retry-After": f"{left_s:.0f}"},
            )
        self._asleep.add(key)
        try:
            await asyncio.sleep(left_s)
        finally:
            self._asleep.discard(key)
