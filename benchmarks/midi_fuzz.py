"""Read damaged and odd MIDI files, and check that each is read or refused, quickly and in little memory.

    python benchmarks/midi_fuzz.py app/web/prompts tests/data [--files 20000] [--first 0] [--seconds 60]

Half of the files are mutations of those in the given folders. The others are made by a grammar of MIDI: every kind of
event and chunk, and patterns that are hard for readers, up to 640 kB: thousands of tracks, tempos or controllers,
notes of one pitch that are never released, long deltas. File N is the same in every run, so that a run can be cut into
slices: it stops after `--seconds` and prints the number to go on from.

A file fails if reading raises anything but `MidiError`, takes more than 2 s of the processor, or if what was read
cannot be written and read again. Prints a table and, as the last line, JSON. Exit code 1 if a file fails or the process
takes 200 MB.
"""

import argparse
import io
import json
import random
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from app.console import print_table
from music_ar.midi import MidiError, Performance, read_midi, write_midi
from music_ar.midi.folders import find_midi_files

LONGEST_S = 2.0
MOST_MB = 200
MOST_BYTES = 640_000
_WRITTEN_BACK = 0.1  # share of the files that can be read
_INSERTED = [
    b"\xff\x2f\x00", b"\xff\x51\x03\x00\x00\x01", b"\xff\x51\x00", b"\xf0\x05\x7e\x7f\x09\x01\xf7", b"\xf7\x02\x90\x3c",
    b"\xff\xff\xff\x7f", b"\x80\x80\x80\x80", b"MTrk\x00\x00\x00\x04\x00\xff\x2f\x00", b"MTrk\xff\xff\xff\xff",
    b"\xb0\x7b\x00", b"\xff\x21\x01\x7f", b"\xff\x09\x02ab", b"\xf4", b"\xf8", b"\x00", b"\xff", b"RIFF", b"MThd",
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="folders of MIDI files to mutate")
    parser.add_argument("--files", type=int, default=20_000, help="number of files to read")
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    parser.add_argument("--seconds", type=float, default=60.0, help="stop after this time")
    arguments = parser.parse_args()

    originals = [path.read_bytes() for folder in arguments.folders for path in find_midi_files(folder)]
    start_s, outcomes, slowest_s, slowest, number = time.monotonic(), Counter[str](), 0.0, 0, arguments.first
    while number < arguments.files and time.monotonic() - start_s < arguments.seconds:
        randomness = random.Random(number)
        data = mutate(randomness, randomness.choice(originals)) if number % 2 else generate(randomness)
        outcome, seconds = read(data, write_back=randomness.random() < _WRITTEN_BACK)
        if outcome not in ("read", "refused"):
            print(f"file {number}: {outcome}", file=sys.stderr)
        outcomes[outcome.split(":")[0]] += 1
        if seconds > slowest_s:
            slowest_s, slowest = seconds, number
        number += 1

    memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print_table(["outcome", "files"], [[outcome, f"{count}"] for outcome, count in sorted(outcomes.items())])
    print(f"slowest: file {slowest}, {slowest_s:.2f} s; memory: {memory_mb:.0f} MB; go on with --first {number}")
    result = {
        "benchmark": "midi_fuzz",
        "files": number - arguments.first,
        "next": number,
        "outcomes": dict(outcomes),
        "slowest_s": round(slowest_s, 3),
        "memory_mb": round(memory_mb),
    }
    print(json.dumps(result))
    return int(bool(set(outcomes) - {"read", "refused"}) or memory_mb >= MOST_MB)


def read(data: bytes, *, write_back: bool) -> tuple[str, float]:
    """What becomes of a file, and how long reading it takes."""
    start_s = time.process_time()
    try:
        performance = read_midi(data)
    except MidiError:
        performance = None
    except Exception:
        return f"crashed: {traceback.format_exc()}", time.process_time() - start_s
    seconds = time.process_time() - start_s
    if seconds > LONGEST_S:
        return f"slow: {seconds:.1f} s for {len(data)} bytes", seconds
    if performance is None:
        return "refused", seconds
    if write_back and not _comes_back(performance):
        return "changed: other notes after writing and reading", seconds
    return "read", seconds


