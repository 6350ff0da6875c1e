"""The controls for wishes, for a model that takes them: which wishes count, and a slider or a list for each."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from app.web.calls import session_name
from app.web.manager import SessionManager
from app.web.session import Session
from app.web.settings import Settings, WebError
from music_ar.features.wish_options import NAMES, NUMBERS, WISHES, Wishes, wish_help
from music_ar.features.wishes import WishControl

WISHED = "wished"
"""Name of the control that has the labels of the numbers that count."""
_LABELS = {field.name: field.metadata["label"] for field in dataclasses.fields(Wishes) if field.name in NUMBERS}
_ANY = "Any"
_MOST_GUIDANCE = 4.0  # of the slider; more than that is seldom music
_GUIDANCE = {field.name: field.metadata for field in dataclasses.fields(Wishes)}["guidance"]


class WishControls:
    """The controls for wishes; none if the model takes none.

    Args:
        manager: has the model and the sessions.

    Attributes:
        components: by name, in the order of `values`; `layout` makes them.
    """

    def __init__(self, manager: SessionManager):
        self._manager = manager
        self.components: dict[str, gr.CheckboxGroup | gr.Slider | gr.Dropdown] = {}

    def layout(self) -> None:
        """Create the components."""
        wishes = self._manager.machine.generator.wish_controls()
        if not wishes:
            return
        numbers = [wish for wish in wishes if wish.name in NUMBERS]
        with gr.Accordion("Wishes: how the music should be", open=False, elem_id="wishes"):
            self.components[WISHED] = gr.CheckboxGroup(
                [wish.label for wish in numbers],
                label="Wish for",
                info="Each begins at what the prompt is like.",
                elem_id="wished",
            )
            for wish in wishes:
                self.components[wish.name] = _slider(wish) if wish.name in NUMBERS else _list(wish)
            self.components["guidance"] = gr.Slider(
                _GUIDANCE["range"].least,
                _MOST_GUIDANCE,
                value=Wishes().guidance,
                step=_GUIDANCE["step"],
                label=_GUIDANCE["label"],
                info=_capitalized(wish_help()["guidance"]),
                elem_id="wish-guidance",
            )

    @property
    def numbers(self) -> list[Any]:
        """The sliders of the wishes that are numbers."""
        return [self.components[name] for name in NUMBERS if name in self.components]

    def bind(self) -> None:
        """Show a slider while its wish counts."""
        if self.components:
            wished = self.components[WISHED]
            wished.change(self.on_wished, wished, self.numbers, queue=False, api_visibility="private")

    def on_wished(self, wished: list[str]) -> list[Any]:
        """Show the sliders of the wishes that count."""
        return [gr.update(visible=_LABELS[name] in wished) for name in NUMBERS]

    def on_prompt(self, request: gr.Request, wished: list[str], start_s: float, end_s: float | None) -> list[Any]:
        """Set the sliders of the other wishes to what the prompt is like."""
        session = self._manager.session(session_name(request))
        controls = {
            wish.name: wish for wish in self._manager.machine.generator.wish_controls(_part(session, start_s, end_s))
        }
        return [gr.skip() if _LABELS[name] in wished else gr.update(value=_start(controls[name])) for name in NUMBERS]

    def restored(self, wishes: Wishes) -> list[Any]:
        """Values of the components that stand for wishes.

        Raises:
            GenerationError: the model cannot take them.
        """
        generator = self._manager.machine.generator
        generator.check_wishes(wishes)
        table = generator.config.wishes
        if table is None:
            return []
        ids = dict(zip(WISHES, table.ids(wishes).tolist(), strict=True))
        choices = {wish.name: wish.choices for wish in table.controls()}
        values: dict[str, Any] = {WISHED: [_LABELS[name] for name in NUMBERS if name in wishes.given]}
        values |= {name: wishes.given.get(name, gr.skip()) for name in NUMBERS}
        values |= {name: choices[name][ids[name] - 1] if ids[name] else "" for name in NAMES if name in choices}
        values["guidance"] = wishes.guidance
        return [values[name] for name in self.components]


def only_wished(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the page's controls without the numbers that are not wished for."""
    wished = values.get(WISHED) or ()
    return {
        name: None if name in NUMBERS and _LABELS[name] not in wished else value
        for name, value in values.items()
        if name != WISHED
    }


def _part(session: Session, start_s: float, end_s: float | None) -> Any:
    try:
        rest, length_s = session.cropped_prompt(Settings.read({"start_s": start_s or 0.0, "end_s": end_s}))
    except WebError:
        return session.prompt
    return rest if rest is None or length_s is None else rest.crop(0, length_s)


def _limits(wish: WishControl) -> tuple[float, float, float]:
    """Least and most on the grid of the slider's steps, within what the model takes, and the step."""
    assert wish.least is not None
    assert wish.most is not None
    assert wish.step is not None
    least, most = math.ceil(wish.least / wish.step) * wish.step, math.floor(wish.most / wish.step) * wish.step
    return (least, most, wish.step) if least < most else (wish.least, wish.most, (wish.most - wish.least) / 100)


def _start(wish: WishControl) -> float:
    """Where a slider begins: at what the prompt is like, or in the middle."""
    least, most, step = _limits(wish)
    value = (least + most) / 2 if wish.default is None else float(wish.default)
    return min(max(least + round((value - least) / step) * step, least), most)


def _slider(wish: WishControl) -> gr.Slider:
    least, most, step = _limits(wish)
    return gr.Slider(
        least,
        most,
        value=_start(wish),
        step=step,
        label=wish.label,
        info=_capitalized(wish.help),
        visible=False,
        elem_id=f"wish-{wish.name}",
    )


def _list(wish: WishControl) -> gr.Dropdown:
    names: Sequence[tuple[str, str]] = [(_ANY, ""), *((name, name) for name in wish.choices)]
    return gr.Dropdown(
        list(names), value="", label=wish.label, info=_capitalized(wish.help), elem_id=f"wish-{wish.name}"
    )


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]
