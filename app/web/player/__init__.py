"""The player of the page: a piano roll that plays. This module builds what Python sends; the browser runs `player.js`.

`player.js` receives a dictionary:

    {"piece", "kind", "join", "generating", "autoplay", "message", "start", "end", "chosen",
     "variations": [{"seed", "until", "notes", "open"}]}

`piece` changes when another piece is shown. `join` is where the prompt ends; `start` and `end` delimit the selected
part of a prompt. `notes` are final, `open` may still change; both are `packed`. All times are in seconds.
"""

from pathlib import Path
from string import Template
from typing import Any

import gradio as gr

from app.web.session import Session
from app.web.settings import Settings
from music_ar import Performance

_EMPTY_TEXT = "Press Generate. The piece appears here as it is generated."


def player(kind: str, label: str, hint: str, samples: Path) -> gr.HTML:
    """The player as a component.

    Args:
        kind: "prompt", of which a part can be selected, or "piece".
        label: its name for screen readers.
        hint: how to use it.
        samples: folder of the piano samples, which the page must serve.
    """
    # As properties, these would be missing when the player first appears together with new music.
    html = Template(_read("player.html"))
    return gr.HTML(
        prompt_value(Session(), Settings()) if kind == "prompt" else piece_value(Session()),
        html_template=html.substitute(
            kind=kind, label=label, hint=hint, samples=f"gradio_api/file={samples.as_posix()}/"
        ),
        css_template=_read("player.css"),
        js_on_load="\n".join(_read(name) for name in ("piano.js", "player.js")),
        elem_id=f"{kind}-player",
    )


def prompt_value(session: Session, settings: Settings) -> dict[str, Any]:
    """The prompt, and the part of it that is selected."""
    prompt = Performance.empty() if session.prompt is None else session.prompt
    length = prompt.duration_s
    return {
        "piece": f"prompt {session.prompt_name} {len(prompt)} {length:.2f}",
        "kind": "prompt",
        "join": 0,
        "generating": False,
        "autoplay": False,
        "start": min(settings.start_s, length),
        "end": length if settings.end_s is None else min(settings.end_s, length),
        "variations": [{"seed": None, "until": length, "notes": packed(prompt), "open": ""}] if len(prompt) else [],
    }


def piece_value(session: Session) -> dict[str, Any]:
    """The music of a session: its newest revision, or the prompt while it is being read."""
    value: dict[str, Any] = {
        "piece": 0,
        "kind": "piece",
        "join": 0,
        "generating": session.generating,
        "autoplay": False,
        "message": session.status or _EMPTY_TEXT,
        "variations": [],
    }
    if session.reading is None and not session.revisions:
        return value
    revision = session.reading or session.revision
    for number, seed in enumerate(revision.seeds):
        piece = revision.shown(number)
        final = piece.onset_s < revision.final_s[number] - revision.from_s
        value["variations"].append(
            {
                "seed": seed,
                "until": revision.length_s(number),
                "notes": packed(piece.select(final)),
                "open": packed(piece.select(~final)),
            }
        )
    return value | {
        "piece": revision.piece,
        "join": revision.join_s - revision.from_s,
        "autoplay": session.generating,
        "chosen": session.chosen,
    }


def packed(piece: Performance) -> str:
    """Notes as "onset,length,pitch,velocity;", in milliseconds. Gradio sends only what was appended to such a text."""
    onset_ms = (piece.onset_s * 1000).round().astype(int).tolist()
    length_ms = ((piece.offset_s - piece.onset_s) * 1000).round().astype(int).tolist()
    rows = zip(onset_ms, length_ms, piece.pitch.tolist(), piece.velocity.tolist(), strict=True)
    return "".join(f"{onset},{length},{pitch},{velocity};" for onset, length, pitch, velocity in rows)


def _read(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
