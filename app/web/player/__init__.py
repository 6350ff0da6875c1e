"""The timeline and the piano of the page. This module builds what Python sends; the browser runs the modules here.

The browser receives a dictionary, `Value` in `music.js`:

    {"piece", "kind", "name", "join", "begins", "generating", "autoplay", "message", "start", "end", "chosen",
     "latents", "settings", "variations": [{"take", "seed", "until", "notes", "open", "pedals"}]}

`kind` is "prompt" or "piece". `piece` changes when another one is shown. `join` is where the prompt ends, `begins`
where the music of the run in progress begins; `start` and `end` delimit the selected part of a prompt. `take` names a
variation for good. `notes` are final, `open` may still change; both are `packed`. `pedals` are pairs of times between
which the pedal is down. All times are in seconds.

It triggers these events:

- `choose` {variation, take, at}: a variation of the piece; `at` is the page's clock
- `crop` {start, end}: a part of the prompt
- `begin` {start, end}: a piece is to be generated from this part of the prompt
- `played` {name, midi}: something that was played is the prompt, or nothing if both are empty
- `adopt`, `redo`, `go_on` {take, join, seed, latents, settings, midi}: a take from the browser's storage is to be
  shown, made again with another seed, or, with `until`, cut there and continued
- `fill`: the same with {start, end}: this part is to be made anew

`midi` is a MIDI file, compressed with zlib, in base64.
"""

from pathlib import Path
from string import Template
from typing import Any

import gradio as gr
import numpy as np

from app.web.player.bundle import script
from app.web.session import Session
from app.web.settings import Settings
from music_ar import Performance
from music_ar.midi.pedalling import unfold

_EMPTY_TEXT = "Play on the piano below, pick something to begin with, or just press Generate."
_HERE = Path(__file__).parent
_TICKS_PER_S = 1000.0


def player(samples: Path, languages: Path, *, fills_gaps: bool) -> gr.HTML:
    """The timeline and the piano as a component.

    Args:
        samples: folder of the piano samples, which the page must serve.
        languages: folder of the tables of sentences, which it must serve too.
        fills_gaps: whether the model can make a part of a piece anew.
    """
    # As properties, these would be missing when the player first appears together with new music.
    html = Template((_HERE / "player.html").read_text(encoding="utf-8")).substitute(
        samples=_served(samples), languages=_served(languages), fills=str(fills_gaps).lower()
    )
    return gr.HTML(
        piece_value(Session()),
        html_template=html,
        css_template=(_HERE / "player.css").read_text(encoding="utf-8"),
        js_on_load="const gradio = { element, props, trigger, watch };\n" + script(_HERE, "start"),
        elem_id="player",
    )


def _served(folder: Path) -> str:
    """The address of a folder that the page serves."""
    return f"gradio_api/file={folder.as_posix()}/"


def prompt_value(session: Session, settings: Settings) -> dict[str, Any]:
    """The prompt, and the part of it that is selected."""
    prompt = Performance.empty() if session.prompt is None else session.prompt
    length = prompt.duration_s
    whole = _variation("prompt", None, length, prompt, np.ones(len(prompt), bool), finished=True)
    return _empty("prompt") | {
        "piece": f"prompt {session.prompt_name} {len(prompt)} {length:.2f}",
        "name": session.prompt_name,
        "start": min(settings.start_s, length),
        "end": length if settings.end_s is None else min(settings.end_s, length),
        "variations": [whole] if len(prompt) else [],
    }


def piece_value(session: Session) -> dict[str, Any]:
    """The music of a session: its newest revision, or the prompt while it is being read."""
    value = _empty("piece") | {"generating": session.generating, "message": session.status or _EMPTY_TEXT}
    if session.reading is None and not session.revisions:
        return value
    revision = session.reading or session.revision
    for number, seed in enumerate(revision.seeds):
        piece = revision.shown(number)
        final = piece.onset_s < revision.final_s[number] - revision.from_s
        take = session.take(revision, number)
        value["variations"].append(
            _variation(take, seed, revision.length_s(number), piece, final, finished=not session.generating)
        )
    return value | {
        "piece": revision.piece,
        "join": revision.join_s - revision.from_s,
        "begins": max(0.0, session.begins_s - revision.from_s),
        "autoplay": session.generating,
        "chosen": session.chosen,
        "latents": revision.latents,
        "settings": revision.settings.link(),
    }


def packed(piece: Performance) -> str:
    """Notes as "onset,length,pitch,velocity;", in milliseconds. Gradio sends only what was appended to such a text."""
    onset_ms, length_ms = _milliseconds(piece)
    rows = zip(onset_ms.tolist(), length_ms.tolist(), piece.pitch.tolist(), piece.velocity.tolist(), strict=True)
    return "".join(f"{onset},{length},{pitch},{velocity};" for onset, length, pitch, velocity in rows)


def _empty(kind: str) -> dict[str, Any]:
    return {
        "piece": 0,
        "kind": kind,
        "name": "",
        "join": 0,
        "begins": 0,
        "generating": False,
        "autoplay": False,
        "message": _EMPTY_TEXT,
        "start": 0,
        "end": 0,
        "chosen": 0,
        "latents": 0,
        "settings": "",
        "variations": [],
    }


def _variation(
    take: str, seed: int | None, until_s: float, piece: Performance, final: np.ndarray, *, finished: bool
) -> dict[str, Any]:
    return {
        "take": take,
        "seed": seed,
        "until": until_s,
        "notes": packed(piece.select(final)),
        "open": packed(piece.select(~final)),
        "pedals": _pedals(piece) if finished else [],
    }


def _pedals(piece: Performance) -> list[list[float]]:
    """When the pedal is down, as in the MIDI file of a download."""
    onset_ms, length_ms = _milliseconds(piece)
    if not len(piece):
        return []
    playing = unfold(onset_ms, onset_ms + np.maximum(length_ms, 1), piece.pitch, _TICKS_PER_S)
    intervals = np.stack([playing.pedal_down, playing.pedal_up], axis=1) / _TICKS_PER_S
    return intervals.tolist()


def _milliseconds(piece: Performance) -> tuple[np.ndarray, np.ndarray]:
    onset_ms = (piece.onset_s * 1000).round().astype(np.int64)
    return onset_ms, ((piece.offset_s - piece.onset_s) * 1000).round().astype(np.int64)
