"""Build the app, page and API, and serve it."""

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.themes import Base

from app.web.api import Api
from app.web.manager import MAX_SESSIONS, SessionManager
from app.web.page import SAMPLES, Page
from app.web.session import MAX_PROMPT_BYTES

FILES_LIVE_S = 3600


def build_app(manager: SessionManager, *, about: str = "") -> gr.Blocks:
    """Build the page and the API of a session manager; see `serve`.

    Args:
        manager: generates the music.
        about: the model card, as Markdown.
    """
    gr.set_static_paths([SAMPLES])
    with gr.Blocks(title="Music AR", analytics_enabled=False, delete_cache=(FILES_LIVE_S, FILES_LIVE_S)) as app:
        page = Page(manager, about)
        page.layout()
        page.bind(app)
        Api(manager).layout()
    return app


def serve(app: gr.Blocks, *, queue_size: int = 20, **launch: Any) -> str:
    """Serve the app. Return its address if `prevent_thread_lock` is among the options for `gr.Blocks.launch`.

    Args:
        app: from `build_app`.
        queue_size: number of requests that may wait for their turn.
        launch: more options for `gr.Blocks.launch`.
    """
    app.queue(max_size=queue_size, default_concurrency_limit=4)
    _, address, _ = app.launch(
        theme=_theme(),
        css=(Path(__file__).parent / "page.css").read_text(encoding="utf-8"),
        max_file_size=MAX_PROMPT_BYTES,
        state_session_capacity=MAX_SESSIONS,  # Gradio keeps 0.1 MB per session
        footer_links=["api"],  # by default there is a link to Gradio's own site
        ssr_mode=False,  # otherwise Gradio looks for Node.js to render pages on the server
        quiet=True,
        **launch,
    )
    return address


def _theme() -> Base:
    theme = Base(
        primary_hue="indigo",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return theme.set(button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700")
