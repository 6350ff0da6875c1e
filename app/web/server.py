"""Build the app, page and API, and serve it."""

import asyncio
import functools
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.themes import Base
from starlette.requests import HTTPConnection

from app.web.addresses import Addresses
from app.web.api import Api
from app.web.blocks import Blocks
from app.web.conversation_routes import ConversationRoutes
from app.web.conversations import Conversations
from app.web.guard import Guard
from app.web.health import Health
from app.web.jobs import Jobs
from app.web.joins import Joins
from app.web.likeness import Likeness
from app.web.limits import MAX_TIMELINE_BYTES
from app.web.log import LOG
from app.web.manager import MAX_SESSIONS, STOPPING, SessionManager
from app.web.page import LANGUAGES, SAMPLES, Page
from app.web.passwords import Passwords
from app.web.session import MAX_PROMPT_BYTES

if TYPE_CHECKING:
    from music_ar.embedding.library import Library

FILES_LIVE_S = 3600
_MAX_QUEUES = 5  # full ones of an address each; so one address cannot take all places
_SECONDS_TO_FINISH = 4.0  # for a chunk, and for its message to reach the client
_SECONDS_BETWEEN_CHECKS = 0.5


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to serve.

    Attributes:
        host: address to listen on.
        port: port to listen on.
        addresses: that the server answers to.
        root_path: where a reverse proxy serves the page: a path, or the whole address.
        passwords: of visitors, by name; without any, everyone is let in.
        queue_size: number of requests from an address that may wait for their turn.
        share: also create a public address.
        mcp: also serve the Model Context Protocol.
        open: open the page in the default browser.
        model: name of the model, for `/health`.
    """

    host: str = "127.0.0.1"
    port: int | None = None
    addresses: Addresses
    root_path: str = ""
    passwords: Mapping[str, str]
    queue_size: int = 20
    share: bool = False
    mcp: bool = False
    open: bool = False
    model: str = ""


def build_app(manager: SessionManager, *, about: str = "", library: "Callable[[], Library] | None" = None) -> gr.Blocks:
    """Build the page and the API of a session manager; see `Server`.

    Args:
        manager: generates the music.
        about: the model card, as Markdown.
        library: gives what finds music that is alike; without it, neither the page nor the API can.
    """
    likeness = None if library is None else Likeness(manager, library)
    gr.set_static_paths([SAMPLES, LANGUAGES])
    with Blocks(title="Music AR", analytics_enabled=False, delete_cache=(FILES_LIVE_S, FILES_LIVE_S)) as app:
        page = Page(manager, about, likeness)
        page.layout()
        page.bind(app)
        Api(manager, finds_similar=likeness is not None).layout()
        if likeness is not None:
            likeness.layout_api()
    return app


class Server:
    """Serves an app until `stop`.

    Args:
        app: from `build_app`.
        manager: that the app was built with.
        options: how to serve.

    Attributes:
        address: of the page.
        jobs: the queue of the app.
    """

    def __init__(self, app: gr.Blocks, manager: SessionManager, options: Options):
        self._app, self._manager, self._options = app, manager, options
        self._conversations = Conversations(manager)
        self._loop: asyncio.AbstractEventLoop | None = None
        # One that is out of the queue runs for a while; whoever joins is refused by `Joins` before this limit is met.
        most = _MAX_QUEUES * options.queue_size
        app.queue(max_size=most, default_concurrency_limit=4, api_open=False)
        self.jobs = Jobs(app)
        manager.others_wait = self.jobs.waiting_for_device
        with redirect_stdout(sys.stderr):  # Gradio announces things in its own way
            _, self.address, shared = self._launch()
        self._app.server.config.ws_max_size = MAX_TIMELINE_BYTES  # read anew for each connection
        if shared:
            options.addresses.allow(shared)
            self.address = f"{self.address} and {shared}"

    @property
    def healthy(self) -> bool:
        """Whether jobs that wait will be done."""
        return self.jobs.alive

    def stop(self) -> None:
        """End all runs, tell their clients why, and stop serving."""
        self._manager.stopping = True
        loop = self._loop
        if loop is not None:
            loop.call_soon_threadsafe(self._conversations.stop)
        if loop is not None and self.healthy:
            with suppress(TimeoutError):
                asyncio.run_coroutine_threadsafe(self.jobs.refuse_all(STOPPING), loop).result(_SECONDS_TO_FINISH)
            end_s = time.monotonic() + _SECONDS_TO_FINISH
            while self.jobs.running() and time.monotonic() < end_s:
                time.sleep(0.05)
            time.sleep(0.2)  # the last messages leave
            loop.call_soon_threadsafe(self._app.app.stop_event.set)
        self._app.close(verbose=False)

    def _launch(self) -> tuple[Any, str, str]:
        options = self._options
        check: Any = Passwords(options.passwords).check if options.passwords else None  # Gradio awaits it
        return self._app.launch(
            server_name=options.host,
            server_port=options.port,
            root_path=options.root_path.rstrip("/") or None,
            auth=check,
            auth_message="Enter the name and the password that you were given.",
            share=options.share,
            mcp_server=options.mcp,
            inbrowser=options.open,
            app_kwargs={"lifespan": self._lifespan},
            prevent_thread_lock=True,
            theme=_theme(),
            css=(Path(__file__).parent / "page.css").read_text(encoding="utf-8"),
            max_file_size=MAX_PROMPT_BYTES,
            state_session_capacity=MAX_SESSIONS,  # Gradio keeps 0.1 MB per session
            footer_links=["api"],  # by default there is a link to Gradio's own site
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,  # otherwise Gradio looks for Node.js to render pages on the server
            quiet=True,
        )

    @asynccontextmanager
    async def _lifespan(self, served: Any) -> AsyncIterator[None]:
        """Put the guard before everything, and watch the queue, while the server runs."""
        self._loop = asyncio.get_running_loop()
        options, health = self._options, Health(self.jobs, self._options.model)
        joins = Joins(self._app, self.jobs, options.queue_size)
        path = options.root_path.rstrip("/") if options.root_path.startswith("/") else ""
        served.middleware_stack = Guard(
            served.middleware_stack,
            options.addresses,
            joins,
            path,
            options.mcp,
            health.report,
            ConversationRoutes(self._conversations),
            functools.partial(_is_logged_in, served),
        )
        watching = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watching.cancel()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_SECONDS_BETWEEN_CHECKS)
            self._manager.forget_left()
            self._conversations.forget_old()
            dropped = await self.jobs.drop_unheard()
            if dropped:
                LOG.info("dropped jobs that no client listened to: %d", dropped)


def _is_logged_in(served: Any, connection: HTTPConnection) -> bool:
    """Whether a request carries the cookie that Gradio's app gives to those who log in, or needs none."""
    names = (f"access-token-{served.cookie_id}", f"access-token-unsecure-{served.cookie_id}")
    return served.auth is None or any(connection.cookies.get(name) in served.tokens for name in names)


def _theme() -> Base:
    theme = Base(
        primary_hue="indigo",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return theme.set(button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700")
