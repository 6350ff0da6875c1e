"""Continue a MIDI file in three ways and keep the continuation closest to real music.

python examples/continue_a_file.py mine.mid longer.mid
"""

import argparse
from pathlib import Path

from music_ar import Generator, write_midi
from music_ar.metrics.statistics import plausibility


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=30.0, help="length of the continuation")
    parser.add_argument("--checkpoint", help="default: the shipped model")
    arguments = parser.parse_args()

    generator = Generator.from_pretrained(arguments.checkpoint)
    pieces = generator.generate_many(
        [arguments.prompt], variations=3, seconds=arguments.seconds, prompt_seconds=20.0, seed=0, batch_size=3
    )
    scored = [(plausibility(piece.continuation, piece.nats_per_token), piece) for piece in pieces if not piece.error]
    if not scored:
        raise SystemExit(f"cannot continue {arguments.prompt}: expected a MIDI file with piano notes")
    for score, piece in scored:
        print(f"seed {piece.request.seed}: {piece.nats_per_token:.2f} nats per token, plausibility {score:.2f}")
    _, best = max(scored, key=lambda pair: pair[0])
    write_midi(best.performance, arguments.output)
    print(f"{arguments.output}: {len(best.performance)} notes, seed {best.request.seed}")


if __name__ == "__main__":
    main()
