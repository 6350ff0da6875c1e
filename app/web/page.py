"""The page: its controls, and which handlers their events have. It makes no requests to other servers."""

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import gradio as gr

from app.web.api import LICENSE
from app.web.calls import DEVICE
from app.web.examples import EXAMPLES
from app.web.export import FileKind
from app.web.likeness import Likeness
from app.web.manager import SessionManager
from app.web.music_events import MusicEvents
from app.web.player import player
from app.web.prompt_events import NO_PROMPT, PROMPT_CONTROLS, PromptEvents, cost_in_words
from app.web.settings import AUTO, MAX_CHOICES, MAX_VARIATIONS, SAMPLING, Settings, sampling_help
from app.web.wish_controls import WISHED, WishControls
from music_ar import SamplingOptions

_HERE = Path(__file__).parent
LANGUAGES = _HERE / "languages"
SAMPLES = Path(str(resources.files("music_ar"))) / "audio" / "samples"
_DOWNLOADS: dict[FileKind, str] = {"mid": "MIDI", "wav": "WAV", "mp3": "MP3", "zip": "ZIP (all)"}
_PROMPT_TYPES = [".mid", ".midi", ".kar", ".rmi"]
# Options of events that are answered at once and are not part of the API.
_QUICK: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
# The same for events that may fail: Gradio shows errors and warnings only of events that pass through its queue.
_MAY_FAIL: dict[str, Any] = {**_QUICK, "queue": True, "concurrency_limit": None}


