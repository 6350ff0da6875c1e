"""Makes the golden files of this folder from the official MAESTRO zip, with note-seq 0.0.5 as the judge.

Run it only to add pieces: the goldens are what note-seq said, and must not follow our own code. In an environment
of Python 3.11 with `pip install note-seq==0.0.5`:

    python tests/data/make_goldens.py maestro-v3.0.0-midi.zip
"""

import io
import sys
import zipfile
from pathlib import Path

import mido
import numpy as np
from note_seq import midi_io, performance_encoder_decoder, performance_lib, sequences_lib  # pyright: ignore

HERE = Path(__file__).parent
FOLDER = "maestro-v3.0.0"
# Our name, its MAESTRO file, and how many seconds of it to keep (None: all).
PIECES = [
    ("bach_885.midi", "2011/MIDI-Unprocessed_22_R1_2011_MID--AUDIO_R1-D8_12_Track12_wav.midi", None),
    ("bach_857.midi", "2011/MIDI-Unprocessed_05_R1_2011_MID--AUDIO_R1-D2_08_Track08_wav.midi", None),
    ("liszt_etude_1.midi", "2015/MIDI-Unprocessed_R1_D1-1-8_mid--AUDIO-from_mp3_06_R1_2015_wav--3.midi", None),
    # Holds one of the few places in MAESTRO where a key is struck again before it was released.
    (
        "chopin_etude_25_10.midi",
        "2017/MIDI-Unprocessed_041_PIANO041_MID--AUDIO-split_07-06-17_Piano-e_1-01_wav--3.midi",
        20,
    ),
]


def first_seconds(data: bytes, seconds: float) -> bytes:
    """The events of a MIDI file that happen in its first seconds; notes that are still held there are left open."""
    midi = mido.MidiFile(file=io.BytesIO(data))
    limit = mido.second2tick(seconds, midi.ticks_per_beat, 500_000)  # every MAESTRO file has this tempo alone
    for number, track in enumerate(midi.tracks):
        kept, tick = mido.MidiTrack(), 0
        for message in track:
            tick += message.time
            if tick <= limit and message.type != "end_of_track":
                kept.append(message)
        midi.tracks[number] = kept
    shortened = io.BytesIO()
    midi.save(file=shortened)
    return shortened.getvalue()


def golden(data: bytes) -> dict[str, np.ndarray]:
    """What note-seq reads in a MIDI file: tokens `[T]`, and notes `[n, 4]` as onset, offset, pitch, velocity."""
    sequence = sequences_lib.apply_sustain_control_changes(midi_io.midi_to_note_sequence(data))
    quantized = sequences_lib.quantize_note_sequence_absolute(sequence, 100)
    performance = performance_lib.Performance(quantized, num_velocity_bins=32, max_shift_steps=100)
    one_hot = performance_encoder_decoder.PerformanceOneHotEncoding(num_velocity_bins=32, max_shift_steps=100)
    notes = sorted(sequence.notes, key=lambda note: (note.start_time, note.pitch))
    rows = [(note.start_time, note.end_time, note.pitch, note.velocity) for note in notes]
    tokens = [one_hot.encode_event(event) for event in performance]
    return {"tokens": np.array(tokens, np.uint16), "notes": np.array(rows, np.float64)}


def main() -> None:
    """Writes the MIDI files and goldens.npz beside this script."""
    goldens = {}
    with zipfile.ZipFile(sys.argv[1]) as maestro:
        for name, source, seconds in PIECES:
            data = maestro.read(f"{FOLDER}/{source}")
            data = data if seconds is None else first_seconds(data, seconds)
            (HERE / name).write_bytes(data)
            for what, values in golden(data).items():
                goldens[f"{name}/{what}"] = values
                print(name, what, values.shape)
    np.savez_compressed(HERE / "goldens.npz", **goldens)


if __name__ == "__main__":
    main()
