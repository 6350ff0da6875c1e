"""The web page: give it a few bars, hear it go on. `app.studio` does the work, `app/player/` shows and plays it.

Everything is served from this machine: the page asks no other for anything. The API that `gradio_client` sees is
`generate`, `continue` and `info`; what else the page does is private.
"""

import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported

import gradio as gr
from gradio.themes import Base
from gradio.utils import get_upload_folder

from app.web.session import (
    AUTO,
    MAX_PROMPT_BYTES,
    MAX_SECONDS,
    MAX_SESSIONS,
    MAX_VARIATIONS,
    Session,
    Settings,
    Studio,
    StudioError,
    Take,
    write_file,
)
from music_ar import Generator, Performance
from music_ar.decoding.sampling import SamplingError
from music_ar.generator import GenerationError

APP = Path(str(resources.files("app"))) / "web"
SAMPLES = Path(str(resources.files("music_ar"))) / "audio" / "samples"
NO_PROMPT = "Nothing: a new piece"
FILES_LIVE_S = 3600
DEVICE: dict[str, Any] = {"concurrency_id": "device", "concurrency_limit": 1}
QUICK: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
WARNING = (
    "The model may repeat what it was trained on. Before you publish a piece, compare it with MAESTRO's. "
    "Its weights are under CC BY-NC-SA 4.0: name the source, no commercial use, share alike. "
    "The piano: Salamander Grand Piano V3 by Alexander Holm, CC BY 3.0."
)
CSS = """
.gradio-container { max-width: 1500px !important; margin: 0 auto !important; }
:root { --body-text-color-subdued: #586479; }
.dark { --body-text-color-subdued: #a3afc2; }
.player { --prompt-note: #64748b; --made-note: #4f46e5; --sounding-note: #c2410c; }
.dark .player { --prompt-note: #94a3b8; --made-note: #a5b4fc; --sounding-note: #fdba74; }
#title h1 { margin: 4px 0 0 0; }
#title p { margin: 0; color: var(--body-text-color-subdued); }
#cost p, #status p { font-size: 14px; margin: 0; }
#status { min-height: 44px; }
#saved { display: none; }
footer .divider { display: none; }
#extend, #undo { align-self: flex-end; margin-bottom: 6px; }
@media (min-width: 900px) { #result { position: sticky; top: 8px; } }
"""


def build_app(generator: Generator | Studio, *, about: str = "") -> gr.Blocks:
    """The page for a generator; `serve` shows it.

    Args:
        generator: makes all music; or a studio that has one and was warmed up.
        about: the model card, as Markdown.
    """
    studio = generator if isinstance(generator, Studio) else Studio(generator)
    gr.set_static_paths([SAMPLES])
    with gr.Blocks(title="Music AR", analytics_enabled=False, delete_cache=(FILES_LIVE_S, FILES_LIVE_S)) as app:
        _page(app, studio, about)
        _api(studio)
    return app