class Page:
    """The page of a session manager. Call `layout`, then `bind`, inside a `gr.Blocks`.

    Args:
        manager: generates the music.
        about: the model card, as Markdown.
        likeness: says what a piece is like; None if the server cannot.
    """

    def __init__(self, manager: SessionManager, about: str, likeness: Likeness | None = None):
        self.manager, self.about, self.likeness = manager, about, likeness

    # ---------------------------------------------------------------- layout

    def layout(self) -> None:
        """Create all components."""
        gr.HTML((_HERE / "title.html").read_text(encoding="utf-8"), elem_id="title")
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=300, elem_id="settings"):
                self._layout_prompt()
                self._layout_settings()
            with gr.Column(scale=3, min_width=320, elem_id="result"):
                self._layout_actions()
                self.player = player(SAMPLES, LANGUAGES, fills_gaps=self.manager.machine.generator.config.fills_gaps)
                self._layout_downloads()
                if self.likeness is not None:
                    self.likeness.layout()
        with gr.Accordion("About the model: data, limits, license", open=False, elem_id="about"):
            gr.Markdown(f"{LICENSE}\n\n{self.about}")
        self.controls = {
            "seconds": self.seconds,
            "latents": self.latents,
            "variations": self.variations,
            "choices": self.choices,
            **self.sampling,
            **self.wishes.components,
            "seed": self.seed,
            "continuation_only": self.continuation_only,
            "start_s": self.start_s,
            "end_s": self.end_s,
            "prompt": self.prompt_name,
        }
        self.prompt_parts = [
            self.example, self.file, self.prompt_box, self.player, self.prompt_name, self.start_s, self.end_s
        ]  # fmt: skip
        self.settable = [self.controls[name] for name in self.controls if name not in PROMPT_CONTROLS]
        self.settable += self.prompt_parts
        self.buttons = [self.status, self.stop, self.extend, self.undo, *self.downloads.values()]
        self.result = [self.player, *self.buttons]

    def _layout_actions(self) -> None:
        with gr.Row(elem_id="actions"):
            self.generate = gr.Button("Generate", variant="primary", elem_id="generate", min_width=130)
            self.stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop", min_width=80)
            self.extend = gr.Button("Extend", interactive=False, elem_id="extend", min_width=80)
            self.undo = gr.Button("Undo", interactive=False, elem_id="undo", min_width=80)
        self.status = gr.Markdown("", elem_id="status")
        self.wait_timer = gr.Timer(2, active=False)  # asks for the place in the queue

    def _layout_prompt(self) -> None:
        self.example = gr.Dropdown([NO_PROMPT, *EXAMPLES], value=NO_PROMPT, label="Begin with", elem_id="example")
        self.file = gr.File(label="… or your own MIDI file", file_types=_PROMPT_TYPES, height=140, elem_id="file")
        self.prompt_name = gr.Textbox("", visible=False)
        with gr.Row(visible=False) as self.prompt_box:
            self.start_s = gr.Number(0, label="From (s)", min_width=90, elem_id="start")
            self.end_s = gr.Number(None, label="To (s)", min_width=90, elem_id="end")

    def _layout_settings(self) -> None:
        most, default = self.manager.machine.most_latents, Settings()
        with gr.Row():
            self.seconds = gr.Number(default.seconds, label="Length (s)", min_width=100, elem_id="seconds")
            self.variations = gr.Slider(
                1, MAX_VARIATIONS, value=default.variations, step=1, label="Variations", min_width=150
            )
        self.latents = gr.Slider(
            AUTO,
            most,
            value=AUTO,
            step=max(1, most // 32),
            label="Speed ↔ coherence (0: auto)",
            info="Left plays sooner, right keeps the thread of the music for longer.",
            elem_id="latents",
        )
        self.cost = gr.Markdown(cost_in_words(self.manager.machine, default), elem_id="cost")
        self.cost_timer = gr.Timer(2, active=False)  # asks again until the chosen number of variations has been timed
        self.wishes = WishControls(self.manager)
        self.wishes.layout()
        with gr.Accordion("More settings", open=False, elem_id="more"):
            self.seed = gr.Textbox("", label="Seed (empty: random)", elem_id="seed", max_lines=1)
            self.more_s = gr.Number(30, label="Seconds that Extend and Continue add", elem_id="more-seconds")
            self.choices = gr.Slider(
                1,
                MAX_CHOICES,
                value=Settings().choices,
                step=1,
                label="Choices for each phrase",
                info="More bring the opening back more often, and take longer.",
                elem_id="choices",
            )
            self.continuation_only = gr.Checkbox(False, label="Continuation only (leave out the prompt)")
            self.sampling = _sampling_sliders()
            self.load = gr.UploadButton("Load settings (settings.json)", file_types=[".json"], size="sm")

    def _layout_downloads(self) -> None:
        with gr.Row(elem_id="downloads"):
            self.downloads: dict[FileKind, gr.Button] = {
                kind: gr.Button(label, interactive=False, elem_id=f"download-{kind}", size="sm", min_width=60)
                for kind, label in _DOWNLOADS.items()
            }
        self.saved = gr.DownloadButton("Save", elem_id="saved")

    # ---------------------------------------------------------------- events

    def bind(self, app: gr.Blocks) -> None:
        """Connect the components to the handlers."""
        self.music = MusicEvents(self.manager, app, list(self.controls))
        self.prompt = PromptEvents(self.manager, self.wishes, list(self.controls))
        app.load(None, None, None, js=(_HERE / "page.js").read_text(encoding="utf-8"))
        self._bind_runs()
        self._bind_takes()
        self._bind_prompt()
        self._bind_answers()
        self.wishes.bind()
        for changed in (self.latents.change, self.variations.change, self.choices.change, self.cost_timer.tick):
            self._then_cost(changed)
        self._bind_downloads()
        if self.likeness is not None:
            self.likeness.bind(self)
        settings = self.load.upload(self.prompt.on_settings_file, self.load, self.settable, **_MAY_FAIL)
        self._then_prompt(settings.then)
        self._then_prompt(app.load(self.prompt.on_open, None, self.settable, **_MAY_FAIL).then)
        app.unload(self.music.on_leave)

    def _bind_answers(self) -> None:
        """Tell the player the settings that answers of a duet are made with."""
        settings = {"latents": self.latents, **self.sampling}
        detail = f"{{detail: [{list(settings)}, values]}}"
        js = f"(...values) => {{ window.dispatchEvent(new CustomEvent('music-ar-settings', {detail})); }}"
        for control in settings.values():
            control.change(None, list(settings.values()), None, js=js, api_visibility="private")

    def _bind_runs(self) -> None:
        options: dict[str, Any] = {
            **DEVICE,
            "outputs": self.result,
            "api_visibility": "private",
            "show_progress": "minimal",
            "show_progress_on": self.status,
        }
        asked = (self.player.begin, self.player.go_on, self.player.fill, self.player.redo)
        for start in (self.generate.click, *asked):
            start(self.music.on_press, None, [self.stop, self.wait_timer], **_QUICK)
        runs = [
            self.generate.click(self.music.on_generate, list(self.controls.values()), **options),
            self.player.begin(self.music.on_begin, list(self.controls.values()), **options),
            self.player.go_on(self.music.on_go_on, self.more_s, **options),
            self.player.fill(self.music.on_fill, None, **options),
            self.player.redo(self.music.on_redo, None, **options),
        ]
        for run in runs:
            run.failure(self.music.on_failure, None, self.result, **_QUICK)
        self.wait_timer.tick(self.music.on_wait, None, [self.player, self.status, self.wait_timer], **_QUICK)
        self.stop.click(self.music.on_stop, None, self.result, **_QUICK)
        # A separate event, because it waits for the chunk in progress. It also takes waiting requests out of the queue.
        self.stop.click(None, cancels=runs, **_QUICK)

    def _bind_takes(self) -> None:
        self.undo.click(self.music.on_undo, None, self.result, **_MAY_FAIL)
        # By default Gradio drops an event while the previous one is still in flight.
        self.player.choose(self.music.on_choose, None, self.buttons, trigger_mode="multiple", **_QUICK)
        self.player.adopt(self.music.on_adopt, None, self.buttons, trigger_mode="multiple", **_MAY_FAIL)

    def _bind_downloads(self) -> None:
        for kind, button in self.downloads.items():
            written = button.click(
                self.music.on_download(kind), None, self.saved, api_visibility="private", show_progress_on=self.status
            )
            click = "() => document.querySelector('#saved').click()"
            written.success(None, None, None, js=click, api_visibility="private")

    def _bind_prompt(self) -> None:
        for changed in (self.file.upload, self.file.clear):
            self._then_prompt(changed(self.prompt.on_file, self.file, self.prompt_parts, **_MAY_FAIL).then)
        self._then_prompt(self.example.input(self.prompt.on_example, self.example, self.prompt_parts, **_QUICK).then)
        self._then_prompt(self.player.played(self.prompt.on_played, None, self.prompt_parts, **_MAY_FAIL).then)
        part = [self.start_s, self.end_s]
        self.player.crop(self.prompt.on_crop, None, part, trigger_mode="multiple", **_QUICK)
        for limit in part:
            limit.input(self.prompt.on_typing, part, self.player, trigger_mode="always_last", **_QUICK)
            for typed in (limit.blur, limit.submit):
                typed(self.prompt.on_limits, part, self.player, **_MAY_FAIL)

    def _then_prompt(self, event: Callable[..., Any]) -> None:
        """What depends on the prompt."""
        self._then_cost(event)
        if self.wishes.components:
            given = [self.wishes.components[WISHED], self.start_s, self.end_s]
            event(self.wishes.on_prompt, given, self.wishes.numbers, **_QUICK)

    def _then_cost(self, event: Callable[..., Any]) -> None:
        event(
            self.prompt.on_cost, [self.latents, self.variations, self.choices], [self.cost, self.cost_timer], **_QUICK
        )


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
