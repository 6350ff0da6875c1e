"""What a user can choose on the page, as stored with the music and in links."""

import dataclasses
import inspect
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, Self, TypeVar
from urllib.parse import urlencode

import docstring_parser
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    create_model,
    model_validator,
)

from music_ar import Performance, Request, SamplingOptions
from music_ar.decoding.request import MAX_SEED
from music_ar.features.wish_options import NAMES, WISH_OPTIONS, Wishes

AUTO = 0
"""The latent budget that stands for "auto"."""
MAX_VARIATIONS = 8
MAX_CHOICES = 4
MAX_SECONDS = 3600.0
MAX_PROMPT_SECONDS = 3600.0
_LEAST_LATENTS = 2
_MAX_SEED = MAX_SEED - MAX_VARIATIONS
_MAX_SHOWN = 40  # characters of a wrong value in a message

Model = TypeVar("Model", bound=BaseModel)


class WebError(ValueError):
    """The page or the API cannot do what was asked; the message is shown to the user."""


def _number(value: Any, info: ValidationInfo) -> Any:
    """Only numbers are numbers in JSON; in links and text boxes a number is a text."""
    is_text = isinstance(value, str) and (info.context or {}).get("text", False)
    if isinstance(value, bool) or not (isinstance(value, int | float) or is_text):
        raise ValueError  # its message comes from the field's description
    return value


def _number_or_none(value: Any, info: ValidationInfo) -> Any:
    return None if value in ("", "None", None) else _number(value, info)


def _latents(value: Any, info: ValidationInfo) -> Any:
    return AUTO if value == "auto" else _number(value, info)


def _flag(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, bool) and not (isinstance(value, str) and (info.context or {}).get("text", False)):
        raise ValueError
    return value


Number = Annotated[float, BeforeValidator(_number)]
Whole = Annotated[int, BeforeValidator(_number)]
Seconds = Annotated[
    Number, Field(ge=1, le=MAX_SECONDS, title="length", description=f"a number of seconds from 1 to {MAX_SECONDS:g}")
]
"""A length of music."""


def _sampling_model() -> type[BaseModel]:
    """A model with the fields of `SamplingOptions`, each within the range of its control."""
    fields: dict[str, Any] = {}
    for name, option in SAMPLING.items():
        least, most, whole = option.metadata["minimum"], option.metadata["maximum"], isinstance(option.default, int)
        title = option.metadata["label"].partition(" (")[0].lower()
        description = f"a whole number from {least:g} to {most:g}" if whole else f"a number from {least:g} to {most:g}"
        kind = Annotated[Whole if whole else Number, Field(ge=least, le=most, title=title, description=description)]
        fields[name] = kind, option.default
    return create_model("Sampling", __config__=ConfigDict(allow_inf_nan=False), **fields)


SAMPLING = {field.name: field for field in dataclasses.fields(SamplingOptions)}
"""The sampling options by name, each with its default and, in its metadata, its label and range."""
_Sampling = _sampling_model()


def _sampling(value: Any, info: ValidationInfo) -> SamplingOptions:
    if isinstance(value, SamplingOptions):
        return value
    return SamplingOptions(**checked(_Sampling, value, info.context).model_dump())


def _wishes(value: Any, info: ValidationInfo) -> Wishes:
    if isinstance(value, Wishes):
        return value
    fields = dataclasses.fields(Wishes)
    return Wishes(**{field.name: _wished(field, value[field.name], info) for field in fields if field.name in value})


def _wished(field: dataclasses.Field[Any], value: Any, info: ValidationInfo) -> Any:
    """One wish, within the range that any model may have.

    Raises:
        WebError: it is no such number or name.
    """
    if value in ("", None):
        return field.default
    if field.name in NAMES:
        title, expected = field.name, "a name, or empty"
        allowed = isinstance(value, str)
    else:
        title, expected = field.metadata["label"].lower(), f"{field.metadata['range']}, or empty"
        try:
            number = float(_number(value, info))
        except (ValueError, OverflowError):
            number = math.nan
        allowed = number in field.metadata["range"]
        value = number if allowed else value
    if not allowed:
        raise WebError(f"the {title} must be {expected}, got {in_words(value)}")
    return value