def serve(app: gr.Blocks, *, queue_size: int = 20, **launch: Any) -> str:
    """Serves the page, and returns its address if told not to block (`prevent_thread_lock`)."""
    # Gradio would look for Node.js to render pages on the server, and link to its own site.
    app.queue(max_size=queue_size, default_concurrency_limit=4)
    _, address, _ = app.launch(
        theme=Base(
            primary_hue="indigo",
            neutral_hue="slate",
            font=["system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ).set(button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700"),
        css=CSS,
        max_file_size=MAX_PROMPT_BYTES,
        state_session_capacity=MAX_SESSIONS,  # Gradio keeps 0.1 MB of each
        footer_links=["api"],
        ssr_mode=False,
        quiet=True,
        **launch,
    )
    return address


def example_prompts() -> list[Path]:
    """The MIDI files that a person can begin with."""
    return sorted((APP / "prompts").glob("*.mid"))


def _player(kind: str, label: str, hint: str) -> gr.HTML:
    folder = APP / "player"
    # As props they would be missing where the player is first shown together with new music.
    html = Template((folder / "player.html").read_text())
    return gr.HTML(
        shown_prompt(Session(), Settings()) if kind == "prompt" else shown_take(Session()),
        html_template=html.substitute(
            kind=kind, label=label, hint=hint, samples=f"gradio_api/file={SAMPLES.as_posix()}/"
        ),
        css_template=(folder / "player.css").read_text(),
        js_on_load=(folder / "player.js").read_text(),
        elem_id=f"{kind}-player",
    )


def _page(app: gr.Blocks, studio: Studio, about: str) -> None:
    """Lays out the page and ties its parts to the studio."""
    prompts = {path.stem.replace("-", " ").capitalize(): path for path in example_prompts()}
    default = Settings()

    gr.Markdown("# Music AR\nGive it a few bars of piano, hear it go on.", elem_id="title")
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=320):
            example = gr.Dropdown([NO_PROMPT, *prompts], value=NO_PROMPT, label="Begin with", elem_id="example")
            file = gr.File(label="… or a MIDI file of yours", file_types=[".mid", ".midi"], height=140, elem_id="file")
            with gr.Group(visible=False) as prompt_box:
                prompt_player = _player("prompt", "Prompt", "Drag over the roll to choose the part to go on from.")
                with gr.Row():
                    start_s = gr.Number(0, label="From (s)", min_width=90, elem_id="start")
                    end_s = gr.Number(None, label="To (s)", min_width=90, elem_id="end")
            most = studio.most_latents
            latents = gr.Slider(
                AUTO,
                most,
                value=AUTO,
                step=max(1, most // 32),
                label="Latent budget (0: auto)",
                info="More: more coherent music, made more slowly.",
                elem_id="latents",
            )
            cost = gr.Markdown(studio.cost(AUTO), elem_id="cost")
            measured = gr.Timer(2, active=False)  # asks again until what was chosen has been measured
            with gr.Row():
                seconds = gr.Number(default.seconds, label="Length (s)", min_width=110, elem_id="seconds")
                variations = gr.Slider(1, MAX_VARIATIONS, value=1, step=1, label="Variations", min_width=170)
            with gr.Accordion("More settings", open=False):
                seed = gr.Textbox("", label="Seed (empty: a random one)", elem_id="seed", max_lines=1)
                continuation_only = gr.Checkbox(False, label="Continuation only: leave the prompt out")
                temperature = gr.Slider(
                    0,
                    2,
                    value=default.temperature,
                    step=0.05,
                    label="Temperature",
                    info="Lower: safer and plainer. Higher: wilder, with more wrong notes.",
                )
                top_p = gr.Slider(
                    0.05,
                    1,
                    value=default.top_p,
                    step=0.01,
                    label="Top-p",
                    info="Lower: what is unlikely is never played.",
                )
                top_k = gr.Slider(
                    0,
                    388,
                    value=default.top_k,
                    step=1,
                    label="Top-k (0: all)",
                    info="Only the so many likeliest events are ever drawn.",
                )
                min_p = gr.Slider(
                    0,
                    0.5,
                    value=default.min_p,
                    step=0.01,
                    label="Min-p",
                    info="Events less likely than this share of the likeliest are never drawn.",
                )
                steadiness = gr.Slider(
                    0,
                    1,
                    value=default.steadiness,
                    step=0.05,
                    label="Steadiness",
                    info="Higher: keeps to its key, its register and usual loudness. Lower: wanders.",
                )
                load = gr.UploadButton("Load settings (settings.json)", file_types=[".json"], size="sm")
            with gr.Row():
                generate = gr.Button("Generate", variant="primary", elem_id="generate", min_width=150)
                stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop", min_width=90)
        with gr.Column(scale=3, min_width=320, elem_id="result"):
            player = _player("piece", "Piece", "Space plays and pauses, ← and → go 5 seconds; click the roll to seek.")
            status = gr.Markdown("", elem_id="status")
            with gr.Row():
                more_s = gr.Number(30, label="More (s)", min_width=100)
                extend = gr.Button("Extend", interactive=False, elem_id="extend", min_width=80)
                undo = gr.Button("Undo", interactive=False, elem_id="undo", min_width=80)
            with gr.Row():
                downloads = {
                    kind: gr.Button(label, interactive=False, elem_id=f"download-{kind}", size="sm", min_width=60)
                    for kind, label in {"mid": "MIDI", "wav": "WAV", "mp3": "MP3", "zip": "ZIP of all"}.items()
                }
            saved = gr.DownloadButton("Save", elem_id="saved")
            with gr.Accordion("The model, its licence and data", open=False, elem_id="about"):
                gr.Markdown(f"{WARNING}\n\n{about}")

    controls = {
        "seconds": seconds, "latents": latents, "variations": variations, "temperature": temperature, "top_p": top_p,
        "top_k": top_k, "min_p": min_p, "steadiness": steadiness, "seed": seed, "start_s": start_s, "end_s": end_s,
        "continuation_only": continuation_only,
    }  # fmt: skip
    shown = [player, status, stop, extend, undo, *downloads.values()]

    def show(session: Session) -> tuple[Any, ...]:
        """All of `shown`, as the session is."""
        made = bool(session.takes) and not session.making
        return (
            shown_take(session),
            _status(session),
            gr.update(interactive=session.making),
            gr.update(interactive=made),
            gr.update(interactive=made and len(session.takes) > 1),
            *(gr.update(interactive=made) for _ in downloads),
        )

    def on_generate(request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        session = studio.session(_name(request))
        with plain_errors():
            settings = Settings.read(dict(zip(controls, values, strict=True)))
            for _ in studio.generate(session, settings):
                yield show(session)
            yield show(session)

    def on_extend(request: gr.Request, more: float) -> Iterator[tuple[Any, ...]]:
        session = studio.session(_name(request))
        with plain_errors():
            for _ in studio.extend(session, Settings.read({"seconds": more}).seconds):
                yield show(session)
            yield show(session)

    def on_failure(request: gr.Request) -> tuple[Any, ...]:
        return show(studio.session(_name(request)))

    def on_stop(request: gr.Request) -> tuple[Any, ...]:
        session = studio.session(_name(request))
        session.stop()
        return show(session)

    def on_undo(request: gr.Request) -> tuple[Any, ...]:
        session = studio.session(_name(request))
        with plain_errors():
            session.undo()
        return show(session)

    def on_choose(request: gr.Request, event: gr.EventData) -> None:
        studio.session(_name(request)).choose(int(event.variation), float(event.at))

    def show_prompt(session: Session) -> tuple[Any, ...]:
        end = None if session.prompt is None else round(session.prompt.duration_s, 1)
        return gr.update(visible=session.prompt is not None), shown_prompt(session, Settings()), 0, end

    def on_file(request: gr.Request, path: str | None) -> tuple[Any, ...]:
        session = studio.session(_name(request))
        session.set_prompt(None)
        chosen, kept = NO_PROMPT, None
        try:
            if path is not None:
                session.set_prompt(Path(path).read_bytes(), Path(path).name)
                chosen, kept = None, gr.skip()
        except StudioError as error:
            gr.Warning(str(error), duration=20)
        return chosen, kept, *show_prompt(session)

    def on_example(request: gr.Request, chosen: str) -> tuple[Any, ...]:
        session = studio.session(_name(request))
        session.set_prompt(prompts[chosen].read_bytes() if chosen in prompts else None, chosen)
        return gr.skip(), None, *show_prompt(session)

    def on_crop(event: gr.EventData) -> tuple[float, float]:
        return event.start, event.end

    def on_limits(request: gr.Request, start: float | None, end: float | None) -> Any:
        with plain_errors():
            return shown_prompt(studio.session(_name(request)), Settings(start_s=start or 0.0, end_s=end))

    def on_cost(request: gr.Request, budget: float, number: float) -> tuple[str, Any]:
        prompt = studio.session(_name(request)).prompt
        return studio.cost(int(budget), int(number), prompt), gr.Timer(active=not studio.knows(int(number)))

    def on_download(kind: str) -> Callable[[gr.Request], str]:
        def download(request: gr.Request) -> str:
            with plain_errors():
                return str(write_file(studio.session(_name(request)), kind, _own_folder()))

        return download

    def restored(session: Session, values: dict[str, Any]) -> list[Any]:
        """All of `settable`: the prompt and its crop, too, if it is an example or was uploaded already."""
        with plain_errors():
            settings = Settings.read(values)
        told = vars(settings) | {"seed": "" if settings.seed is None else str(settings.seed)}
        set_to = [told[name] for name in controls if name not in ("start_s", "end_s")]
        name = settings.prompt
        if name in prompts:
            session.set_prompt(prompts[name].read_bytes(), name)
        if session.prompt is None or name != session.prompt_name:
            return [*set_to, *[gr.skip()] * len(prompt_shown)]
        source = (name, None) if name in prompts else (gr.skip(), gr.skip())
        visible, _, _, end = show_prompt(session)
        limits = settings.start_s, end if settings.end_s is None else settings.end_s
        return [*set_to, *source, visible, shown_prompt(session, settings), *limits]

    def on_settings_file(request: gr.Request, path: str) -> list[Any]:
        try:
            values = dict(json.loads(Path(path).read_text()))
        except (ValueError, TypeError) as error:
            raise gr.Error("expected the settings.json of a download, got a file that is none") from error
        return restored(studio.session(_name(request)), values)

    def on_open(request: gr.Request) -> list[Any]:
        told = dict(request.query_params)
        # Without settings in the link nothing is set: on a slow line the person may have begun to choose already.
        return restored(studio.session(_name(request)), told) if told else [gr.skip()] * len(settable)

    def on_leave(request: gr.Request) -> None:
        studio.forget(_name(request))

    runs: dict[str, Any] = {
        **DEVICE, "outputs": shown, "api_visibility": "private", "show_progress": "minimal", "show_progress_on": status
    }  # fmt: skip
    allow_stop: dict[str, Any] = {"fn": lambda: gr.update(interactive=True), "outputs": stop, **QUICK}
    generate.click(**allow_stop)
    generating = generate.click(on_generate, list(controls.values()), **runs)
    extend.click(**allow_stop)
    extending = extend.click(on_extend, more_s, **runs)
    for run in (generating, extending):
        run.failure(on_failure, None, shown, **QUICK)
    stop.click(on_stop, None, shown, **QUICK)
    # On its own, because it waits for the chunk that is being made. It takes those who wait out of the queue.
    stop.click(None, cancels=[generating, extending], **QUICK)
    undo.click(on_undo, None, shown, **QUICK)
    # By default Gradio drops what comes while it still tells the server of what came before.
    player.choose(on_choose, None, None, trigger_mode="multiple", **QUICK)
    prompt_shown = [example, file, prompt_box, prompt_player, start_s, end_s]
    told: dict[str, Any] = {**QUICK, "queue": True, "concurrency_limit": None}  # warnings need the queue
    told_cost: dict[str, Any] = {**QUICK, "fn": on_cost, "inputs": [latents, variations], "outputs": [cost, measured]}
    for chosen in (file.upload, file.clear):
        chosen(on_file, file, prompt_shown, **told).then(**told_cost)
    example.input(on_example, example, prompt_shown, **QUICK).then(**told_cost)
    for changed in (latents.change, variations.change, measured.tick):
        changed(**told_cost)
    prompt_player.crop(on_crop, None, [start_s, end_s], trigger_mode="always_last", **QUICK)
    for limit in (start_s, end_s):
        limit.input(on_limits, [start_s, end_s], prompt_player, **QUICK)
    for kind, button in downloads.items():
        made = button.click(on_download(kind), None, saved, api_visibility="private", show_progress_on=status)
        made.success(None, None, None, js="() => document.querySelector('#saved').click()", api_visibility="private")
    settable = [part for name, part in controls.items() if name not in ("start_s", "end_s")]
    settable += prompt_shown
    load.upload(on_settings_file, load, settable, **QUICK).then(**told_cost)
    app.load(on_open, None, settable, **QUICK).then(**told_cost)
    app.unload(on_leave)


def _api(studio: Studio) -> None:
    """The named endpoints for programs; their components are never shown."""
    with gr.Group(visible=False):
        prompt = gr.File(label="prompt", file_types=[".mid", ".midi"])
        seconds = gr.Number(60, label="seconds")
        latents = gr.Number(AUTO, label="latents", precision=0)
        variations = gr.Number(1, label="variations", precision=0)
        temperature = gr.Number(1.0, label="temperature")
        top_p = gr.Number(0.97, label="top_p")
        steadiness = gr.Number(0.25, label="steadiness")
        seed = gr.Number(None, label="seed", precision=0)
        prompt_start = gr.Number(0.0, label="start_s")
        prompt_end = gr.Number(None, label="end_s")
        variation = gr.Number(0, label="variation", precision=0)
        progress = gr.JSON(label="progress")
        files = gr.File(label="files", file_count="multiple")
        described = gr.JSON(label="info")
        call_generate, call_continue, call_info = gr.Button(), gr.Button(), gr.Button()

    def streamed(session: Session, takes: Iterator[Take]) -> Iterator[tuple[dict[str, Any], list[str] | None]]:
        for take in takes:
            if session.making:
                yield _reported(session, take), None
        folder, take, paths = _own_folder(), session.take, []
        for number, piece in enumerate(take.pieces):
            session.choose(number)
            if len(piece):
                paths.append(str(write_file(session, "mid", folder)))
        session.choose(0)
        yield _reported(session, take), paths

    def on_generate(
        request: gr.Request,
        prompt: str | None = None,
        seconds: float = 60,
        latents: int = AUTO,
        variations: int = 1,
        temperature: float = 1.0,
        top_p: float = 0.97,
        seed: int | None = None,
        start_s: float = 0.0,
        end_s: float | None = None,
        steadiness: float = 0.25,
    ) -> Iterator[tuple[dict[str, Any], list[str] | None]]:
        """Makes pieces, from nothing or going on from a MIDI file; the last of the results has the MIDI files.

        Latents 0 stands for auto.
        """
        session = studio.session(_name(request))
        with plain_errors():
            settings = Settings(
                seconds=seconds, latents=latents, variations=variations, temperature=temperature, top_p=top_p,
                steadiness=steadiness, seed=seed, start_s=start_s, end_s=end_s,
            )  # fmt: skip
            session.set_prompt(None if prompt is None else Path(prompt).read_bytes(), Path(prompt or "").name)
            yield from streamed(session, studio.generate(session, settings))

    def on_continue(
        request: gr.Request, seconds: float = 30, variation: int = 0
    ) -> Iterator[tuple[dict[str, Any], list[str] | None]]:
        """Goes on with a variation of what this client made last."""
        session = studio.session(_name(request))
        session.choose(variation)
        with plain_errors():
            yield from streamed(session, studio.extend(session, Settings.read({"seconds": seconds}).seconds))

    def on_info() -> dict[str, Any]:
        """What this machine offers."""
        return {
            "most_latents": studio.most_latents,
            "auto": studio.cost(AUTO),
            "most_variations": MAX_VARIATIONS,
            "most_seconds": MAX_SECONDS,
            "warm": studio.warm,
            "licence": WARNING,
        }

    call_generate.click(
        on_generate,
        [prompt, seconds, latents, variations, temperature, top_p, seed, prompt_start, prompt_end, steadiness],
        [progress, files],
        api_name="generate",
        **DEVICE,
    )
    call_continue.click(on_continue, [seconds, variation], [progress, files], api_name="continue", **DEVICE)
    call_info.click(on_info, None, described, api_name="info", queue=False)


def shown_prompt(session: Session, settings: Settings) -> dict[str, Any]:
    """The prompt as the player takes it: see `player.js`."""
    prompt = Performance.empty() if session.prompt is None else session.prompt
    length = prompt.duration_s
    return {
        "piece": f"prompt {session.prompt_name} {len(prompt)} {length:.2f}",
        "kind": "prompt",
        "join": 0,
        "making": False,
        "autoplay": False,
        "start": min(settings.start_s, length),
        "end": length if settings.end_s is None else min(settings.end_s, length),
        "variations": [{"seed": None, "until": length, "notes": packed(prompt), "open": ""}] if len(prompt) else [],
    }


def shown_take(session: Session) -> dict[str, Any]:
    """The session's take as the player takes it."""
    value: dict[str, Any] = {
        "piece": 0, "kind": "piece", "join": 0, "making": session.making, "autoplay": False, "variations": []
    }  # fmt: skip
    value["message"] = session.status if session.making else "Press Generate: the piece grows here as it is made."
    if session.reading is None and not session.takes:
        return value
    take = session.reading or session.take
    value |= {
        "piece": take.piece,
        "join": take.join_s - take.from_s,
        "autoplay": session.making,
        "chosen": session.chosen,
    }
    for number, seed in enumerate(take.seeds):
        piece, final_s = take.shown(number), take.final_s[number] - take.from_s
        final = piece.onset_s < final_s
        value["variations"].append(
            {
                "seed": seed,
                "until": round(take.until_s[number] - take.from_s, 3),
                "notes": packed(piece.select(final)),
                "open": packed(piece.select(~final)),
            }
        )
    return value


def packed(piece: Performance) -> str:
    """Notes as "onset,length,pitch,velocity;", in milliseconds: what grows at its end travels as what was added."""
    onset = (piece.onset_s * 1000).round().astype(int).tolist()
    length = ((piece.offset_s - piece.onset_s) * 1000).round().astype(int).tolist()
    rows = zip(onset, length, piece.pitch.tolist(), piece.velocity.tolist(), strict=True)
    return "".join(f"{on},{held},{pitch},{velocity};" for on, held, pitch, velocity in rows)


def _status(session: Session) -> str:
    if not session.takes or session.making:
        return session.status
    return f"{session.status} [Link to these settings]({session.take.settings.link()})"


def _reported(session: Session, take: Take) -> dict[str, Any]:
    return {
        "finished": not session.making,
        "status": session.status,
        "seconds": [round(until_s, 2) for until_s in take.until_s],
        "notes": [len(piece) for piece in take.pieces],
        "seeds": list(take.seeds),
        "latents": take.latents,
    }


def _name(request: gr.Request) -> str:
    return str(request.session_hash or secrets.token_hex(8))


def _own_folder() -> Path:
    """A new folder for one download, in what Gradio clears after `FILES_LIVE_S`."""
    folder = Path(get_upload_folder()) / secrets.token_hex(16)
    folder.mkdir(parents=True)
    return folder


@contextmanager
def plain_errors() -> Iterator[None]:
    """Shows what a person can mend as it is; everything else is our own failure and stays one."""
    try:
        yield
    except (StudioError, GenerationError, SamplingError) as error:
        raise gr.Error(str(error), print_exception=False) from error
