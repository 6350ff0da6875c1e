"""The command `music-ar push`: publish a model on the Hugging Face Hub."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from app.console import Unset, print_table

if TYPE_CHECKING:
    from music_ar.model.publishing import Upload


@dataclass(frozen=True, kw_only=True)
class Push:
    """Publish a model on the Hugging Face Hub: weights, model card, curve and metrics, in one commit.

    The files are checked before anything is sent. The card is MODEL_CARD.md of the folder, or is written from the
    model's sizes, and gets the metadata that the Hub reads: license, data and, from metrics.json, the scores. Log in
    with `hf auth login`, or set HF_TOKEN. Afterwards --checkpoint owner/name loads the model.

    Example: music-ar push runs/small/model me/my-piano --private

    Attributes:
        folder: folder of the model, such as the model/ of a training run, or the name of a shipped model.
        repository: where it goes on the Hub: owner/name. It is created if it is missing.
        private: only you and those you name can see it. A repository that exists must be private already.
        update: replace the model in a repository that exists, in a new commit.
        license: identifier of the weights' license. Weights trained on MAESTRO, or from a shipped model, have that of
            the data. Default: as the metadata of the card say, otherwise cc-by-nc-sa-4.0.
        dataset: names of what the model was trained on. Default: as the metadata of the card say, otherwise
            maestro-v3.0.0.
        dry_run: send nothing, and ask the Hub nothing: print the files with their sizes, and the card.
    """

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    repository: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OWNER/NAME")]
    private: bool = False
    update: bool = False
    license: Unset[str] = None
    dataset: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="")] = ()
    dry_run: bool = False

    def run(self) -> None:
        """Print the files, and publish them or print the card."""
        from music_ar.model.publishing import prepare_upload

        upload = prepare_upload(self.folder, self.repository, license=self.license, datasets=self.dataset)
        _print_files(upload)
        if self.dry_run:
            print(f"\n{upload.card}\nnothing was sent")
        else:
            print(upload.push(private=self.private, update=self.update))


def _print_files(upload: "Upload") -> None:
    sizes = upload.sizes
    rows = [(name, f"{size:,}") for name, size in (sizes | {"all": sum(sizes.values())}).items()]
    print_table((upload.repository, "bytes"), rows)
