"""The page: its controls and their event handlers. It makes no requests to other servers."""

import math
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import gradio as gr

from app.web.api import LICENCE
from app.web.calls import DEVICE, download_folder, session_name
from app.web.export import write_file
from app.web.manager import SessionManager
from app.web.player import piece_value, player, prompt_value
from app.web.saved_settings import read_settings_file
from app.web.session import Session
from app.web.settings import AUTO, MAX_VARIATIONS, SAMPLING, Settings, WebError, sampling_help
from app.web.toasts import errors_in_toasts, warn
from app.web.waiting import waiting_in_words
from music_ar import SamplingOptions

SAMPLES = Path(str(resources.files("music_ar"))) / "audio" / "samples"
_NO_PROMPT = "Nothing (a new piece)"
_DOWNLOADS = {"mid": "MIDI", "wav": "WAV", "mp3": "MP3", "zip": "ZIP (all)"}
_MOST_SILENCE_S = 2.0  # before the first note of a prompt
_PROMPT_TYPES = [".mid", ".midi", ".kar", ".rmi"]
# Options of events that are answered at once and are not part of the API.
_QUICK: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
# The same for events that may fail: Gradio shows errors and warnings only of events that pass through its queue.
_MAY_FAIL: dict[str, Any] = {**_QUICK, "queue": True, "concurrency_limit": None}


def example_prompts() -> list[Path]:
    """The MIDI files that the page offers as prompts."""
    return sorted((Path(__file__).parent / "prompts").glob("*.mid"))


