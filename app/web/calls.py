"""What the handlers of the page and the API share: session names, errors in words, download folders, the queue."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from app.web.settings import WebError
from music_ar import GenerationError, SamplingError

DEVICE: dict[str, Any] = {"concurrency_id": "device", "concurrency_limit": 4}
"""Options of an event that generates music: all of these share one queue, and as many run at once, in turns."""


def session_name(request: gr.Request) -> str:
    """The name of the session that a call belongs to: one for each tab or client.

    Gradio's MCP server is one client for all assistants, so each of its calls has a session of its own.
    """
    shared = request.headers.get("x-gradio-user") == "mcp"
    return secrets.token_hex(8) if shared or not request.session_hash else str(request.session_hash)


def download_folder() -> Path:
    """A new folder for one download, where Gradio deletes files after a while."""
    folder = Path(get_upload_folder()) / secrets.token_hex(16)
    folder.mkdir(parents=True)
    return folder


@contextmanager
def errors_in_words() -> Iterator[None]:
    """Show errors that the user can fix. Any other error is a bug and propagates."""
    try:
        yield
    except (WebError, GenerationError, SamplingError) as error:
        raise gr.Error(str(error), print_exception=False) from error


def uploaded_file(value: Any) -> tuple[bytes | None, str]:
    """Content and name of an uploaded file.

    Raises:
        WebError: it is something else.
    """
    if value is None:
        return None, ""
    path = Path(value["path"])
    try:
        return path.read_bytes(), str(value.get("orig_name") or path.name)
    except OSError as error:
        raise WebError("the prompt is gone: upload it again") from error
