"""The command `music-ar web`: the page in a browser, and its HTTP API."""

import json
import os
import signal
import tempfile
import threading
from dataclasses import dataclass
from typing import Annotated, ClassVar

import tyro

from app.console import CommandError, ProgressLine, Unset
from app.web.memory import share_arenas


@dataclass(frozen=True, kw_only=True)
class Web:
    """Open the web page: give it a few bars of piano and hear it continue.

    Example: music-ar web --host 0.0.0.0 --auth anna:secret --open

    Attributes:
        checkpoint: name of a shipped model, a folder, or a hub id (owner/name); default: the shipped model.
        host: address to listen on. The default can only be reached from this machine; 0.0.0.0 opens it to your network.
        port: port to listen on; default: the first free one from 7860.
        share: also create a temporary public address through Gradio's servers.
        auth: user:password that visitors must enter; default: none. Set it if others can reach the page.
        queue_size: number of requests that may wait for their turn; further ones are turned away.
        open: open the page in the default browser.
        measure: whether to time each number of variations while the page is idle after start-up.
    """

    many_rows: ClassVar[bool] = False  # see app.cli.Command

    checkpoint: Unset[str] = None
    host: str = "127.0.0.1"
    port: Unset[int] = None
    share: bool = False
    auth: Unset[str] = None
    queue_size: int = 20
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

    def run(self) -> None:
        """Serve the page until it is interrupted."""
        share_arenas()
        try:
            from app.web.page import example_prompts
            from app.web.server import build_app, serve
        except ImportError as error:
            raise CommandError(f"the page needs {error.name}: pip install '.[web]'") from error
        from app.web.manager import SessionManager
        from app.web.warmup import Machine
        from music_ar import Generator
        from music_ar.model.weights import read_companion

        with ProgressLine("loading the model and timing this machine (up to a minute)") as line:
            generator = Generator.from_pretrained(self.checkpoint)
            machine = Machine(generator, json.loads(read_companion(self.checkpoint, "curve.json") or "{}").get("rows"))
            machine.warm_up(example_prompts())
            line.report(1.0, "ready")
        manager = SessionManager(machine)
        with tempfile.TemporaryDirectory(prefix="music-ar-") as folder:
            os.environ["GRADIO_TEMP_DIR"] = folder  # uploads and downloads are deleted with the server at the latest
            app = build_app(manager, about=read_companion(self.checkpoint, "MODEL_CARD.md"))
            user = None if self.auth is None else tuple(self.auth.split(":", 1))
            launch = {"server_name": self.host, "server_port": self.port, "share": self.share, "auth": user}
            address = serve(app, queue_size=self.queue_size, inbrowser=self.open, prevent_thread_lock=True, **launch)
            print(f"Music AR is running at {address} (Ctrl-C stops it)", flush=True)
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does
            ended = threading.Event()
            measuring = threading.Thread(
                target=machine.warm_up_further, args=[example_prompts(), ended, manager.activity], daemon=True
            )
            if self.measure:
                measuring.start()
            app.block_thread()
            ended.set()
            if self.measure:
                measuring.join(timeout=10)
