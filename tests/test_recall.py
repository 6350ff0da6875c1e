"""What is recalled from earlier in a piece: by hand, by plain search, in one pass and token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from reference_model import recall_features

from music_ar.features import keyboard, retrieval
from music_ar.tokens import vocabulary

ON, OFF, SHIFT, VELOCITY = vocabulary.NOTE_ON, vocabulary.NOTE_OFF, vocabulary.TIME_SHIFT - 1, vocabulary.VELOCITY - 1
FEW = [vocabulary.START, ON + 60, ON + 61, ON + 62, OFF + 60, SHIFT + 3, VELOCITY + 5, VELOCITY + 6, vocabulary.PAD]


@st.composite
def chords(draw):
    """The same chords again and again, struck in any order."""
    chord = st.sampled_from([(60, 61), (60, 61, 62), (60, 62, 64, 67), (50, 55)])
    return np.array([ON + pitch for one in draw(st.lists(chord, max_size=30)) for pitch in draw(st.permutations(one))])


# Of so few pitches that everything returns.
TOKENS = hnp.arrays(np.int32, st.integers(1, 90), elements=st.sampled_from(FEW)) | chords().map(
    lambda notes: np.concatenate([[vocabulary.START], notes]).astype(np.int32)
)
REACHES = st.sampled_from([12, 24, 100])


def melody(pitches, steps=10):
    """A note every so many steps, each louder than the last by a bin; beginning with a start."""
    notes = [
        [VELOCITY + 1 + number % 32, ON + pitch, SHIFT + steps, OFF + pitch] for number, pitch in enumerate(pitches)
    ]
    return np.concatenate([[vocabulary.START], *notes]).astype(np.int32)


def alike(level, pitches, here, there):
    """Whether the notes up to two places are alike, by the words of the documentation."""
    if min(here, there) < level.notes - 1:
        return False
    one, other = (pitches[at - level.notes + 1 : at + 1] for at in (here, there))
    if level.by == "set":
        return here - there >= level.notes and sorted(one) == sorted(other)
    return list(one) == list(other) if level.by == "order" else list(np.diff(one)) == list(np.diff(other))


def searched(tokens, reach):
    """(level, note) that each note is like, by looking at every place."""
    pitches, found = tokens[tokens < vocabulary.NOTE_OFF], []
    for here in range(len(pitches)):
        places = [
            (number, there)
            for number, level in enumerate(retrieval.LEVELS)
            for there in range(here - 1, max(here - reach, -1), -1)
            if alike(level, pitches, here, there)
            and there == max(t for t in range(here) if keys_equal(level, pitches, here, t))
        ]
        found.append(places[0] if places else (-1, -1))
    return found


def keys_equal(level, pitches, here, there):
    """As `alike`, but for how near a set may be: the nearest place counts, or none."""
    if level.by == "set":
        one, other = (sorted(pitches[max(0, at - level.notes + 1) : at + 1]) for at in (here, there))
        return there >= level.notes - 1 and one == other
    return alike(level, pitches, here, there)


@given(tokens=TOKENS, reach=REACHES)
def test_places_are_those_that_a_plain_search_finds(tokens, reach):
    after = retrieval.after_each(tokens, reach)
    at = np.flatnonzero(tokens < vocabulary.NOTE_OFF)
    expected = searched(tokens, reach)
    assert [int(level) for level in after.level[at]] == [level for level, _ in expected]
    distances = [here - there if level >= 0 else -1 for here, (level, there) in enumerate(expected)]
    assert [int(distance) for distance in after.distance[at]] == distances


@given(tokens=TOKENS)
def test_between_notes_nothing_changes(tokens):
    after = retrieval.after_each(tokens, 24)
    for leaf in after:
        for index in np.flatnonzero(tokens >= vocabulary.NOTE_OFF):
            before = leaf[index - 1] if index else np.full_like(leaf[0], -1)
            np.testing.assert_array_equal(leaf[index], before)


@given(tokens=TOKENS, prompt=st.integers(1, 90), reach=REACHES)
def test_token_by_token_equals_one_pass(tokens, prompt, reach):
    """From a memory that NumPy made of a prompt, the rest in JAX."""
    prompt = min(prompt, len(tokens))
    step, velocity = keyboard.times_and_velocities(tokens)
    expected = retrieval.after_each(tokens, reach)
    memory = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], retrieval.prefill(tokens[:prompt], reach, last=1)[1])
    for index in range(prompt - 1, len(tokens)):
        if index >= prompt:
            memory = _advance(memory, tokens[index : index + 1], step[index : index + 1], velocity[index : index + 1])
        for found, leaf in zip(_recalled(memory), expected, strict=True):
            np.testing.assert_array_equal(found[0], leaf[index])


_advance, _recalled = jax.jit(retrieval.advance), jax.jit(retrieval.recalled)


def test_jax_computes_the_same():
    random = np.random.default_rng(0)
    tokens = random.choice(FEW, (3, 700)).astype(np.int32)
    expected = retrieval.after_each(tokens, 100)
    found = jax.jit(lambda tokens: retrieval.after_each(tokens, 100, jnp))(tokens)
    for here, there in zip(found, expected, strict=True):
        np.testing.assert_array_equal(here, there)
    features = jax.jit(lambda recalled: recall_features(recalled, jnp))(found)
    np.testing.assert_array_equal(features, recall_features(expected))
    for row, alone in enumerate(tokens):
        for leaf, whole in zip(retrieval.after_each(alone, 100, last=50), expected, strict=True):
            np.testing.assert_array_equal(leaf, whole[row, -50:])


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
def test_what_is_alike(again, level):
    after = retrieval.after_each(melody(THEME + OTHER + again), 1000)
    assert after.level[-1] == (-1 if level is None else retrieval.LEVELS.index(level))


def test_what_followed_by_hand():
    after = retrieval.after_each(melody(THEME + OTHER + THEME), 1000)
    assert after.distance[-1] == len(THEME + OTHER)
    np.testing.assert_array_equal(after.note[-1] // 64, OTHER[:4])
    np.testing.assert_array_equal(after.note[-1] % 64, 13 + np.arange(4))
    np.testing.assert_array_equal(after.wait[-1], [10] * 4)


def test_what_followed_is_moved_to_the_key_of_now():
    after = retrieval.after_each(melody(THEME + OTHER + tuple(pitch + 3 for pitch in THEME)), 1000)
    np.testing.assert_array_equal(after.note[-1] // 64, np.array(OTHER[:4]) + 3)
    np.testing.assert_array_equal(after.note[-1] % 64, 13 + np.arange(4))
    # Notes that the keyboard does not have are not told.
    low = retrieval.after_each(melody((*THEME, 5, 40, 5, 40, *(pitch - 30 for pitch in THEME))), 1000)
    np.testing.assert_array_equal(low.note[-1] // 64, [-1, 10, -1, 10])


def test_a_figure_that_repeats_goes_on():
    after = retrieval.after_each(melody((60, 64, 67) * 5), 1000)
    assert after.distance[-1] == 3
    np.testing.assert_array_equal(after.note[-1] // 64, [60, 64, 67, 60])


def test_what_is_further_back_than_it_reaches_is_not_recalled():
    tokens, distance = melody(THEME + OTHER + THEME), len(THEME + OTHER)
    assert retrieval.after_each(tokens, distance + 1).level[-1] == 0
    assert retrieval.after_each(tokens, distance).level[-1] == -1


def test_features_by_hand():
    after = retrieval.after_each(melody(THEME + OTHER + THEME), 1000)
    features = recall_features(after)[-1]
    assert features.shape == (retrieval.feature_count(),)
    levels = len(retrieval.LEVELS)
    np.testing.assert_array_equal(np.flatnonzero(features[:levels]), [0])
    np.testing.assert_array_equal(np.flatnonzero(features[levels : levels + 16]), [4])  # 26 notes ago: 16 to 31
    pitches = features[levels + 16 :][: 4 * 128].reshape(4, 128)
    np.testing.assert_array_equal(np.argwhere(pitches)[:, 1], OTHER[:4])
    assert not recall_features(after)[0].any()
