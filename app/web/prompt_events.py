"""What the page does when a prompt or settings are chosen."""

import math
from pathlib import Path
from typing import Any

import gradio as gr

from app.web.calls import session_name
from app.web.examples import EXAMPLES
from app.web.manager import SessionManager
from app.web.player import prompt_value
from app.web.saved_settings import read_settings_file
from app.web.session import Session
from app.web.settings import Settings, WebError
from app.web.takes import unpacked
from app.web.toasts import errors_in_toasts, warn
from app.web.warmup import Machine
from app.web.wish_controls import WishControls
from music_ar import Performance

NO_PROMPT = "Nothing (a new piece)"
PROMPT_CONTROLS = ("prompt", "start_s", "end_s")
"""Settings that belong to the prompt."""
_PROMPT_PARTS = 7  # components
_MOST_SILENCE_S = 2.0  # before the first note of a prompt
_NOTES_OF_LINK = "notes from a link"


class PromptEvents:
    """Handlers of the events of a page.

    Args:
        manager: has the sessions.
        wishes: the controls for wishes.
        controls: names of the settings, in the order of the components that they are restored to; the part of the
            prompt comes last.
    """

    def __init__(self, manager: SessionManager, wishes: WishControls, controls: list[str]):
        self._manager, self._wishes = manager, wishes
        self._restored_controls = [name for name in controls if name not in PROMPT_CONTROLS]

    # ---------------------------------------------------------------- prompt

    def on_file(self, request: gr.Request, path: str | None) -> tuple[Any, ...]:
        """Use an uploaded file as the prompt, or none if it was removed or is unusable."""
        session = self._session(request)
        session.set_prompt(None)
        example, file = NO_PROMPT, None
        try:
            if path is not None:
                session.set_prompt(Path(path).read_bytes(), Path(path).name)
                example, file = None, gr.skip()
        except WebError as error:
            warn(str(error))
        return example, file, *_prompt_update(session)

    def on_example(self, request: gr.Request, chosen: str | None) -> tuple[Any, ...]:
        """Use an example as the prompt, or none."""
        session = self._session(request)
        if chosen in (None, session.prompt_name):  # Gradio also asks when the list is left as it was
            return (gr.skip(),) * _PROMPT_PARTS
        session.set_prompt(EXAMPLES[chosen].read_bytes() if chosen in EXAMPLES else None, chosen)
        return gr.skip(), None, *_prompt_update(session)

    def on_played(self, request: gr.Request, event: gr.EventData) -> tuple[Any, ...]:
        """Use what was played as the prompt, or none."""
        session = self._session(request)
        with errors_in_toasts():
            session.set_prompt(unpacked(str(event.midi)) if event.midi else None, str(event.name))
        return None if event.midi else NO_PROMPT, None, *_prompt_update(session)

    def on_crop(self, event: gr.EventData) -> tuple[float, float]:
        """Adopt the part that was selected in the roll."""
        return event.start, event.end

    def on_limits(self, request: gr.Request, start_s: float | None, end_s: float | None) -> Any:
        """Show the part that was typed in the roll."""
        session = self._session(request)
        with errors_in_toasts():
            part = Settings.read({"start_s": start_s or 0.0, "end_s": end_s})
            session.cropped_prompt(part)
        return prompt_value(session, part)

    def on_typing(self, request: gr.Request, start_s: float | None, end_s: float | None) -> Any:
        """Show the part while it is typed. Half a number may be wrong."""
        try:
            return prompt_value(self._session(request), Settings.read({"start_s": start_s or 0.0, "end_s": end_s}))
        except WebError:
            return gr.skip()

    # ---------------------------------------------------------------- settings

    def on_cost(self, request: gr.Request, latents: float, variations: float, choices: float) -> tuple[str, Any]:
        """Show the speed and quality of a latent budget; ask again while they are being measured."""
        machine, prompt = self._manager.machine, self._session(request).prompt
        try:
            settings = self._manager.settings({"latents": latents, "variations": variations, "choices": choices})
        except WebError as error:
            return str(error), gr.Timer(active=False)
        return cost_in_words(machine, settings, prompt), gr.Timer(active=not machine.knows(settings.rows))

    def on_settings_file(self, request: gr.Request, path: str) -> list[Any]:
        """Restore the settings of a downloaded settings.json."""
        with errors_in_toasts():
            return self._restored(self._session(request), read_settings_file(Path(path)))

    def on_open(self, request: gr.Request) -> list[Any]:
        """Restore the settings of a link, and the notes in it."""
        values = dict(request.query_params)
        if not values:  # a plain address sets nothing: on a slow connection the user may have begun to choose already
            return [gr.skip()] * (len(self._restored_controls) + _PROMPT_PARTS)
        session = self._session(request)
        with errors_in_toasts():
            notes = values.pop("notes", None)
            if notes is not None:
                session.set_prompt(unpacked(notes), _NOTES_OF_LINK)
                values["prompt"] = _NOTES_OF_LINK
            return self._restored(session, values)

    # ---------------------------------------------------------------- values of components

    def _session(self, request: gr.Request) -> Session:
        return self._manager.session(session_name(request))

    def _restored(self, session: Session, values: dict[str, Any]) -> list[Any]:
        """Values of the settings and the prompt, if it is an example or one that the session has already."""
        settings = self._manager.settings(values)
        flat = settings.flat() | {"seed": "" if settings.seed is None else str(settings.seed)}
        wishes = dict(zip(self._wishes.components, self._wishes.restored(settings.wishes), strict=True))
        chosen = [(flat | wishes)[name] for name in self._restored_controls]
        name = settings.prompt
        if name in EXAMPLES:
            session.set_prompt(EXAMPLES[name].read_bytes(), name)
        if session.prompt is None or name != session.prompt_name:
            if name:
                warn(_missing_prompt(settings))
            return [*chosen, *[gr.skip()] * _PROMPT_PARTS]
        try:
            session.cropped_prompt(settings)
        except WebError as error:
            warn(f"{error}. The whole prompt is selected.")
            settings = settings.model_copy(update={"start_s": 0.0, "end_s": None})
        source = (name, None) if name in EXAMPLES else (gr.skip(), gr.skip())
        visible, _, _, _, end_s = _prompt_update(session)
        part = settings.start_s, end_s if settings.end_s is None else settings.end_s
        return [*chosen, *source, visible, prompt_value(session, settings), session.prompt_name, *part]


