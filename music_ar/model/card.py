"""The card of a model in the Hub's form: metadata in YAML, then Markdown."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from music_ar.model.config import ModelConfig

LICENSE = "cc-by-nc-sa-4.0"
"""Of weights trained on MAESTRO: as the data."""
DATASETS = ("maestro-v3.0.0",)
_TAGS = ("music", "piano", "midi", "symbolic-music", "music-generation", "perceiver-ar", "jax")
_METRICS = {
    "nats_per_token": "NLL per token (nats)",
    "nats_per_note": "NLL per note (nats)",
    "nats_per_second": "NLL per second (nats)",
}
_SPLITS = ("validation", "test")
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n.*?\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)


def without_metadata(text: str) -> str:
    """The Markdown of a card, without the metadata at its top."""
    return _FRONT_MATTER.sub("", text, count=1).lstrip() if _FRONT_MATTER.match(text) else text


def write_card(
    text: str,
    name: str,
    metrics: Mapping[str, Any],
    *,
    license: str | None = None,
    datasets: Sequence[str] = (),
) -> str:
    """A card with its metadata.

    Args:
        text: Markdown; if it has metadata at its top, they are kept, but for those that follow from the rest.
        name: what the model is called.
        metrics: content of `metrics.json`, or empty.
        license: identifier of the weights' license; default: as the text's metadata say, otherwise `LICENSE`.
        datasets: names of what the model was trained on; default: as the text's metadata say, otherwise `DATASETS`.

    Raises:
        ValueError: the metadata in the text are not YAML.
    """
    from huggingface_hub import ModelCard, ModelCardData  # takes long to import
    from huggingface_hub.utils import yaml_dump

    try:
        own = ModelCard(text).data.to_dict() if _FRONT_MATTER.match(text) else {}
    except Exception as error:  # of the parser of YAML, too
        raise ValueError(" ".join(str(error).split())) from error
    own.pop("model-index", None)  # of other metrics, perhaps
    trained_on = list(datasets) or _listed(own.get("datasets")) or list(DATASETS)
    results = _results(metrics, trained_on[0])
    ours = ModelCardData(
        license=license or own.get("license", LICENSE),
        library_name="music-ar",
        datasets=trained_on,
        tags=list(dict.fromkeys([*_listed(own.get("tags")), *_TAGS])),
        model_name=name if results else None,
        eval_results=results or None,
    )
    return f"---\n{yaml_dump(own | ours.to_dict(), sort_keys=False)}---\n\n{without_metadata(text)}"


def default_text(name: str, repository: str, config: ModelConfig, parameters: int, metrics: Mapping[str, Any]) -> str:
    """The Markdown of a card for a model that has none.

    Args:
        name: what the model is called.
        repository: "owner/name" on the Hub.
        config: its sizes.
        parameters: number of its parameters.
        metrics: content of `metrics.json`, or empty.
    """
    lines = [
        f"# {name}",
        "",
        "A Perceiver AR (Hawthorne et al., ICML 2022) that writes piano performances as event tokens, trained with "
        "Music AR.",
        "",
        "```python",
        "from music_ar import Generator",
        "",
        f'generator = Generator.from_pretrained("{repository}")',
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {parameters:,} |",
        f"| context | {config.context:,} event tokens |",
        f"| latents | {config.latents:,} |",
        f"| width, layers | {config.width:,}, {config.layers} |",
    ]
    rows = [
        f"| {split} | " + " | ".join(f"{scores[key]:.3f}" if key in scores else "" for key in _METRICS) + " |"
        for split, scores in _scores(metrics).items()
    ]
    if rows:
        header = ["", "## How well it predicts", "", "| split | " + " | ".join(_METRICS.values()) + " |"]
        lines += [*header, "|---|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def _scores(metrics: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The numbers of `_METRICS` that there are, by split."""
    found = {}
    for split in _SPLITS:
        of_split = metrics.get(split)
        if isinstance(of_split, dict):
            found[split] = {key: float(of_split[key]) for key in _METRICS if _is_number(of_split.get(key))}
    return {split: scores for split, scores in found.items() if scores}


def _listed(value: Any) -> list[str]:
    """What a list of metadata holds; a single text stands for a list of one."""
    return [value] if isinstance(value, str) else list(value or ())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _results(metrics: Mapping[str, Any], dataset: str) -> list[Any]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="other",
            task_name="Symbolic music generation",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type=key,
            metric_name=_METRICS[key],
            metric_value=value,
        )
        for split, scores in _scores(metrics).items()
        for key, value in scores.items()
    ]
