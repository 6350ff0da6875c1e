"""Makes an album: ten pieces as MIDI and sound, and a cover sheet with their piano rolls.

    python examples/album.py album/

Sound needs `music_ar.audio`, the cover sheet matplotlib (pip install 'music-ar[plot]').
"""

import argparse
import importlib
from pathlib import Path

from app.report.piano_roll import draw
from music_ar import Generator, Performance, write_midi


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pieces", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first piece")
    parser.add_argument("--checkpoint", help="default: the shipped one")
    arguments = parser.parse_args()

    try:
        audio = importlib.import_module("music_ar.audio")
    except ImportError as error:
        print(f"without sound: {error}")
        audio = None
    arguments.folder.mkdir(parents=True, exist_ok=True)
    generator = Generator.from_pretrained(arguments.checkpoint)
    made = generator.generate_many([None], variations=arguments.pieces, seconds=arguments.seconds, seed=arguments.seed)
    rolls: dict[int, tuple[str, Performance]] = {}
    for piece in made:
        if not len(piece.performance):
            print(f"seed {piece.request.seed} ended before its first note")
            continue
        number = piece.request.seed - arguments.seed + 1
        path = arguments.folder / f"{number:02}.mid"
        write_midi(piece.performance, path)
        if audio is not None:
            title, comment = f"No. {number}", f"Music AR, seed {piece.request.seed}"
            audio.write_audio(piece.performance, path.with_suffix(".wav"), title=title, comment=comment)
        rolls[number] = (f"No. {number}, seed {piece.request.seed}", piece.performance)
        print(f"{path}: {len(piece.performance)} notes, {piece.performance.duration_s:.0f} s")
    draw([rolls[number] for number in sorted(rolls)], arguments.folder / "cover.png")


if __name__ == "__main__":
    main()
