"""Returns of a prompt and texture, on pieces whose values are counted by hand."""

import numpy as np
import pytest

from music_ar.metrics.form import returning_share, texture, texture_distances
from music_ar.midi.performance import Performance

THEME = [60, 64, 62, 67, 65, 69, 60]


def played(pitches, *, step_s=0.5, start_s=0.0, length_s=0.25):
    onset_s = start_s + step_s * np.arange(len(pitches))
    return Performance(
        onset_s=onset_s, offset_s=onset_s + length_s, pitch=np.array(pitches, int), velocity=np.full(len(pitches), 64)
    )


@pytest.mark.parametrize(
    ("later", "share"),
    [
        (THEME, 1.0),
        ([pitch + 5 for pitch in THEME], 1.0),  # in another key
        (THEME[:6], 1.0),
        (THEME[:5], 0.0),  # too short for a run
        ([30, 90, *THEME[:6], 30, 90], 6 / 10),
        (THEME[::-1], 0.0),
        ([40] * 8, 0.0),
        ([], 0.0),
    ],
)
def test_returning_share(later, share):
    prompt = played(THEME)
    assert returning_share(prompt, played(later, step_s=0.2, start_s=40)) == pytest.approx(share)


@pytest.mark.parametrize(
    "figure",
    [[72, 74] * 6, list(range(40, 52)), [60, 62, 64, 65, 67, 69, 71, 72], [72, 70, 68, 67, 65, 63, 62, 60], [60] * 12],
)
def test_trills_scales_and_repeated_notes_do_not_return(figure):
    assert returning_share(played([*THEME, *figure]), played(figure)) == 0.0


def test_chords_return_in_any_order():
    chord = [60, 64, 67]
    prompt = Performance(
        onset_s=np.repeat([0.0, 1.0], 3),
        offset_s=np.repeat([0.5, 1.5], 3),
        pitch=np.array(chord * 2),
        velocity=np.full(6, 64),
    )
    spread = np.array([0.0, 0.01, 0.02, 1.0, 1.01, 1.02])
    later = Performance(
        onset_s=spread, offset_s=spread + 1, pitch=np.array(chord[::-1] + chord), velocity=np.full(6, 64)
    )
    assert returning_share(prompt, later) == 1.0


def test_texture_by_hand():
    # 10 notes in the first 5 s, each sounding half of its 0.5 s; 2 long ones in the next; nothing in the last.
    piece_s = np.append(np.arange(0, 5, 0.5), [5.0, 6.0])
    ends_s = np.append(np.arange(0, 5, 0.5) + 0.25, [10.0, 10.0])
    piece = Performance(
        onset_s=piece_s, offset_s=ends_s, pitch=np.array([60] * 10 + [40, 50]), velocity=np.full(12, 64)
    )
    found = texture(piece, 0.0, 15.0)
    np.testing.assert_allclose(found.density, [2.0, 0.4, 0.0])
    np.testing.assert_allclose(found.register, [60, 45])
    np.testing.assert_allclose(found.polyphony, [0.5, 9 / 5, 0.0])


def test_distance_of_textures():
    slow, fast = played([60] * 10, step_s=1.0), played([72] * 40, step_s=0.25)
    distances = texture_distances(texture(slow, 0, 10), texture(fast, 0, 10))
    assert distances == pytest.approx({"density": 3.0, "register": 12.0, "polyphony": 0.75})
    silent = texture_distances(texture(slow, 0, 10), texture(slow, 20, 30))
    assert silent["register"] is None
    assert silent["density"] == pytest.approx(1.0)
