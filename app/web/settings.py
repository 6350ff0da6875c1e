"""What a user can choose on the page, as stored with the music and in links."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Annotated, Any, Self
from urllib.parse import urlencode

import docstring_parser
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from music_ar import Performance, Request, SamplingOptions
from music_ar.decoding.request import MAX_SEED

AUTO = 0
"""The latent budget that stands for "auto"."""
MAX_VARIATIONS = 8
MAX_SECONDS = 3600.0
MAX_PROMPT_SECONDS = 3600.0
_MAX_SEED = MAX_SEED - MAX_VARIATIONS


class WebError(ValueError):
    """The page or the API cannot do what was asked; the message is shown to the user."""


def _empty_is_none(value: Any) -> Any:
    return None if value in ("", "None") else value


class Settings(BaseModel):
    """What a user can choose. Outside Python it is a flat mapping of names to values: `read`, `flat`, `link`.

    A field's title and description make its error message: "the TITLE must be DESCRIPTION, got ...".

    Attributes:
        seconds: length of the music to generate after the prompt.
        latents: latent budget, or `AUTO`.
        variations: number of pieces to generate at once.
        sampling: how tokens are sampled.
        seed: seed of the first variation; None takes a random one.
        start_s: start of the part of the prompt to use.
        end_s: end of that part; None is the end of the prompt.
        continuation_only: leave the prompt out of what is shown and downloaded.
        prompt: name of the prompt; empty for a new piece.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    seconds: Annotated[
        float,
        Field(ge=1, le=MAX_SECONDS, title="length", description=f"a number of seconds from 1 to {MAX_SECONDS:g}"),
    ] = 60.0
    latents: Annotated[int, Field(title="latent budget", description=f"a whole number, or {AUTO} for auto")] = AUTO
    variations: Annotated[
        int,
        Field(
            ge=1,
            le=MAX_VARIATIONS,
            title="number of variations",
            description=f"a whole number from 1 to {MAX_VARIATIONS}",
        ),
    ] = 1
    sampling: SamplingOptions = SamplingOptions()
    seed: Annotated[
        Annotated[int, Field(ge=0, le=_MAX_SEED)] | None,
        BeforeValidator(_empty_is_none),
        Field(title="seed", description=f"a whole number from 0 to {_MAX_SEED}, or empty"),
    ] = None
    start_s: Annotated[
        float,
        Field(
            ge=0,
            le=MAX_PROMPT_SECONDS,
            title="start of the prompt",
            description=f"a number of seconds from 0 to {MAX_PROMPT_SECONDS:g}",
        ),
    ] = 0.0
    end_s: Annotated[
        float | None,
        BeforeValidator(_empty_is_none),
        Field(title="end of the prompt", description="a number of seconds, or empty"),
    ] = None
    continuation_only: Annotated[bool, Field(title="option continuation_only", description="true or false")] = False
    prompt: Annotated[str, BeforeValidator(str)] = ""

    @model_validator(mode="after")
    def _check_part(self) -> Self:
        if self.end_s is not None and not self.start_s < self.end_s:
            raise WebError(f"the prompt must end after it starts, got {self.start_s:g} s to {self.end_s:g} s")
        return self

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """Read the values of the page's controls, of a settings file or of a link.

        Args:
            values: names of fields, and of fields of `SamplingOptions`, with numbers or their text. Missing names keep
                their defaults, unknown ones are ignored.

        Raises:
            WebError: a value is out of range.
        """
        sampling = {name: values[name] for name in SAMPLING if name in values}
        try:
            return cls.model_validate({**values, "sampling": sampling})
        except ValidationError as error:
            raise WebError(_in_words(error)) from error

    def flat(self) -> dict[str, Any]:
        """All values by name, including those of `sampling`; `read` accepts them."""
        return self.model_dump(exclude={"sampling"}) | dataclasses.asdict(self.sampling)

    def link(self) -> str:
        """The query string that restores these settings when appended to the page's address."""
        default = Settings().flat()
        return "?" + urlencode({name: value for name, value in self.flat().items() if value != default[name]})

    def request(self, prompt: Performance | None, prompt_seconds: float | None, latents: int) -> Request:
        """The request for the generator, with the prompt; see `music_ar.Request`."""
        return Request(
            prompt=prompt,
            prompt_seconds=prompt_seconds,
            seconds=self.seconds,
            latents=latents,
            sampling=self.sampling,
            seed=self.seed,
            variations=self.variations,
        )


SAMPLING = {field.name: field for field in dataclasses.fields(SamplingOptions)}
"""The sampling options by name, each with its default and, in its metadata, its label and range."""


def sampling_help() -> dict[str, str]:
    """The help text of each sampling option, from the docstring of `SamplingOptions`."""
    described = docstring_parser.parse(inspect.getdoc(SamplingOptions) or "").params
    return {option.arg_name: " ".join((option.description or "").split()) for option in described}


def _in_words(error: ValidationError) -> str:
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if cause is not None:  # its message is in words already: it is from `SamplingOptions` or `_check_part`
        return str(cause)
    name, value = str(first["loc"][-1]), first["input"]
    got = "nothing" if value in (None, "") else repr(value)
    if name in SAMPLING:
        return f"{name} must be a {'whole ' * isinstance(SAMPLING[name].default, int)}number, got {got}"
    field = Settings.model_fields[name]
    return f"the {field.title} must be {field.description}, got {got}"
