"""What the handlers of the page and of the API share: whose call it is, errors in words, files, the queue."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from app.web.settings import WebError
from music_ar import GenerationError, SamplingError

DEVICE: dict[str, Any] = {"concurrency_id": "device", "concurrency_limit": 1}
"""Options of an event that generates music: there is one queue for all of them."""


def session_name(request: gr.Request) -> str:
    """The name of the session that a call belongs to: one for each tab or client."""
    return str(request.session_hash or secrets.token_hex(8))


def download_folder() -> Path:
    """A new folder for one download, among those that Gradio deletes after a while."""
    folder = Path(get_upload_folder()) / secrets.token_hex(16)
    folder.mkdir(parents=True)
    return folder


@contextmanager
def errors_in_words() -> Iterator[None]:
    """Show errors that the person can mend; any other error is a fault of ours and stays one."""
    try:
        yield
    except (WebError, GenerationError, SamplingError) as error:
        raise gr.Error(str(error), print_exception=False) from error
