"""A pretrained model as a repository of the Hub: its card, weights, curve and metrics, checked before they are sent."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from music_ar.model import card, hub
from music_ar.model.weights import (
    COMPANIONS,
    CONFIG,
    CURVE,
    METRICS,
    WEIGHTS,
    CheckpointError,
    card_of,
    local_folder,
    parameter_shapes,
    read_figures,
    read_weights,
)


class Upload(NamedTuple):
    """What is published.

    Attributes:
        repository: "owner/name" on the Hub.
        files: by name, the content or the path of the content.
    """

    repository: str
    files: Mapping[str, bytes | Path]

    @property
    def card(self) -> str:
        """The model card: metadata in YAML, then Markdown."""
        content = self.files[hub.CARD]
        assert isinstance(content, bytes)
        return content.decode()

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each file in bytes."""
        return {name: file.stat().st_size if isinstance(file, Path) else len(file) for name, file in self.files.items()}

    def push(self, *, private: bool = False, update: bool = False) -> str:
        """Publish the files in one commit, and return its address.

        Args:
            private: whether nobody else may see it; a new repository is made so, an old one must be.
            update: whether to replace the model of a repository that exists.

        Raises:
            HubError: there is no access token, or it is not enough; the name is taken; the upload failed.
        """
        return hub.publish(self.repository, self.files, stale=(*COMPANIONS, WEIGHTS), private=private, update=update)


def prepare_upload(
    source: str | os.PathLike[str], repository: str, *, license: str | None = None, datasets: Sequence[str] = ()
) -> Upload:
    """Check a pretrained model and write its card, without a connection.

    Args:
        source: the folder of the model, or the name of one that ships with the project.
        repository: "owner/name" on the Hub.
        license: identifier of the weights' license; default: as its card says, otherwise that of MAESTRO.
        datasets: names of what it was trained on; default: as its card says, otherwise MAESTRO.

    Raises:
        CheckpointError: it is not a model, or one of its files is damaged.
        HubError: a repository cannot have this name.
    """
    hub.check_name(repository)
    folder = local_folder(source)
    config = read_weights(folder).config
    metrics, has_curve = read_figures(folder, METRICS), bool(read_figures(folder, CURVE))
    name = repository.partition("/")[2]
    parameters = sum(math.prod(shape) for shape in parameter_shapes(config).values())
    text = card_of(folder) or card.default_text(name, repository, config, parameters, metrics)
    try:
        text = card.write_card(text, name, metrics, license=license, datasets=datasets)
    except ValueError as error:
        raise CheckpointError(f"the metadata at the top of the card in {folder} cannot be read: {error}") from error
    files: dict[str, bytes | Path] = {hub.CARD: text.encode(), CONFIG: folder / CONFIG, WEIGHTS: folder / WEIGHTS}
    figures = [name for name, has in ((CURVE, has_curve), (METRICS, bool(metrics))) if has]
    return Upload(repository, files | {name: folder / name for name in figures})
