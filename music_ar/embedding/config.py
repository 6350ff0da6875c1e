"""`PieceEncoderConfig`, the sizes of a piece encoder, and the presets."""

import dataclasses

from music_ar.embedding.notes import DURATION_CLASSES
from music_ar.model.perceiver_io import PerceiverIOConfig
from music_ar.ranges import check_ranges, whole
from music_ar.tokens.vocabulary import PITCHES, VELOCITY_BINS

ATTRIBUTES = {"pitch": PITCHES, "velocity": VELOCITY_BINS, "duration": DURATION_CLASSES}
"""What is predicted of a hidden note, and the number of classes of each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PieceEncoderConfig:
    """Sizes of a `PieceEncoder`. Saved as JSON next to the weights.

    Attributes:
        size: E, dimensions of an embedding.
        earlier: notes before each note whose distance in pitch and time is an input.
        time_bands: wavelengths by which a note's place in the piece is told: twice its length, and each half of the one
            before.
        channels: C, channels of a note before the latents read it.
        latents, width, layers, reads, heads, kv_heads, head_size, hidden: see `PerceiverIOConfig`.

    Raises:
        ValueError: a size out of range, or sizes that do not fit together.
    """

    size: int = whole(96, 2, 4096)
    earlier: int = whole(8, 1, 64)
    time_bands: int = whole(14, 1, 20)
    channels: int = whole(512, 1, 2**16)
    latents: int = whole(128, 1, 2**16)
    width: int = whole(256, 1, 2**16)
    layers: int = whole(3, 0, 1000)
    reads: int = whole(2, 1, 100)
    heads: int = whole(4, 1, 1000)
    kv_heads: int = whole(2, 1, 1000)
    head_size: int = whole(64, 1, 2**12)
    hidden: int = whole(576, 1, 2**18)

    def __post_init__(self) -> None:
        check_ranges(self, ValueError)
        _ = self.io  # checked too

    @property
    def io(self) -> PerceiverIOConfig:
        """The Perceiver IO inside."""
        shared = ("latents", "width", "layers", "reads", "heads", "kv_heads", "head_size", "hidden")
        return PerceiverIOConfig(
            inputs=self.channels,
            queries=2 * self.time_bands,
            outputs=sum(ATTRIBUTES.values()) + self.size,
            **{name: getattr(self, name) for name in shared},
        )


PRESETS: dict[str, PieceEncoderConfig] = {
    # About 5 million parameters: 10 MB, which leaves room for an index of passages in a release of 15 MB.
    "small": PieceEncoderConfig(),
    # For tests and first experiments on a CPU.
    "tiny": PieceEncoderConfig(
        size=16, channels=32, latents=8, width=32, layers=1, heads=2, kv_heads=1, head_size=16, hidden=64
    ),
}
