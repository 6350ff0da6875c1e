#!/usr/bin/env python3
"""Firefox as Playwright starts it, for versions that lack a command of WebDriver BiDi that Playwright sends.

Playwright drives an unpatched Firefox by WebDriver BiDi, and reads the address to connect to from its log. This program
starts Firefox, writes the address of a relay in its place, and passes all messages on. Where Firefox does not know
`emulation.setMediaFeaturesOverride`, which older ones lack, the relay says that it was done: the tests do not need it.
"""

import asyncio
import contextlib
import json
import re
import shutil
import signal
import sys

from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve

_UNNEEDED = {"emulation.setMediaFeaturesOverride"}
_LISTENING = re.compile(r"WebDriver BiDi listening on (ws://\S+)")


async def _relay(player: ServerConnection, firefox_address: str) -> None:
    """Pass messages on in both directions until one side closes."""
    assert player.request is not None
    sent: dict[int, str] = {}
    async with connect(firefox_address + player.request.path, max_size=None) as firefox:

        async def ask() -> None:
            async for text in player:
                message = json.loads(text)
                sent[message["id"]] = message["method"]
                await firefox.send(text)

        async def answer() -> None:
            async for text in firefox:
                message = json.loads(text)
                method = sent.pop(message.get("id"), None)
                if method in _UNNEEDED and message.get("error") == "unknown command":
                    text = json.dumps({"type": "success", "id": message["id"], "result": {}})
                await player.send(text)

        tasks = [asyncio.create_task(ask()), asyncio.create_task(answer())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()


async def main() -> int:
    """Run Firefox with the arguments of the command line; its exit code."""
    program = shutil.which("firefox-esr") or shutil.which("firefox")
    if program is None:
        raise SystemExit("Firefox is not installed")
    firefox = await asyncio.create_subprocess_exec(program, *sys.argv[1:], stderr=asyncio.subprocess.PIPE)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, firefox.terminate)
    assert firefox.stderr is not None
    async with contextlib.AsyncExitStack() as stack:
        async for line in firefox.stderr:
            text = line.decode(errors="replace")
            if found := _LISTENING.search(text):
                relay = lambda player, address=found[1]: _relay(player, address)  # noqa: E731
                server = await stack.enter_async_context(serve(relay, "127.0.0.1", 0, max_size=None))
                port = next(iter(server.sockets)).getsockname()[1]
                text = f"WebDriver BiDi listening on ws://127.0.0.1:{port}\n"
            sys.stderr.write(text)
            sys.stderr.flush()
        return await firefox.wait()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