def _comes_back(performance: Performance) -> bool:
    file = io.BytesIO()
    try:
        write_midi(performance, file)
    except MidiError:  # too many notes overlap; nothing was written
        return True
    return len(read_midi(file.getvalue())) == len(performance)


# --- mutations -------------------------------------------------------------------------------------------------------


def mutate(randomness: random.Random, original: bytes) -> bytes:
    """Damage a file in one to eight places."""
    data = bytearray(original)
    for _ in range(randomness.choice([1, 1, 1, 2, 3, 8])):
        where = randomness.randrange(len(data) + 1)
        kind = randomness.randrange(6)
        if kind == 0:
            data[where : where + 1] = bytes([randomness.randrange(256)])
        elif kind == 1:
            data[where : where + 1] = bytes([(data[where] if where < len(data) else 0) ^ 1 << randomness.randrange(8)])
        elif kind == 2:
            del data[where : where + randomness.choice([1, 2, 5, 400])]
        elif kind == 3:
            data[where:where] = randomness.choice(_INSERTED)
        elif kind == 4:
            source = randomness.randrange(len(data) + 1)
            data[where:where] = data[source : source + randomness.choice([1, 3, 50, 2000])]
        elif randomness.random() < 0.2:
            del data[where:]
    if randomness.random() < 0.8:
        mend_length(data)
    return bytes(data)


def mend_length(data: bytearray) -> None:
    """Make the length of the last track right, so that its damage is reached."""
    start = data.rfind(b"MTrk")
    if start >= 0 and start + 8 <= len(data):
        data[start + 4 : start + 8] = (len(data) - start - 8).to_bytes(4)


# --- grammar ---------------------------------------------------------------------------------------------------------


def generate(randomness: random.Random) -> bytes:
    """Make a file of any kind, odd in some way more often than not."""
    if randomness.random() < 0.05:
        tracks = randomness.choice([_many_tracks, _many_events])(randomness)
    else:
        tracks = [_track(randomness) for _ in range(randomness.choice([1, 1, 2, 3, 17]))]
    chunks = [_chunk(b"MTrk", track) for track in tracks]
    while randomness.random() < 0.2:
        chunks.insert(randomness.randrange(len(chunks) + 1), _chunk(randomness.choice([b"XFIH", b"MTrk"]), b""))
    announced = len(chunks) if randomness.random() < 0.9 else randomness.randrange(4)
    division = randomness.choice([b"\x01\xe0"] * 20 + [b"\x00\x01", b"\x7f\xff", b"\x00\x00", b"\xe7\x28", b"\xe3\x64"])
    header = randomness.choice([0] + [1] * 8 + [2]).to_bytes(2) + announced.to_bytes(2) + division
    data = _chunk(b"MThd", header + bytes(randomness.choice([0, 0, 0, 2]))) + b"".join(chunks)
    if randomness.random() < 0.1:
        size = randomness.choice([len(data), 0, 2**31]).to_bytes(4, "little")
        data = b"RIFF" + size + b"RMID" + b"data" + size + data
    return data + randomness.choice([b""] * 8 + [b"\0", b"words at the end", data])


def _chunk(name: bytes, body: bytes) -> bytes:
    return name + len(body).to_bytes(4) + body


def _number(value: int) -> bytes:
    digits = [value & 127]
    while value := value >> 7:
        digits.append(value & 127 | 128)
    return bytes(reversed(digits))


def _track(randomness: random.Random) -> bytes:
    channels = randomness.sample(range(16), randomness.choice([1, 1, 2, 16]))
    deltas = randomness.choice([[0, 0, 1, 48]] * 8 + [[0], [1, 5_000], [0] * 30 + [2**28 - 1]])
    events, running = [], b""
    for _ in range(randomness.choice([0, 3, 30, 300])):
        event = _event(randomness, channels)
        repeats = event[:1] == running and randomness.random() < 0.7
        events.append(_number(randomness.choice(deltas)) + (event[1:] if repeats else event))
        running = event[:1] if event[0] < 0xF0 else running if event[0] == 0xFF else b""
    return b"".join(events) + randomness.choice([b"\x00\xff\x2f\x00"] * 4 + [b"", b"\x83\x60\xff\x2f\x00"])


