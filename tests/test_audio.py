"""Properties of the synthesized sound that an ear would check."""

import io

import numpy as np
import pytest
import soundfile
from conftest import make_performance

from music_ar.audio import AudioError, render, synthesis, write_audio
from music_ar.audio.synthesis import SAMPLE_RATE, TAIL_S
from music_ar.midi import Performance


def notes(*rows):
    """A performance of rows (onset_s, offset_s, pitch, velocity)."""
    onset_s, offset_s, pitch, velocity = (np.array(column) for column in zip(*rows, strict=True))
    return Performance(onset_s=onset_s.astype(float), offset_s=offset_s.astype(float), pitch=pitch, velocity=velocity)


def level(sound, start_s, end_s):
    """Root mean square between two times."""
    return float(np.sqrt(np.mean(sound[round(start_s * SAMPLE_RATE) : round(end_s * SAMPLE_RATE)] ** 2)))


def loudest_hz(sound, start_s, end_s):
    part = sound[round(start_s * SAMPLE_RATE) : round(end_s * SAMPLE_RATE)].mean(axis=1)
    spectrum = np.abs(np.fft.rfft(part * np.hanning(len(part))))
    return float(np.argmax(spectrum) * SAMPLE_RATE / len(part))


def test_sound_begins_and_ends_with_the_notes():
    sound = render(notes((1, 1.5, 60, 80), (3, 3.2, 67, 80)))
    assert sound.dtype == np.float32
    assert sound.shape == (round((3.2 + TAIL_S) * SAMPLE_RATE), 2)
    assert not sound[:SAMPLE_RATE].any()
    assert level(sound, 1, 1.5) > 0.01
    assert not sound[2 * SAMPLE_RATE : 3 * SAMPLE_RATE].any()
    assert level(sound, 3, 3.2) > 0.01
    assert np.abs(sound[-100:]).max() < 1e-6


def test_a_performance_without_notes_is_silent():
    assert not render(Performance.empty()).any()


@pytest.mark.parametrize("pitch", [33, 45, 58, 60, 61, 69, 80, 95])
def test_every_key_has_its_pitch(pitch):
    heard = loudest_hz(render(notes((0, 2, pitch, 80))), 0.1, 2)
    partials = heard / (440 * 2 ** ((pitch - 69) / 12))
    assert abs(partials / max(1, round(partials)) - 1) < 0.015  # a quarter of a semitone
    assert round(partials) <= (1 if pitch > 65 else 4)  # in the bass an overtone may be loudest


@pytest.mark.parametrize("pitch", range(0, 128, 7))
def test_every_key_sounds(pitch):
    assert level(render(notes((0, 0.5, pitch, 80))), 0, 0.5) > 1e-3


def test_harder_is_louder_and_brighter():
    def heard(velocity):
        sound = render(notes((0, 1, 60, velocity)))
        spectrum = np.abs(np.fft.rfft(sound[:SAMPLE_RATE, 0])) ** 2
        return level(sound, 0, 1), spectrum[1000:].sum() / spectrum.sum()

    soft, middle, loud = heard(20), heard(70), heard(120)
    assert soft[0] < middle[0] < loud[0]
    assert soft[1] < middle[1] < loud[1]


def test_overlapping_notes_add_up():
    first, second = (0, 1, 60, 60), (0.5, 2, 60, 90)
    alone = render(notes(first))
    both = render(notes(first, second))
    both[: len(alone)] -= alone
    np.testing.assert_allclose(both, render(notes(second)), atol=1e-6)


@pytest.mark.parametrize("pitch", [40, 61, 100])
def test_a_note_sounds_the_same_whatever_else_its_key_plays(pitch):
    """As much of a sample is read as the longest note of its key needs."""
    short = notes((0, 0.4, pitch, 80))
    alone = render(short)
    with_longer = render(notes((0, 0.4, pitch, 80), (3, 5, pitch, 80), (6, 14, pitch, 80)))
    np.testing.assert_allclose(with_longer[: len(alone)], alone, atol=1e-6)
    assert level(with_longer, 6, 7) > 10 * level(with_longer, 13.9, 14)  # the recording has faded out by then


def test_a_thousand_notes_at_once_do_not_clip():
    sound = render(notes(*[(0.1 * (n % 5), 2, 30 + n % 60, 127) for n in range(1000)]))
    assert 0.9 < np.abs(sound).max() < 1


def test_a_release_does_not_click():
    """A cut would be a jump: the largest step between two frames stays that of the held note."""
    held, released = render(notes((0, 3, 57, 90))), render(notes((0, 1.0, 57, 90)))
    around = slice(round(0.99 * SAMPLE_RATE), round(1.5 * SAMPLE_RATE))
    assert np.abs(np.diff(released[around], axis=0)).max() <= np.abs(np.diff(held[around], axis=0)).max() * 1.05
    assert level(released, 1.3, 1.5) < 0.02 * level(held, 1.3, 1.5)


def test_left_and_right_differ():
    sound = render(notes((0, 1, 40, 80)))
    assert np.abs(sound[:, 0] - sound[:, 1]).max() > 0.01


@pytest.mark.parametrize("format", ["wav", "flac", "mp3"])
def test_files_contain_the_sound_and_its_tags(tmp_path, format):
    piece = make_performance(1, notes=20)
    path = tmp_path / f"piece.{format}"
    write_audio(piece, path, title="A piece", comment="seed 7")
    read, rate = soundfile.read(path)
    expected = render(piece)
    assert rate == SAMPLE_RATE
    assert abs(len(read) - len(expected)) < 0.1 * SAMPLE_RATE  # MP3 pads to whole frames
    assert np.sqrt(np.mean(read**2)) == pytest.approx(np.sqrt(np.mean(expected**2)), rel=0.03)
    with soundfile.SoundFile(path) as file:
        assert file.title == "A piece"
        assert "Alexander Holm" in file.comment
        assert "seed 7" in file.comment
    assert [path] == list(tmp_path.iterdir())


def test_an_open_file_needs_a_format():
    buffer = io.BytesIO()
    write_audio(make_performance(1, notes=5), buffer, format="wav")
    assert buffer.getvalue().startswith(b"RIFF")
    with pytest.raises(AudioError, match="wav, flac, mp3"):
        write_audio(make_performance(1, notes=5), io.BytesIO())


def test_an_unknown_format_leaves_no_file(tmp_path):
    with pytest.raises(AudioError, match="'aiff'"):
        write_audio(make_performance(1, notes=5), tmp_path / "piece.aiff")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "piece.wav"
    path.write_bytes(b"old")

    def fail(_):
        raise MemoryError

    monkeypatch.setattr(synthesis, "render", fail)
    with pytest.raises(MemoryError):
        write_audio(make_performance(1, notes=5), path)
    assert [path.read_bytes()] == [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]
