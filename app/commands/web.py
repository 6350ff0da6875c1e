"""The `web` command: loads the model, measures the machine and opens the page of `app.web`."""

import json
import os
import signal
import tempfile
import threading
from dataclasses import dataclass

from app.console import CommandError, ProgressLine
from app.web.memory import share_pools


@dataclass(frozen=True, kw_only=True)
class Web:
    """Opens the web page: give it a few bars, hear it go on.

    Example: music-ar web --host 0.0.0.0 --auth anna:secret --open

    Attributes:
        checkpoint: name of a shipped model, a folder, or a hub id (owner/name).
        host: who can reach it: by default this machine alone; 0.0.0.0 is everyone on your network.
        port: by default the first free one from 7860 on.
        share: a public address through Gradio's servers, for three days.
        auth: user:password that the page asks for; by default it asks for none.
        queue_size: how many may wait for their turn.
        open: show it in the browser.
        measure: whether to find out, in the first minutes while nobody plays, what more variations cost here; if not,
            that is done when they are asked for.
    """

    checkpoint: str | None = None
    host: str = "127.0.0.1"
    port: int | None = None
    share: bool = False
    auth: str | None = None
    queue_size: int = 20
    open: bool = False
    measure: bool = True

    def __post_init__(self) -> None:
        if self.auth is not None and ":" not in self.auth:
            raise CommandError("--auth takes user:password")
        if self.queue_size < 1:
            raise CommandError(f"--queue-size must be at least 1, got {self.queue_size}")

    def run(self) -> None:
        """Serves the page until it is interrupted."""
        share_pools()
        try:
            from app.web.page import build_app, example_prompts, serve
        except ImportError as error:
            raise CommandError(f"the page needs {error.name}: install it with pip install '.[web]'") from error
        from app.web.session import Studio
        from music_ar import Generator
        from music_ar.model.pretrained import read_beside

        with ProgressLine("loading the model, measuring this machine: a minute at most") as line:
            generator = Generator.from_pretrained(self.checkpoint)
            studio = Studio(generator, json.loads(read_beside(self.checkpoint, "curve.json") or "{}").get("rows"))
            studio.warm_up(example_prompts())
            line.report(1.0, "ready")
        with tempfile.TemporaryDirectory(prefix="music-ar-") as folder:
            os.environ["GRADIO_TEMP_DIR"] = folder  # uploads and downloads go with the server, if not sooner
            app = build_app(studio, about=read_beside(self.checkpoint, "MODEL_CARD.md"))
            user = None if self.auth is None else tuple(self.auth.split(":", 1))
            launch = {"server_name": self.host, "server_port": self.port, "share": self.share, "auth": user}
            address = serve(app, queue_size=self.queue_size, inbrowser=self.open, prevent_thread_lock=True, **launch)
            print(f"Music AR plays at {address} — Ctrl-C ends it", flush=True)
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does
            ended = threading.Event()
            measuring = threading.Thread(target=studio.warm_up_further, args=[example_prompts(), ended], daemon=True)
            if self.measure:
                measuring.start()
            app.block_thread()
            ended.set()
            if self.measure:
                measuring.join(timeout=10)
