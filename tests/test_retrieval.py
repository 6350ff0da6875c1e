"""What is retrieved from earlier in a piece: by hand, and by plain search; `test_features` has the laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from event_tokens import melody, token_sequences
from hypothesis import given
from hypothesis import strategies as st
from reference_model import retrieval_features

from music_ar.features import retrieval
from music_ar.tokens.vocabulary import NOTE_OFF

TOKENS = token_sequences(min_size=1)
CAPACITIES = st.sampled_from([12, 24, 100])


def match(level, pitches, newest, earlier):
    """Whether the notes up to two places match, by the documentation."""
    if min(newest, earlier) < level.notes - 1:
        return False
    one, other = (pitches[at - level.notes + 1 : at + 1] for at in (newest, earlier))
    if level.by == "set":
        return newest - earlier >= level.notes and sorted(one) == sorted(other)
    return list(one) == list(other) if level.by == "order" else list(np.diff(one)) == list(np.diff(other))


def same_key(level, pitches, newest, earlier):
    """As `match`, but a set may overlap: the nearest place with the same key counts, or none."""
    if level.by == "set":
        one, other = (sorted(pitches[max(0, at - level.notes + 1) : at + 1]) for at in (newest, earlier))
        return earlier >= level.notes - 1 and one == other
    return match(level, pitches, newest, earlier)


def searched(tokens, capacity):
    """(level, number) of each note's match, by looking at every earlier note."""
    pitches, found = tokens[tokens < NOTE_OFF], []
    for newest in range(len(pitches)):
        matches = [
            (number, earlier)
            for number, level in enumerate(retrieval.LEVELS)
            for earlier in range(newest - 1, max(newest - capacity, -1), -1)
            if match(level, pitches, newest, earlier)
            and earlier == max(place for place in range(newest) if same_key(level, pitches, newest, place))
        ]
        found.append(matches[0] if matches else (-1, -1))
    return found


@given(tokens=TOKENS, capacity=CAPACITIES)
def test_matches_are_those_of_a_plain_search(tokens, capacity):
    after = retrieval.scan_each(tokens, capacity)
    at = np.flatnonzero(tokens < NOTE_OFF)
    expected = searched(tokens, capacity)
    assert after.level[at].tolist() == [level for level, _ in expected]
    distances = [newest - earlier if level >= 0 else -1 for newest, (level, earlier) in enumerate(expected)]
    assert after.distance[at].tolist() == distances


@given(tokens=TOKENS)
def test_only_note_ons_change_what_is_retrieved(tokens):
    for leaf in retrieval.scan_each(tokens, 24):
        for index in np.flatnonzero(tokens >= NOTE_OFF):
            before = leaf[index - 1] if index else np.full_like(leaf[0], -1)
            np.testing.assert_array_equal(leaf[index], before)


THEME = (60, 64, 67, 72, 71, 69, 65, 62, 59, 57, 55, 53)
OTHER = (40, 43, 47, 50, 41, 45, 48, 52, 39, 42, 44, 46, 49, 51)


@pytest.mark.parametrize(
    ("again", "level"),
    [
        (THEME, ("order", 12)),
        ((*THEME[3:11], 99, *THEME[3:9]), ("order", 6)),
        (THEME[:4][::-1] + THEME[4:8][::-1] + THEME[8:][::-1], ("set", 12)),
        (tuple(pitch + 3 for pitch in THEME[1:11]), ("interval", 9)),
        ((99, *THEME[5:9]), ("order", 4)),
        ((99, *THEME[6:9]), None),
    ],
)
def test_each_level(again, level):
    after = retrieval.scan_each(melody(THEME + OTHER + again), 1000)
    assert after.level[-1] == (-1 if level is None else retrieval.LEVELS.index(level))


def test_what_followed_by_hand():
    after = retrieval.scan_each(melody(THEME + OTHER + THEME), 1000)
    assert after.distance[-1] == len(THEME + OTHER)
    np.testing.assert_array_equal(after.note[-1] // 64, OTHER[:4])
    np.testing.assert_array_equal(after.note[-1] % 64, 13 + np.arange(4))
    np.testing.assert_array_equal(after.interval[-1], [10] * 4)


def test_what_followed_is_moved_to_the_present_key():
    after = retrieval.scan_each(melody(THEME + OTHER + tuple(pitch + 3 for pitch in THEME)), 1000)
    np.testing.assert_array_equal(after.note[-1] // 64, np.array(OTHER[:4]) + 3)
    np.testing.assert_array_equal(after.note[-1] % 64, 13 + np.arange(4))
    # Pitches below 0 are left out.
    low = retrieval.scan_each(melody((*THEME, 5, 40, 5, 40, *(pitch - 30 for pitch in THEME))), 1000)
    np.testing.assert_array_equal(low.note[-1] // 64, [-1, 10, -1, 10])


def test_a_repeated_figure_continues():
    after = retrieval.scan_each(melody((60, 64, 67) * 5), 1000)
    assert after.distance[-1] == 3
    np.testing.assert_array_equal(after.note[-1] // 64, [60, 64, 67, 60])


def test_matches_are_among_the_notes_that_are_kept():
    tokens, distance = melody(THEME + OTHER + THEME), len(THEME + OTHER)
    assert retrieval.scan_each(tokens, distance + 1).level[-1] == 0
    assert retrieval.scan_each(tokens, distance).level[-1] == -1


def test_features_by_hand():
    after = retrieval.scan_each(melody(THEME + OTHER + THEME), 1000)
    features = retrieval_features(after)
    assert features.shape[-1] == retrieval.feature_count()
    levels = len(retrieval.LEVELS)
    last = features[-1]
    np.testing.assert_array_equal(np.flatnonzero(last[:levels]), [0])
    np.testing.assert_array_equal(np.flatnonzero(last[levels : levels + 16]), [4])  # 26 notes ago: 16 to 31
    pitches = last[levels + 16 :][: 4 * 128].reshape(4, 128)
    np.testing.assert_array_equal(np.argwhere(pitches)[:, 1], OTHER[:4])
    assert not features[0].any()
    compiled = jax.jit(retrieval_features)(jax.tree.map(jnp.asarray, after))
    np.testing.assert_array_equal(compiled, features)


def test_nothing_retrieved_has_no_features():
    assert not retrieval_features(retrieval.nothing((2, 3))).any()