def _event(randomness: random.Random, channels: list[int]) -> bytes:
    kind, channel = randomness.randrange(20), randomness.choice(channels)
    pitch, value = randomness.choice([60, 60, 61, randomness.randrange(128)]), randomness.randrange(128)
    if kind < 12:
        return bytes([(0x80 if kind < 4 else 0x90) | channel, pitch, 0 if kind < 6 else value])
    if kind < 16:
        number = randomness.choice([64, 64, 64, 66, 67, 120, 121, 123, 126, randomness.randrange(128)])
        return bytes([0xB0 | channel, number, randomness.choice([0, 127, value])])
    if kind == 16:
        return bytes([randomness.choice([0xC0, 0xD0]) | channel, value])
    if kind == 17:
        return bytes([randomness.choice([0xA0, 0xE0]) | channel, pitch, value])
    body = randomness.randbytes(randomness.choice([0, 1, 2, 3, 4, 200]))
    if kind == 18:
        meta = randomness.choice([0x01, 0x03, 0x09, 0x20, 0x21, 0x51, 0x51, 0x54, 0x58, 0x59, 0x7F])
        return bytes([0xFF, meta]) + _number(len(body)) + body
    return randomness.choice([b"\xf0", b"\xf7"]) + _number(len(body)) + body


def _many_tracks(randomness: random.Random) -> list[bytes]:
    """Up to 640 kB in tracks that are all alike: of all channels and programs, of all ports, or nearly empty."""
    all_channels = b"".join(bytes([0, 0xC0 | channel, 5, 0, 0x90 | channel, 60, 9]) for channel in range(16))
    ports = b"\x00\xff\x21\x01\x05\x00\x90\x3c\x40\x10\x3c\x00"
    track = randomness.choice([all_channels, ports, b"\x00\xff\x2f\x00"])
    count = min(MOST_BYTES // (len(track) + 8), 60_000)
    return [track.replace(b"\x05", bytes([number % 128])) for number in range(count)]


def _many_events(randomness: random.Random) -> list[bytes]:
    """640 kB in one track of one kind of event."""
    makers: list[Callable[[int], bytes]] = [
        lambda _: b"\x01\x90\x3c\x40",  # never released
        lambda _: b"\x00\x90\x3c\x40",
        lambda number: bytes([1, 0x90, number % 128, 64]),
        lambda number: bytes([1, 0x90 | number % 16, number // 16 % 128, number % 2]),
        lambda number: b"\x01\xff\x51\x03" + (number + 1).to_bytes(3),
        lambda number: bytes([1, 0xB0 | number % 16, 64, number % 128]),
        lambda _: bytes([0, 0xB0, 123, 0, 0, 0x90, 60, 64]),
        lambda number: bytes([0, 0xB0, 64, number % 128, 0, 0x90, 60, number % 2]),
        lambda _: b"\xff\xff\xff\x7f\x90\x3c\x40",
        lambda number: b"\x00\xff\x21\x01" + bytes([number % 128]) + b"\x00\x90\x3c\x40",
        lambda number: b"\x00\xff\x09\x02" + number.to_bytes(2),
        lambda _: b"\x00\xff\x03\x00",
        lambda _: b"\x00\xc0\x05\x00\x05",
        lambda _: b"\x00\xf0\x00",
    ]
    maker = randomness.choice(makers)
    count = MOST_BYTES // len(maker(0))
    notes = b"\x00\x90\x3e\x40\x60\x3e\x00"
    return [b"".join(map(maker, range(min(count, 65_536)))) + notes + b"\x60\xff\x2f\x00"]


if __name__ == "__main__":
    sys.exit(main())