def cost_in_words(machine: Machine, settings: Settings, prompt: Performance | None = None) -> str:
    """What the latent budget means here, as Markdown; its numbers are one click away."""
    given = settings.latents, settings.rows, prompt
    short, numbers = machine.in_short(*given).replace("**", ""), machine.cost(*given).replace("**", "")
    return short if short == numbers else f"{short}\n<details><summary>In numbers</summary>\n\n{numbers}\n\n</details>"


def _missing_prompt(settings: Settings) -> str:
    """What to do about settings for a prompt that the page does not have."""
    name = settings.prompt.encode(errors="replace").decode()[:100]  # JSON may hold half characters
    whole = settings.start_s == 0 and settings.end_s is None
    end = "the end" if settings.end_s is None else f"{settings.end_s:g} s"
    what_to_do = "Upload it." if whole else f"Upload it, and select the part from {settings.start_s:g} s to {end}."
    return f"These settings belong to your own file “{name}”, which they do not contain. {what_to_do}"


def _prompt_update(session: Session) -> tuple[Any, ...]:
    """Values of the prompt's parts after its sources: all of it is selected, but for a long silence before it."""
    if session.prompt is None:
        return gr.update(visible=False), prompt_value(session, Settings()), "", 0, None
    first_s, end_s = session.prompt.onset_s[0], round(session.prompt.duration_s, 1)
    start_s = math.floor(10 * first_s) / 10 if first_s > _MOST_SILENCE_S else 0.0
    value = prompt_value(session, Settings(start_s=start_s))
    return gr.update(visible=True), value, session.prompt_name, start_s, end_s
