"""What a piece is like: the pieces of an index with the most similar passages, on the page and in the API.

Both have it only if the server has an encoder and an index.
"""

import functools
import html
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import gradio as gr
import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from app.console import clock
from app.web.calls import DEVICE, errors_in_words, session_name, uploaded_file
from app.web.manager import SessionManager
from app.web.session import Session
from app.web.settings import WebError, Whole, checked
from app.web.toasts import errors_in_toasts
from music_ar import Performance
from music_ar.embedding.index import PassageIndexError
from music_ar.embedding.notes import EmbeddingError
from music_ar.embedding.search import SearchError, nearest
from music_ar.model.weights import CheckpointError

if TYPE_CHECKING:
    from app.web.page import Page
    from music_ar.embedding.index import Embeds
    from music_ar.embedding.library import Library
    from music_ar.embedding.search import Match

MAX_LIKENESS_S = 3600.0
"""Longest piece to compare, in seconds."""
MAX_MATCHES = 50
_SHOWN = 5
_COLUMNS = ("Most like it", "Similarity", "Here", "There")
_PASSAGES_A_TURN = 16


class Question(BaseModel):
    """What a call of the API can choose.

    Attributes:
        count: number of pieces to name.
    """

    model_config = ConfigDict(frozen=True)

    count: Annotated[
        Whole, Field(ge=1, le=MAX_MATCHES, title="count", description=f"a whole number from 1 to {MAX_MATCHES}")
    ] = _SHOWN


class Likeness:
    """The search of one server.

    Args:
        manager: has the sessions, and lends the device.
        library: gives the encoder and the index; asked once, with the first question.
    """

    def __init__(self, manager: SessionManager, library: Callable[[], "Library"]):
        self._manager, self._open, self._opening = manager, library, threading.Lock()

    @property
    def _library(self) -> "Library":
        """The encoder and its index.

        Raises:
            WebError: they are damaged, or one is gone.
        """
        with self._opening:
            try:
                return self._opened
            except (OSError, CheckpointError, PassageIndexError) as error:
                raise WebError(f"this server cannot compare music: {error}") from error

    @functools.cached_property
    def _opened(self) -> "Library":
        return self._open()

    # ---------------------------------------------------------------- the page

    def layout(self) -> None:
        """Add the button and its answer to the page."""
        self.ask = gr.Button("What is this like?", size="sm", elem_id="likeness")
        self.answer = gr.Markdown("", elem_id="likeness-answer")

    def bind(self, page: "Page") -> None:
        """Answer the button, and take an answer back when other music is asked for or chosen."""
        player = page.player
        options: dict[str, Any] = {**DEVICE, "api_visibility": "private", "show_progress_on": self.answer}
        self.ask.click(self.on_ask, None, self.answer, **options)
        asked = (page.generate.click, page.extend.click, player.begin, player.go_on, player.fill, player.redo)
        chosen = (player.choose, player.adopt, player.played, page.example.input, page.file.upload, page.undo.click)
        for other in (*asked, *chosen):
            other(lambda: "", None, self.answer, queue=False, api_visibility="private", show_progress="hidden")

    def on_ask(self, request: gr.Request) -> str:
        """Say what the piece on the timeline is like, in Markdown."""
        session = self._manager.session(session_name(request))
        with errors_in_toasts():
            piece = shown_piece(session)
            return _in_words(self._nearest(piece, _SHOWN), self._library.index.usual)

    # ---------------------------------------------------------------- the API

    def layout_api(self) -> None:
        """Add the endpoint to a page. Its components are never visible."""
        with gr.Group(visible=False):
            piece = gr.File(label="piece", file_types=[".mid", ".midi"])
            count = gr.Number(_SHOWN, label="count", precision=0)
            result = gr.JSON(label="similar")
            button = gr.Button()
        # Without Gradio's preprocessing, which rounds numbers and fails on other values: `Question` checks them.
        raw: dict[str, Any] = {"preprocess": False, **DEVICE}
        button.click(self.similar, [piece, count], result, api_name="similar", **raw)

    def similar(self, piece: Any = None, count: Any = _SHOWN) -> dict[str, Any]:
        """Find the pieces of the training set that a MIDI file is most like, with the passages that are alike.

        Similarity is the cosine of two embeddings. "usual_similarity" tells how alike the nearest two pieces of the
        training set usually are: 5th, 50th and 95th percentile.

        Args:
            piece: MIDI file of piano music. Python clients pass handle_file(path), assistants the URL of a file that
                this server made, or data:audio/midi;base64,...
            count: number of pieces to name, up to 50.
        """
        with errors_in_words():
            asked, given = checked(Question, {"count": count}), Session()
            given.set_prompt(*uploaded_file(piece))
            if given.prompt is None:
                raise WebError("there is no piece: send a MIDI file as piece")
            matches = self._nearest(given.prompt, asked.count)
        usual = [round(float(each), 4) for each in self._library.index.usual]
        return {"usual_similarity": usual, "matches": [match.values() for match in matches]}

    def _nearest(self, piece: Performance, count: int) -> "list[Match]":
        """Search for a piece.

        Raises:
            WebError: it is too long, or has too few notes.
        """
        if piece.duration_s > MAX_LIKENESS_S:
            raise WebError(
                f"the piece is {clock(piece.duration_s)} long, and at most {clock(MAX_LIKENESS_S)} can be compared; "
                "choose a shorter one"
            )
        library = self._library
        try:
            return nearest(library.index, _InTurns(library.encoder, self._manager), piece, count)
        except (SearchError, EmbeddingError) as error:
            raise WebError(str(error)) from error


