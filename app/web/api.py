"""The HTTP API: the endpoints `/generate`, `/continue` and `/info`, for `gradio_client` and other programs."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from app.web.calls import DEVICE, download_folder, errors_in_words, session_name, uploaded_file
from app.web.export import write_file
from app.web.manager import SessionManager
from app.web.session import Revision, Session
from app.web.settings import (
    AUTO,
    MAX_CHOICES,
    MAX_SECONDS,
    MAX_VARIATIONS,
    SAMPLING,
    Extension,
    Settings,
    checked,
    sampling_help,
)
from music_ar.features.wish_options import NAMES, WISH_OPTIONS, wish_help

Result = tuple[dict[str, Any], list[str] | None]
"""Progress and, in the last result, the MIDI files."""

LICENSE = (
    "The model may repeat music that it was trained on. Before you publish a piece, compare it with MAESTRO. "
    "The weights are licensed under CC BY-NC-SA 4.0: credit the source, no commercial use, share alike. "
    "Piano samples: Salamander Grand Piano V3 by Alexander Holm, CC BY 3.0."
)
# Programs may pass these by position, so keep the order. Further sampling options are appended, then fill and wishes.
_ORDER = ("seconds", "latents", "variations", "temperature", "top_p", "seed", "start_s", "end_s", "steadiness")
_HELP = {
    "prompt": "MIDI file of piano music to continue; leave it out for a new piece. Python clients pass "
    "handle_file(path), assistants the URL of a file that this server made, or data:audio/midi;base64,...",
    "seconds": f"length of the music to generate, in seconds, from 1 to {MAX_SECONDS:g}.",
    "latents": f"latent budget: more is more coherent and slower; {AUTO} takes the most that keep ahead of playback.",
    "variations": f"number of variations to generate at once, up to {MAX_VARIATIONS}.",
    "choices": f"generate each 8-second phrase this many times, up to {MAX_CHOICES}, and keep the one that recalls the "
    "opening most.",
    "seed": "random seed of the first variation; leave it out for a random one.",
    "start_s": "start of the part of the prompt to use, in seconds.",
    "end_s": "end of that part, in seconds; leave it out for the end of the file.",
    "fill": "true makes the part of the prompt from start_s to end_s anew, joined to what comes before and after, and "
    "keeps the rest as it is; seconds then does not count. Needs a model that was trained to fill gaps.",
    "variation": "number of the variation to continue; 0 is the first.",
}


_EXTENSION = Extension().model_dump()


class Api:
    """The endpoints.

    Args:
        manager: generates the music.
        finds_similar: whether the server also has the endpoint `/similar` (`likeness`).
    """

    def __init__(self, manager: SessionManager, *, finds_similar: bool = False):
        self.manager, self.finds_similar = manager, finds_similar

    def layout(self) -> None:
        """Add the endpoints to a page. Their components are never visible."""
        names = [*_ORDER, *(name for name in SAMPLING if name not in _ORDER), "fill", *WISH_OPTIONS, "choices"]
        defaults = Settings().flat()
        with gr.Group(visible=False):
            prompt = gr.File(label="prompt", file_types=[".mid", ".midi"])
            values = [_value(name, defaults[name]) for name in names]
            more = [_number(name, value) for name, value in _EXTENSION.items()]
            results = [gr.JSON(label="progress"), gr.File(label="files", file_count="multiple")]
            info = gr.JSON(label="info")
            buttons = [gr.Button() for _ in range(3)]
        generate = _with_parameters(self.generate, {"prompt": None} | {name: defaults[name] for name in names})
        extend: Any = _with_parameters(self.extend, _EXTENSION)
        extend._mcp_type = "none"  # all assistants share one client, so "what it generated last" means nothing there
        # Without Gradio's preprocessing, which rounds numbers and fails on other values: `Settings` checks them.
        raw: dict[str, Any] = {"preprocess": False, **DEVICE}
        buttons[0].click(generate, [prompt, *values], results, api_name="generate", **raw)
        buttons[1].click(extend, more, results, api_name="continue", **raw)
        buttons[2].click(self.info, None, info, api_name="info", queue=False)

    def generate(self, request: gr.Request, values: dict[str, Any]) -> Iterator[Result]:
        """Generate piano music as MIDI files, from scratch or continuing a MIDI file.

        It takes about as long as the music lasts. The result is a pair: the progress, with length, number of notes and
        seed of each variation, and the MIDI files, one for each variation.
        """
        session = self.manager.session(session_name(request))
        with errors_in_words():
            settings = self.manager.settings(values | {"prompt": ""}, text=False)
            session.set_prompt(*uploaded_file(values["prompt"]))
            yield from _results(session, self.manager.generate(session, settings))

    def extend(self, request: gr.Request, values: dict[str, Any]) -> Iterator[Result]:
        """Continue a variation of the piano music that this client generated last.

        The result is like that of generate.
        """
        session = self.manager.session(session_name(request))
        with errors_in_words():
            chosen = checked(Extension, values, {"variations": len(session.revision.pieces)})
            session.choose(chosen.variation)
            yield from _results(session, self.manager.extend(session, chosen.seconds))

    def info(self) -> dict[str, Any]:
        """Limits and speed of this server: the most latents, variations and seconds, what it can, and the license.

        "wishes" has an object for each wish that the model takes, with its range or the names that it knows.
        """
        return {
            "most_latents": self.manager.machine.most_latents,
            "auto": self.manager.machine.cost(AUTO),
            "most_variations": MAX_VARIATIONS,
            "most_seconds": MAX_SECONDS,
            "fills_gaps": self.manager.machine.generator.config.fills_gaps,
            "finds_similar": self.finds_similar,
            "warm": self.manager.machine.warm,
            "wishes": [dataclasses.asdict(control) for control in self.manager.machine.generator.wish_controls()],
            "license": LICENSE,
        }


def _value(name: str, default: Any) -> gr.Number | gr.Checkbox | gr.Textbox:
    if name in NAMES:
        return gr.Textbox(label=name)
    return gr.Checkbox(default, label=name) if isinstance(default, bool) else _number(name, default)


def _number(name: str, default: float | None) -> gr.Number:
    whole = isinstance(default, int) or name == "seed"
    return gr.Number(default, label=name, precision=0 if whole else None)


def _with_parameters(handler: Callable[..., Iterator[Result]], defaults: dict[str, Any]) -> Callable[..., Any]:
    """Turn a handler that takes a dictionary into a function with one parameter per name, as Gradio needs it."""

    def call(request: gr.Request, *values: Any) -> Iterator[Result]:
        yield from handler(request, dict(zip(defaults, values, strict=True)))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, default=default) for name, default in defaults.items()]
    described: Any = call
    described.__name__ = handler.__name__  # that of the tool for assistants
    described.__signature__ = inspect.Signature([inspect.Parameter("request", kind), *parameters])
    texts = _HELP | sampling_help() | wish_help()
    described.__doc__ = "\n".join([f"{handler.__doc__}\n\nArgs:", *(f"    {name}: {texts[name]}" for name in defaults)])
    return described


def _results(session: Session, revisions: Iterator[Revision]) -> Iterator[Result]:
    for revision in revisions:
        if session.generating:
            yield _progress(session, revision), None
    folder, revision, paths = download_folder(), session.revision, []
    for number, piece in enumerate(revision.pieces):
        session.choose(number)
        if len(piece):
            paths.append(str(write_file(session, "mid", folder)))
    session.choose(0)
    yield _progress(session, revision), paths


def _progress(session: Session, revision: Revision) -> dict[str, Any]:
    return {
        "finished": not session.generating,
        "status": session.status,
        "seconds": [round(until_s, 2) for until_s in revision.until_s],
        "notes": [len(piece) for piece in revision.pieces],
        "seeds": list(revision.seeds),
        "latents": revision.latents,
    }