class Settings(BaseModel):
    """What a user can choose. Outside Python it is a flat mapping of names to values: `read`, `flat`, `link`.

    A field's title and description make its error message: "the TITLE must be DESCRIPTION, got ...".

    Attributes:
        seconds: length of the music to generate after the prompt.
        latents: latent budget, or `AUTO`.
        variations: number of pieces to generate at once.
        choices: number of times that each phrase is made, of which the one that returns most to the theme is kept.
        sampling: how tokens are sampled.
        wishes: how the music should be, for a model that takes wishes.
        seed: seed of the first variation; None takes a random one.
        start_s: start of the part of the prompt to use.
        end_s: end of that part; None is the end of the prompt.
        continuation_only: leave the prompt out of what is shown and downloaded.
        fill: make the part from `start_s` to `end_s` anew and keep the rest of the prompt, instead of continuing that
            part; the length is that of the part.
        prompt: name of the prompt; empty for a new piece.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    seconds: Seconds = 60.0
    latents: Annotated[int, BeforeValidator(_latents), Field(ge=AUTO, title="latent budget")] = AUTO
    variations: Annotated[
        Whole,
        Field(
            ge=1,
            le=MAX_VARIATIONS,
            title="number of variations",
            description=f"a whole number from 1 to {MAX_VARIATIONS}",
        ),
    ] = 1
    choices: Annotated[
        Whole,
        Field(
            ge=1,
            le=MAX_CHOICES,
            title="number of choices",
            description=f"a whole number from 1 to {MAX_CHOICES}",
        ),
    ] = 1
    sampling: Annotated[SamplingOptions, BeforeValidator(_sampling)] = SamplingOptions()
    wishes: Annotated[Wishes, BeforeValidator(_wishes)] = Wishes()
    seed: Annotated[
        Annotated[int, Field(ge=0, le=_MAX_SEED)] | None,
        BeforeValidator(_number_or_none),
        Field(title="seed", description=f"a whole number from 0 to {_MAX_SEED}, or empty for a random one"),
    ] = None
    start_s: Annotated[
        Number,
        Field(
            ge=0,
            le=MAX_PROMPT_SECONDS,
            title="start of the prompt",
            description=f"a number of seconds from 0 to {MAX_PROMPT_SECONDS:g}",
        ),
    ] = 0.0
    end_s: Annotated[
        Annotated[float, Field(ge=0, le=MAX_PROMPT_SECONDS)] | None,
        BeforeValidator(_number_or_none),
        Field(
            title="end of the prompt",
            description=f"a number of seconds from 0 to {MAX_PROMPT_SECONDS:g}, or empty for the end of the file",
        ),
    ] = None
    continuation_only: Annotated[
        bool,
        BeforeValidator(_flag),
        Field(title="choice to leave out the prompt (continuation_only)", description="true or false"),
    ] = False
    fill: Annotated[
        bool,
        BeforeValidator(_flag),
        Field(title="choice to make a part of the prompt anew (fill)", description="true or false"),
    ] = False
    prompt: Annotated[str, Field(title="name of the prompt", description="a text")] = ""

    @model_validator(mode="after")
    def _check_part(self) -> Self:
        if self.end_s is not None and not self.start_s < self.end_s:
            raise WebError(
                f"the prompt must end after it starts, got {in_words(self.start_s)} s to {in_words(self.end_s)} s"
            )
        return self

    @model_validator(mode="after")
    def _check_latents(self, info: ValidationInfo) -> Self:
        most = (info.context or {}).get("most_latents", math.inf)
        if self.latents != AUTO and not _LEAST_LATENTS <= self.latents <= most:
            raise WebError(_latents_expected(most, self.latents))
        return self

    @classmethod
    def read(cls, values: Mapping[str, Any], *, text: bool = True, most_latents: float = math.inf) -> Self:
        """Read the values of the page's controls, of a settings file, of a link or of a call of the API.

        Args:
            values: names of fields, and of fields of `SamplingOptions` and `Wishes`. Missing names keep their defaults,
                unknown ones are ignored.
            text: whether a number may be given as its text, as in links.
            most_latents: what the model was trained with.

        Raises:
            WebError: a value has the wrong type, or is out of range.
        """
        sampling = {name: values[name] for name in SAMPLING if name in values}
        wishes = {name: values[name] for name in WISH_OPTIONS if name in values}
        context = {"text": text, "most_latents": most_latents}
        return checked(cls, {**values, "sampling": sampling, "wishes": wishes}, context)

    def flat(self) -> dict[str, Any]:
        """All values by name, including those of `sampling` and `wishes`; `read` accepts them."""
        own = self.model_dump(exclude={"sampling", "wishes"})
        return own | dataclasses.asdict(self.sampling) | dataclasses.asdict(self.wishes)

    def link(self) -> str:
        """The query string that restores these settings when appended to the page's address."""
        default = Settings().flat()
        return "?" + urlencode({name: value for name, value in self.flat().items() if value != default[name]})

    def request(self, prompt: Performance | None, prompt_seconds: float | None, latents: int) -> Request:
        """The request for the generator, with the prompt; see `music_ar.Request`."""
        if self.fill and prompt is not None:
            passages = Request.replacing(prompt, self.start_s, prompt.duration_s if self.end_s is None else self.end_s)
        else:
            passages = Request(prompt=prompt, prompt_seconds=prompt_seconds, seconds=self.seconds)
        return dataclasses.replace(
            passages,
            latents=latents,
            sampling=self.sampling,
            wishes=self.wishes,
            seed=self.seed,
            variations=self.variations,
            choices=1 if self.fill else self.choices,
        )

    @property
    def rows(self) -> int:
        """Number of rows that the machine decodes at once for these settings."""
        return self.variations * Request(wishes=self.wishes, choices=1 if self.fill else self.choices).rows