class _InTurns:
    """An encoder that has the device for a few passages at a time, so that music under way goes on.

    Args:
        encoder: the encoder.
        manager: lends the device.
    """

    def __init__(self, encoder: "Embeds", manager: SessionManager):
        self._encoder, self._manager = encoder, manager
        self.size, self.digest = encoder.size, encoder.digest

    def embed(self, pieces: Sequence[Performance]) -> np.ndarray:
        """Embed performances; see `Embeds`."""
        parts = []
        for first in range(0, len(pieces), _PASSAGES_A_TURN):
            with self._manager.guest():
                parts.append(self._encoder.embed(pieces[first : first + _PASSAGES_A_TURN]))
        return np.concatenate(parts)


def shown_piece(session: Session) -> Performance:
    """The piece on the timeline of a session: the chosen variation, or else the prompt.

    Raises:
        WebError: there is none.
    """
    if session.revisions:
        revision = session.revision
        return revision.shown(min(session.chosen, len(revision.pieces) - 1))
    if session.prompt is None:
        raise WebError("there is no piece here yet: generate one, choose a take, or choose what to begin with")
    return session.prompt


def _in_words(matches: "Sequence[Match]", usual: np.ndarray) -> str:
    lines = [_row(_COLUMNS), _row(["---"] * len(_COLUMNS))]
    for match in matches:
        here, there = _span(match.query_start_s, match.query_end_s), _span(match.start_s, match.end_s)
        lines.append(_row([_plain(str(match.piece)), f"{match.similarity:.2f}", here, there]))
    low, middle, high = usual
    note = (
        "Passages are compared as a whole, not note by note; 1 is the same. "
        f"Usual for the most similar real pieces: {middle:.2f} ({low:.2f} to {high:.2f})."
    )
    return "\n".join([*lines, "", note])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _span(start_s: float, end_s: float) -> str:
    return f"{clock(start_s)}-{clock(end_s)}"


def _plain(text: str) -> str:
    """A title as Markdown that says just that."""
    escaped = html.escape(text, quote=False)
    return "".join(f"\\{letter}" if letter in "\\`*_[]|~$" else letter for letter in escaped)
