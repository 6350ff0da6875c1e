"""The command `music-ar web`: the page in a browser, and its HTTP API."""

import importlib.util
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from app.console import CommandError, ProgressLine, Unset, check_packages
from app.web.addresses import Addresses, address_in_network, free_port, is_loopback
from app.web.memory import share_arenas

if TYPE_CHECKING:
    from app.web.manager import SessionManager
    from app.web.server import Server
    from music_ar.embedding.library import Library


@dataclass(frozen=True, kw_only=True)
class Web:
    """Open the web page: give it a few bars of piano and hear it continue.

    Example: music-ar web --host 0.0.0.0 --auth-file visitors.txt --open

    Attributes:
        checkpoint: name of a shipped model, a folder, or a hub id (owner/name); default: the shipped model.
        encoder: piece encoder for "What is this like?": name of a shipped one, a folder, or a hub id (owner/name);
            default: the shipped encoder. Without one that has an index, the page does not ask.
        index: file of its index; default: passages.safetensors in the folder of the encoder.
        host: address to listen on. The default can only be reached from this machine; 0.0.0.0 opens it to your network.
        port: port to listen on; default: the first free one from 7860.
        root_path: where a reverse proxy serves the page: a path such as /music, or better the whole address, such as
            https://example.org/music. Headers of the proxy are then believed. Default: there is no proxy.
        allow_origin: addresses of other pages that may use this server, or names it is reached by, such as
            https://music.example. Default: all others are refused.
        share: also create a public address through Gradio's servers, which lasts for up to a week.
        auth: user:password that visitors must enter; default: none. Set it if others can reach the page. Other users of
            this machine can read it in the list of processes; --auth-file and the variable MUSIC_AR_AUTH hide it.
        auth_file: text file with a line user:password for each visitor, in place of --auth.
        queue_size: number of requests from one address that may wait for their turn; further ones are turned away.
        mcp: also let AI assistants use the server, by the Model Context Protocol, at /gradio_api/mcp/.
        open: open the page in the default browser.
        measure: whether to time each number of variations while the page is idle after start-up.
    """

    many_rows: ClassVar[bool] = False  # see app.cli.Command

    checkpoint: Unset[str] = None
    encoder: Unset[str] = None
    index: Unset[Path] = None
    host: str = "127.0.0.1"
    port: Unset[int] = None
    root_path: Unset[str] = None
    allow_origin: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="")] = ()
    share: bool = False
    auth: Unset[str] = None
    auth_file: Unset[Path] = None
    queue_size: int = 20
    mcp: bool = False
    open: bool = False
    measure: Annotated[
        bool,
        tyro.conf.arg(
            help="time a number of variations only when someone asks for it. Use it if the machine has other work.",
            help_behavior_hint="(default: each is timed while the page is idle after start-up)",
        ),
    ] = True

    def __post_init__(self) -> None:
        if self.auth is not None and ":" not in self.auth:
            raise CommandError("--auth must be user:password, got no colon")
        if self.queue_size < 1:
            raise CommandError(f"--queue-size must be at least 1, got {self.queue_size}")
        if self.port is not None and not 1 <= self.port <= 65535:
            raise CommandError(f"--port must be from 1 to 65535, got {self.port}")

    def run(self) -> int:
        """Serve the page until it is interrupted. Return 1 if it could not go on."""
        share_arenas()
        addresses = Addresses(self.host, self.root_path or "", self.allow_origin)
        free_port(self.host, self.port)  # a taken one is told now, not after the model is loaded
        addresses.behind_proxy |= self.share
        # The address of a client is that of its connection, unless a proxy on this machine was announced.
        os.environ.setdefault("FORWARDED_ALLOW_IPS", "127.0.0.1" if addresses.behind_proxy else "")
        self._check_packages()
        from app.web.log import finish_log, start_log
        from app.web.passwords import read_passwords
        from app.web.server import Options, Server, build_app

        passwords = read_passwords(self.auth, self.auth_file, os.environ)
        if passwords and self.mcp:
            raise CommandError("choose one of --mcp and a password: Gradio's MCP server cannot log in")
        if not passwords and (self.share or not is_loopback(self.host)):
            print("music-ar: everyone who can reach this server may use it; --auth-file asks for a password",
                  file=sys.stderr, flush=True)  # fmt: skip
        library = self._library()
        manager, about = self._manager()
        lines, port = start_log(), free_port(self.host, self.port)
        with tempfile.TemporaryDirectory(prefix="music-ar-", ignore_cleanup_errors=True) as folder:
            os.environ["GRADIO_TEMP_DIR"] = folder  # uploads and downloads are deleted with the server at the latest
            options = Options(
                host=self.host,
                port=port,
                addresses=addresses,
                root_path=self.root_path or "",
                passwords=passwords,
                queue_size=self.queue_size,
                share=self.share,
                mcp=self.mcp,
                open=self.open,
                model=Path(self.checkpoint or "maestro-small").name,
            )
            try:
                server = Server(build_app(manager, about=about, library=library), manager, options)
            except OSError as error:  # taken while the model was being loaded
                raise CommandError(f"cannot listen on port {port}: choose another with --port") from error
            print(f"Music AR is running at {self._shown(server.address, port)} (Ctrl-C stops it)", flush=True)
            code = self._serve(server, manager)
        finish_log(lines)
        return code

    def _check_packages(self) -> None:
        """Check that the optional packages are there, before the model is loaded."""
        check_packages("the page", "web", "gradio", "docstring_parser", "pydantic", "soundfile", "websockets")
        if self.mcp and importlib.util.find_spec("mcp") is None:
            raise CommandError("--mcp needs the package mcp: pip install '.[mcp]'")

    def _library(self) -> "Callable[[], Library] | None":
        """What gives the encoder and its index, if they are named or ship; those that ship are read when needed."""
        from app.web.examples import example_prompts
        from music_ar import read_midi
        from music_ar.embedding.library import Library, shipped_library

        if self.encoder is None and self.index is None:
            return Library.open if shipped_library() else None
        with ProgressLine("loading the encoder"):
            library = Library.open(self.encoder, self.index)
            for prompt in example_prompts():  # compiles, so that nobody waits for that later
                library.nearest(read_midi(prompt))
            return lambda: library

    def _manager(self) -> "tuple[SessionManager, str]":
        """Load the model; a manager for it, and its model card."""
        from app.web.examples import example_prompts
        from app.web.manager import SessionManager
        from app.web.warmup import Machine
        from music_ar import Generator
        from music_ar.model.weights import CURVE, MODEL_CARD, read_companion, read_figures

        with ProgressLine("loading the model and timing this machine (up to a minute)") as line:
            generator = Generator.from_pretrained(self.checkpoint)
            machine = Machine(generator, read_figures(self.checkpoint, CURVE).get("rows"))
            machine.warm_up(example_prompts())
            line.report(1.0, "ready")
        return SessionManager(machine), read_companion(self.checkpoint, MODEL_CARD)

    def _shown(self, address: str, port: int) -> str:
        own = address_in_network() if self.host in ("0.0.0.0", "::") else None
        return address if own is None else f"{address}, and in your network at http://{own}:{port}/"

    def _serve(self, server: "Server", manager: "SessionManager") -> int:
        """Wait for Ctrl-C or SIGTERM, or until the server cannot go on; the exit code."""
        from app.web.examples import example_prompts

        ended = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: ended.set())
        measuring = threading.Thread(
            target=manager.machine.warm_up_further, args=[example_prompts(), ended, manager.activity], daemon=True
        )
        if self.measure:
            measuring.start()
        healthy = True
        while healthy and not ended.wait(0.5):
            healthy = server.healthy
        ended.set()
        server.stop()
        if self.measure:
            measuring.join(timeout=10)
        print("stopped" if healthy else "music-ar: the queue of requests has ended; start the server again",
              file=sys.stderr, flush=True)  # fmt: skip
        return 0 if healthy else 1
