"""What the page does when music is asked for, stopped, chosen or downloaded."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlencode

import gradio as gr

from app.web.calls import download_folder, session_name
from app.web.examples import EXAMPLES
from app.web.export import FileKind, write_file
from app.web.manager import SessionManager
from app.web.player import piece_value
from app.web.session import Revision, Session
from app.web.settings import MAX_SECONDS, Settings, WebError
from app.web.takes import notes_for_link, read_take
from app.web.toasts import errors_in_toasts
from app.web.waiting import waiting_in_words
from app.web.wish_controls import only_wished
from music_ar import Performance


class MusicEvents:
    """Handlers of the events of a page.

    Args:
        manager: generates the music.
        app: has the queue in which requests wait.
        controls: names of the settings, in the order in which the page sends their values.
    """

    def __init__(self, manager: SessionManager, app: gr.Blocks, controls: list[str]):
        self._manager, self._app, self._controls = manager, app, controls

    # ---------------------------------------------------------------- runs

    def on_generate(self, request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Generate; `values` are those of the controls."""
        session = self._session(request)
        with errors_in_toasts():
            given = only_wished(dict(zip(self._controls, values, strict=True)))
            find_prompt(session, given.pop("prompt") or "")
            yield from self._growing(session, self._manager.generate(session, self._manager.settings(given)))

    def on_begin(self, request: gr.Request, event: gr.EventData, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Generate from a part of the prompt that was chosen in the timeline."""
        given = dict(zip(self._controls, values, strict=True)) | {"start_s": event.start, "end_s": event.end}
        yield from self.on_generate(request, *given.values())

    def on_go_on(self, request: gr.Request, event: gr.EventData, more_s: float) -> Iterator[tuple[Any, ...]]:
        """Let the model go on at the end of a take, or where it is cut."""
        session = self._session(request)
        with errors_in_toasts():
            session.adopt(self._take(event))
            at_s = None if event.until is None else float(event.until)
            yield from self._growing(session, self._manager.extend(session, _length(more_s), at_s))

    def on_redo(self, request: gr.Request, event: gr.EventData) -> Iterator[tuple[Any, ...]]:
        """Make a take again, from the same prompt and with the same settings, but with another seed."""
        session = self._session(request)
        with errors_in_toasts():
            session.adopt(self._take(event))
            revision, chosen = session.revision, session.chosen
            length_s = min(max(1.0, revision.until_s[chosen] - revision.join_s), MAX_SECONDS)
            again = {"seconds": length_s, "seed": None, "variations": 1, "start_s": 0.0, "end_s": None, "fill": False}
            settings = revision.settings.model_copy(update=again)
            prompt = revision.pieces[chosen].crop(0, revision.join_s) if revision.join_s else Performance.empty()
            yield from self._growing(session, self._manager.generate(session, settings, prompt))

    def on_fill(self, request: gr.Request, event: gr.EventData) -> Iterator[tuple[Any, ...]]:
        """Make a part of a take anew, joined to what comes before and after."""
        session = self._session(request)
        with errors_in_toasts():
            session.adopt(self._take(event))
            revision, chosen = session.revision, session.chosen
            part = Settings.read({"start_s": event.start, "end_s": event.end})
            start_s, end_s = part.start_s + revision.from_s, (part.end_s or 0.0) + revision.from_s
            filled = {"seed": None, "variations": 1, "start_s": start_s, "end_s": end_s, "fill": True}
            settings = revision.settings.model_copy(update=filled)
            yield from self._growing(session, self._manager.generate(session, settings, revision.pieces[chosen]))

    def _growing(self, session: Session, revisions: Iterator[Revision]) -> Iterator[tuple[Any, ...]]:
        for _ in revisions:
            yield self._shown(session)
        yield self._shown(session)

    def on_press(self) -> tuple[Any, Any]:
        """Let the user stop the run while it waits, and ask for its place in the queue."""
        return gr.update(interactive=True), gr.Timer(active=True)

    def on_wait(self, request: gr.Request) -> tuple[Any, ...]:
        """Show the place in the queue, and ask again while there is one."""
        name = session_name(request)
        text = waiting_in_words(self._app._queue, self._manager, name)
        if text is None:
            return gr.skip(), gr.skip(), gr.Timer(active=False)
        session = self._manager.session(name)
        player = gr.skip() if session.revisions or session.prompt else piece_value(session) | {"message": text}
        return player, text, gr.skip()

    def on_failure(self, request: gr.Request) -> tuple[Any, ...]:
        """Show what there is so far after an error."""
        return self._shown(self._session(request))

    def on_stop(self, request: gr.Request) -> tuple[Any, ...]:
        """Stop the run."""
        session = self._session(request)
        session.stop()
        return self._shown(session)

    def on_leave(self, request: gr.Request) -> None:
        """Stop when the tab is closed, or about to be: one may still be asked, and stay."""
        self._manager.leave(session_name(request))

    # ---------------------------------------------------------------- takes

    def on_undo(self, request: gr.Request) -> tuple[Any, ...]:
        """Return to the previous revision."""
        session = self._session(request)
        with errors_in_toasts():
            session.undo()
        return self._shown(session)

    def on_choose(self, request: gr.Request, event: gr.EventData) -> tuple[Any, ...]:
        """Choose a variation of the piece."""
        session = self._session(request)
        if session.generating or not session.revisions:
            session.choose(int(event.variation), float(event.at))
        else:
            session.show_take(str(event.take))
        return self._buttons(session)

    def on_adopt(self, request: gr.Request, event: gr.EventData) -> tuple[Any, ...]:
        """Take back music that the browser has kept."""
        session = self._session(request)
        with errors_in_toasts():
            session.adopt(self._take(event))
        return self._buttons(session)

    def on_download(self, kind: FileKind) -> Callable[[gr.Request], str]:
        """Return the handler that writes a file of this kind."""

        def download(request: gr.Request) -> str:
            with errors_in_toasts():
                return str(write_file(self._session(request), kind, download_folder()))

        return download

    # ---------------------------------------------------------------- values of components

    def _session(self, request: gr.Request) -> Session:
        return self._manager.session(session_name(request))

    def _take(self, event: gr.EventData) -> Revision:
        machine = self._manager.machine
        revision = read_take(event._data, machine.most_latents)
        if revision.latents:
            return revision
        return dataclasses.replace(revision, latents=machine.auto_budget(revision.pieces[0], 1))

    def _shown(self, session: Session) -> tuple[Any, ...]:
        """Values of the timeline and of what follows it."""
        return piece_value(session), *self._buttons(session)

    def _buttons(self, session: Session) -> tuple[Any, ...]:
        """Values of the status and of the buttons that need music."""
        idle = bool(session.revisions) and not session.generating
        link = f" [Link to these settings]({_link(session.revision)})" if idle else ""
        return (
            session.status + link,
            gr.update(interactive=session.generating),
            gr.update(interactive=idle),
            gr.update(interactive=idle and len(session.revisions) > 1),
            *(gr.update(interactive=idle) for _ in range(4)),
        )


def find_prompt(session: Session, name: str) -> None:
    """Make sure that the session has the prompt that the page shows: the server may have been restarted since.

    Raises:
        WebError: it has not, and only the user can give it again.
    """
    if session.prompt is None and name in EXAMPLES:
        session.set_prompt(EXAMPLES[name].read_bytes(), name)
    if session.prompt is None and name:
        raise WebError(
            f"the server was restarted and no longer has “{name}”. Choose it again in the list of takes, or upload it"
        )


def _length(more_s: float) -> float:
    return Settings.read({"seconds": more_s}).seconds


def _link(revision: Revision) -> str:
    """A link that restores the settings and, of a prompt of the user's own that is short, its notes."""
    settings = revision.settings
    prompt = revision.pieces[0].crop(0, revision.join_s) if revision.join_s else Performance.empty()
    notes = None if settings.prompt in EXAMPLES else notes_for_link(prompt)
    if notes is None:
        return settings.link()
    plain = settings.model_copy(update={"prompt": "", "start_s": 0.0, "end_s": None}).link()
    return f"{plain}{'&' if len(plain) > 1 else ''}{urlencode({'notes': notes})}"