class Page:
    """The page of a session manager. Call `layout`, then `bind`, inside a `gr.Blocks`.

    Args:
        manager: generates the music.
        about: the model card, as Markdown.
    """

    def __init__(self, manager: SessionManager, about: str):
        self.manager, self.about = manager, about
        self.prompts = {path.stem.replace("-", " ").capitalize(): path for path in example_prompts()}

    # ---------------------------------------------------------------- layout

    def layout(self) -> None:
        """Create all components."""
        gr.Markdown("# Music AR\nGive it a few bars of piano and hear it continue.", elem_id="title")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=320):
                self._layout_prompt()
                self._layout_settings()
                with gr.Row(elem_id="actions"):
                    self.generate = gr.Button("Generate", variant="primary", elem_id="generate", min_width=150)
                    self.stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop", min_width=90)
            with gr.Column(scale=3, min_width=320, elem_id="result"):
                self._layout_result()
        self.controls = {
            "seconds": self.seconds,
            "latents": self.latents,
            "variations": self.variations,
            **self.sampling,
            "seed": self.seed,
            "continuation_only": self.continuation_only,
            "start_s": self.start_s,
            "end_s": self.end_s,
        }
        self.prompt_parts = [
            self.example, self.file, self.prompt_box, self.prompt_player, self.start_s, self.end_s
        ]  # fmt: skip
        self.settable = [self.controls[name] for name in self.controls if name not in ("start_s", "end_s")]
        self.settable += self.prompt_parts
        self.result = [self.player, self.status, self.stop, self.extend, self.undo, *self.downloads.values()]

    def _layout_prompt(self) -> None:
        self.example = gr.Dropdown([_NO_PROMPT, *self.prompts], value=_NO_PROMPT, label="Begin with", elem_id="example")
        self.file = gr.File(label="… or your own MIDI file", file_types=_PROMPT_TYPES, height=140, elem_id="file")
        with gr.Group(visible=False) as self.prompt_box:
            hint = "Drag across the roll to select the part to continue from."
            self.prompt_player = player("prompt", "Prompt", hint, SAMPLES)
            with gr.Row():
                self.start_s = gr.Number(0, label="From (s)", min_width=90, elem_id="start")
                self.end_s = gr.Number(None, label="To (s)", min_width=90, elem_id="end")

    def _layout_settings(self) -> None:
        most = self.manager.machine.most_latents
        self.latents = gr.Slider(
            AUTO,
            most,
            value=AUTO,
            step=max(1, most // 32),
            label="Latent budget (0: auto)",
            info="More latents make the music more coherent, and slower to generate.",
            elem_id="latents",
        )
        self.cost = gr.Markdown(self.manager.machine.cost(AUTO), elem_id="cost")
        self.cost_timer = gr.Timer(2, active=False)  # asks again until the chosen number of variations has been timed
        default = Settings()
        with gr.Row():
            self.seconds = gr.Number(default.seconds, label="Length (s)", min_width=110, elem_id="seconds")
            self.variations = gr.Slider(
                1, MAX_VARIATIONS, value=default.variations, step=1, label="Variations", min_width=170
            )
        with gr.Accordion("More settings", open=False, elem_id="more"):
            self.seed = gr.Textbox("", label="Seed (empty: random)", elem_id="seed", max_lines=1)
            self.continuation_only = gr.Checkbox(False, label="Continuation only (leave out the prompt)")
            self.sampling = _sampling_sliders()
            self.load = gr.UploadButton("Load settings (settings.json)", file_types=[".json"], size="sm")

    def _layout_result(self) -> None:
        keys = '<span class="keys">Space: play or pause. ← and →: back or forward 5 seconds. </span>'
        self.player = player("piece", "Piece", f"{keys}Click the roll to jump to that point.", SAMPLES)
        self.status = gr.Markdown("", elem_id="status")
        self.wait_timer = gr.Timer(2, active=False)  # asks for the place in the queue
        with gr.Row():
            self.more_s = gr.Number(30, label="Add (s)", min_width=100)
            self.extend = gr.Button("Extend", interactive=False, elem_id="extend", min_width=80)
            self.undo = gr.Button("Undo", interactive=False, elem_id="undo", min_width=80)
        with gr.Row():
            self.downloads = {
                kind: gr.Button(label, interactive=False, elem_id=f"download-{kind}", size="sm", min_width=60)
                for kind, label in _DOWNLOADS.items()
            }
        self.saved = gr.DownloadButton("Save", elem_id="saved")
        with gr.Accordion("About the model: data, limits, licence", open=False, elem_id="about"):
            gr.Markdown(f"{LICENCE}\n\n{self.about}")

    # ---------------------------------------------------------------- events

    def bind(self, app: gr.Blocks) -> None:
        """Connect the components to the handlers."""
        self.app = app
        app.load(None, None, None, js=_read("page.js"))
        self._bind_runs()
        self._bind_prompt()
        for changed in (self.latents.change, self.variations.change, self.cost_timer.tick):
            self._then_cost(changed)
        for kind, button in self.downloads.items():
            written = button.click(
                self.on_download(kind), None, self.saved, api_visibility="private", show_progress_on=self.status
            )
            click = "() => document.querySelector('#saved').click()"
            written.success(None, None, None, js=click, api_visibility="private")
        self._then_cost(self.load.upload(self.on_settings_file, self.load, self.settable, **_MAY_FAIL).then)
        self._then_cost(app.load(self.on_open, None, self.settable, **_MAY_FAIL).then)
        app.unload(self.on_leave)

    def _bind_runs(self) -> None:
        options: dict[str, Any] = {
            **DEVICE,
            "outputs": self.result,
            "api_visibility": "private",
            "show_progress": "minimal",
            "show_progress_on": self.status,
        }
        for button in (self.generate, self.extend):
            button.click(self.on_press, None, [self.stop, self.wait_timer], **_QUICK)
        self.wait_timer.tick(self.on_wait, None, [self.player, self.status, self.wait_timer], **_QUICK)
        generating = self.generate.click(self.on_generate, list(self.controls.values()), **options)
        extending = self.extend.click(self.on_extend, self.more_s, **options)
        for run in (generating, extending):
            run.failure(self.on_failure, None, self.result, **_QUICK)
        self.stop.click(self.on_stop, None, self.result, **_QUICK)
        # A separate event, because it waits for the chunk in progress. It also takes waiting requests out of the queue.
        self.stop.click(None, cancels=[generating, extending], **_QUICK)
        self.undo.click(self.on_undo, None, self.result, **_MAY_FAIL)
        # By default Gradio drops an event while the previous one is still in flight.
        self.player.choose(self.on_choose, None, None, trigger_mode="multiple", **_QUICK)

    def _bind_prompt(self) -> None:
        for changed in (self.file.upload, self.file.clear):
            self._then_cost(changed(self.on_file, self.file, self.prompt_parts, **_MAY_FAIL).then)
        self._then_cost(self.example.input(self.on_example, self.example, self.prompt_parts, **_QUICK).then)
        self.prompt_player.crop(self.on_crop, None, [self.start_s, self.end_s], trigger_mode="multiple", **_QUICK)
        for limit in (self.start_s, self.end_s):
            part = [self.start_s, self.end_s]
            limit.input(self.on_typing, part, self.prompt_player, trigger_mode="always_last", **_QUICK)
            for typed in (limit.blur, limit.submit):
                typed(self.on_limits, part, self.prompt_player, **_MAY_FAIL)

    def _then_cost(self, event: Callable[..., Any]) -> None:
        event(self.on_cost, [self.latents, self.variations], [self.cost, self.cost_timer], **_QUICK)

    # ---------------------------------------------------------------- runs

    def on_generate(self, request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Generate; `values` are those of `controls`."""
        session = self._session(request)
        with errors_in_toasts():
            settings = self.manager.settings(dict(zip(self.controls, values, strict=True)))
            for _ in self.manager.generate(session, settings):
                yield self._shown(session)
            yield self._shown(session)

    def on_extend(self, request: gr.Request, more_s: float) -> Iterator[tuple[Any, ...]]:
        """Extend the chosen variation."""
        session = self._session(request)
        with errors_in_toasts():
            for _ in self.manager.extend(session, Settings.read({"seconds": more_s}).seconds):
                yield self._shown(session)
            yield self._shown(session)

    def on_press(self) -> tuple[Any, Any]:
        """Let the user stop the run while it waits, and ask for its place in the queue."""
        return gr.update(interactive=True), gr.Timer(active=True)

    def on_wait(self, request: gr.Request) -> tuple[Any, ...]:
        """Show the place in the queue, and ask again while there is one."""
        name = session_name(request)
        text = waiting_in_words(self.app._queue, self.manager, name)
        if text is None:
            return gr.skip(), gr.skip(), gr.Timer(active=False)
        session = self.manager.session(name)
        player = gr.skip() if session.revisions else piece_value(session) | {"message": text}
        return player, text, gr.skip()

    def on_failure(self, request: gr.Request) -> tuple[Any, ...]:
        """Show what there is so far after an error."""
        return self._shown(self._session(request))

    def on_stop(self, request: gr.Request) -> tuple[Any, ...]:
        """Stop the run."""
        session = self._session(request)
        session.stop()
        return self._shown(session)

    def on_undo(self, request: gr.Request) -> tuple[Any, ...]:
        """Return to the previous revision."""
        session = self._session(request)
        with errors_in_toasts():
            session.undo()
        return self._shown(session)

    def on_choose(self, request: gr.Request, event: gr.EventData) -> None:
        """Choose a variation in the player."""
        self._session(request).choose(int(event.variation), float(event.at))

    def on_download(self, kind: str) -> Callable[[gr.Request], str]:
        """Return the handler that writes a file of this kind."""

        def download(request: gr.Request) -> str:
            with errors_in_toasts():
                return str(write_file(self._session(request), kind, download_folder()))

        return download

    # ---------------------------------------------------------------- prompt and settings

    def on_file(self, request: gr.Request, path: str | None) -> tuple[Any, ...]:
        """Use an uploaded file as the prompt, or none if it was removed or is unusable."""
        session = self._session(request)
        session.set_prompt(None)
        example, file = _NO_PROMPT, None
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
            return (gr.skip(),) * len(self.prompt_parts)
        session.set_prompt(self.prompts[chosen].read_bytes() if chosen in self.prompts else None, chosen)
        return gr.skip(), None, *_prompt_update(session)

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

    def on_cost(self, request: gr.Request, latents: float, variations: float) -> tuple[str, Any]:
        """Show the speed and quality of a latent budget; ask again while they are being measured."""
        machine, prompt = self.manager.machine, self._session(request).prompt
        try:
            settings = self.manager.settings({"latents": latents, "variations": variations})
        except WebError as error:
            return str(error), gr.Timer(active=False)
        cost = machine.cost(settings.latents, settings.variations, prompt)
        return cost, gr.Timer(active=not machine.knows(settings.variations))

    def on_settings_file(self, request: gr.Request, path: str) -> list[Any]:
        """Restore the settings of a downloaded settings.json."""
        with errors_in_toasts():
            return self._restored(self._session(request), read_settings_file(Path(path)))

    def on_open(self, request: gr.Request) -> list[Any]:
        """Restore the settings of a link."""
        values = dict(request.query_params)
        if not values:  # a plain address sets nothing: on a slow connection the user may have begun to choose already
            return [gr.skip()] * len(self.settable)
        with errors_in_toasts():
            return self._restored(self._session(request), values)

    def on_leave(self, request: gr.Request) -> None:
        """Stop when the tab is closed, or about to be: one may still be asked, and stay."""
        self.manager.leave(session_name(request))

    # ---------------------------------------------------------------- values of components

    def _session(self, request: gr.Request) -> Session:
        return self.manager.session(session_name(request))

    def _shown(self, session: Session) -> tuple[Any, ...]:
        """Values of `result`."""
        idle = bool(session.revisions) and not session.generating
        link = f" [Link to these settings]({session.revision.settings.link()})" if idle else ""
        return (
            piece_value(session),
            session.status + link,
            gr.update(interactive=session.generating),
            gr.update(interactive=idle),
            gr.update(interactive=idle and len(session.revisions) > 1),
            *(gr.update(interactive=idle) for _ in self.downloads),
        )

    def _restored(self, session: Session, values: dict[str, Any]) -> list[Any]:
        """Values of `settable`, including the prompt if it is an example or the file already uploaded."""
        settings = self.manager.settings(values)
        flat = settings.flat() | {"seed": "" if settings.seed is None else str(settings.seed)}
        chosen = [flat[name] for name in self.controls if name not in ("start_s", "end_s")]
        name = settings.prompt
        if name in self.prompts:
            session.set_prompt(self.prompts[name].read_bytes(), name)
        if session.prompt is None or name != session.prompt_name:
            if name:
                warn(_missing_prompt(settings))
            return [*chosen, *[gr.skip()] * len(self.prompt_parts)]
        try:
            session.cropped_prompt(settings)
        except WebError as error:
            warn(f"{error}. The whole prompt is selected.")
            settings = settings.model_copy(update={"start_s": 0.0, "end_s": None})
        source = (name, None) if name in self.prompts else (gr.skip(), gr.skip())
        visible, _, _, end_s = _prompt_update(session)
        part = settings.start_s, end_s if settings.end_s is None else settings.end_s
        return [*chosen, *source, visible, prompt_value(session, settings), *part]


def _read(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _missing_prompt(settings: Settings) -> str:
    """What to do about settings for a prompt that the page does not have."""
    name = settings.prompt.encode(errors="replace").decode()[:100]  # JSON may hold half characters
    whole = settings.start_s == 0 and settings.end_s is None
    end = "the end" if settings.end_s is None else f"{settings.end_s:g} s"
    part = "" if whole else f", and select the part from {settings.start_s:g} s to {end}"
    return f"These settings belong to your own file “{name}”, which they do not contain. Upload it{part}."


def _sampling_sliders() -> dict[str, gr.Slider]:
    """One slider for each field of `SamplingOptions`, with its label, range, default and help text."""
    texts, default = sampling_help(), SamplingOptions()
    return {
        name: gr.Slider(
            option.metadata["minimum"],
            option.metadata["maximum"],
            value=getattr(default, name),
            step=option.metadata["step"],
            label=option.metadata["label"],
            info=texts[name][:1].upper() + texts[name][1:],
        )
        for name, option in SAMPLING.items()
    }


def _prompt_update(session: Session) -> tuple[Any, ...]:
    """Values of `prompt_parts` after the first two, with the whole prompt selected but for a long silence before it."""
    if session.prompt is None:
        return gr.update(visible=False), prompt_value(session, Settings()), 0, None
    first_s, end_s = session.prompt.onset_s[0], round(session.prompt.duration_s, 1)
    start_s = math.floor(10 * first_s) / 10 if first_s > _MOST_SILENCE_S else 0.0
    return gr.update(visible=True), prompt_value(session, Settings(start_s=start_s)), start_s, end_s
