"""Short messages over the page. Gradio reads them as HTML, and they may quote names from files and links."""

import html
from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr

from app.web.calls import errors_in_words

_SHOWN_S = 20
_MAX_LENGTH = 400


def warn(message: str) -> None:
    """Show a warning; only in an event that passes through Gradio's queue."""
    gr.Warning(_as_html(message), duration=_SHOWN_S)


@contextmanager
def errors_in_toasts() -> Iterator[None]:
    """Show errors that the user can fix; only in an event that passes through Gradio's queue."""
    try:
        with errors_in_words():
            yield
    except gr.Error as error:
        raise gr.Error(_as_html(error.message), duration=_SHOWN_S, print_exception=False) from error


def _as_html(message: str) -> str:
    short = message if len(message) <= _MAX_LENGTH else message[:_MAX_LENGTH] + " …"
    return html.escape(short[:1].upper() + short[1:], quote=False)
