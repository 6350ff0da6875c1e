"""Generate an album: ten pieces as MIDI and WAV files, and a cover sheet with their piano rolls.

    python examples/album.py album/

Sound and the cover sheet need two extras: pip install '.[audio,plot]'.
"""

import argparse
from pathlib import Path

from app.report.piano_roll import draw
from music_ar import Generator, Performance, write_midi
from music_ar.audio import write_audio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pieces", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=60.0, help="length of each piece")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the first piece; piece i uses seed + i")
    parser.add_argument("--checkpoint", help="default: the shipped model")
    arguments = parser.parse_args()

    arguments.folder.mkdir(parents=True, exist_ok=True)
    generator = Generator.from_pretrained(arguments.checkpoint)
    pieces = generator.generate_many(
        [None], variations=arguments.pieces, seconds=arguments.seconds, seed=arguments.seed
    )
    rolls: dict[int, tuple[str, Performance]] = {}
    for piece in pieces:  # in the order they are finished
        seed, performance = piece.request.seed, piece.performance
        if not len(performance):
            print(f"seed {seed} ended before its first note")
            continue
        number = seed - arguments.seed + 1
        path = arguments.folder / f"{number:02}.mid"
        write_midi(performance, path)
        write_audio(performance, path.with_suffix(".wav"), title=f"No. {number}", comment=f"Music AR, seed {seed}")
        rolls[number] = (f"No. {number}, seed {seed}", performance)
        print(f"{path}: {len(performance)} notes, {performance.duration_s:.0f} s")
    draw([rolls[number] for number in sorted(rolls)], arguments.folder / "cover.png")


if __name__ == "__main__":
    main()