class Extension(BaseModel):
    """What a call of the API to continue a piece can choose.

    Attributes:
        seconds: length of the music to add.
        variation: which variation to continue, from 0.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    seconds: Seconds = 30.0
    variation: Annotated[
        Whole, Field(ge=0, title="variation", description="the number of one that exists; 0 is the first")
    ] = 0

    @model_validator(mode="after")
    def _check_variation(self, info: ValidationInfo) -> Self:
        number = (info.context or {}).get("variations", MAX_VARIATIONS)
        if self.variation >= number:
            range_ = "0, since there is only one" if number == 1 else f"a whole number from 0 to {number - 1}"
            raise WebError(f"the variation must be {range_}, got {in_words(self.variation)}")
        return self


def checked(model: type[Model], values: Mapping[str, Any], context: Any = None) -> Model:
    """Check values with a pydantic model.

    Raises:
        WebError: one is missing, has the wrong type or is out of range.
    """
    try:
        return model.model_validate(values, context=context)
    except ValidationError as error:
        raise WebError(_first_in_words(error, model, context or {})) from error


def sampling_help() -> dict[str, str]:
    """The help text of each sampling option, from the docstring of `SamplingOptions`."""
    described = docstring_parser.parse(inspect.getdoc(SamplingOptions) or "").params
    return {option.arg_name: " ".join((option.description or "").split()) for option in described}


def in_words(value: Any) -> str:
    """A wrong value as it can be shown: numbers in full, texts in quotes, neither longer than a line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):  # more than 4,300 digits cannot be written at all
        return str(value) if abs(value) < 10**_MAX_SHOWN else f"a number of more than {_MAX_SHOWN} digits"
    if isinstance(value, float):
        if not math.isfinite(value):
            return {math.inf: "infinity", -math.inf: "minus infinity"}.get(value, "no number (NaN)")
        shown = format(Decimal(repr(value)), "f")
        shown = shown.removesuffix(".0")
        return shown if len(shown) <= _MAX_SHOWN else f"{value:g}"
    if isinstance(value, str) and value:
        shown = value.encode("utf-8", "replace").decode()
        return f"“{shown[:_MAX_SHOWN]}{'…' * (len(shown) > _MAX_SHOWN)}”"
    if isinstance(value, list | tuple):
        return "a list"
    return "an object" if isinstance(value, Mapping) else "nothing"


def _latents_expected(most: float, got: Any) -> str:
    range_ = f"from {_LEAST_LATENTS} to {most:g}" if most < math.inf else f"from {_LEAST_LATENTS}"
    return f"the latent budget must be a whole number {range_}, or {AUTO} or “auto” for auto, got {in_words(got)}"


def _first_in_words(error: ValidationError, model: type[BaseModel], context: Mapping[str, Any]) -> str:
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, WebError):  # in words already
        return str(cause)
    name = str(first["loc"][0])
    if name == "latents":
        return _latents_expected(context.get("most_latents", math.inf), first["input"])
    field = model.model_fields[name]
    return f"the {field.title} must be {field.description}, got {in_words(first['input'])}"
