"""The last notes and their features, by hand; `test_features` has the laws."""

import jax
import jax.numpy as jnp
import numpy as np
from event_tokens import SECOND, off, on, shift, token_sequences, tokens_of, velocity
from hypothesis import given
from hypothesis import strategies as st

from music_ar.features import notes
from music_ar.features.categorical import hot_indices, one_hot
from music_ar.features.keyboard import times_and_velocities

TOKENS = tokens_of(shift(5), velocity(9), on(60), on(64), SECOND, off(60), velocity(3), on(62))


def features_of(tokens, onsets):
    """One-hot features after each token."""
    return one_hot(notes.categories(notes.scan_each(tokens, onsets), times_and_velocities(tokens)[0]))


def test_the_rolling_buffer_by_hand():
    """Note number i is in slot i mod 2."""
    state = notes.scan(TOKENS, 2)
    assert (state.count, state.note.tolist(), state.time.tolist()) == (3, [62 * 64 + 3, 64 * 64 + 9], [105, 5])
    latest = notes.latest(state, 2)
    assert (latest.note.tolist(), latest.time.tolist()) == ([62 * 64 + 3, 64 * 64 + 9], [105, 5])
    assert notes.latest(notes.scan(TOKENS[:3], 2), 2).note.tolist() == [60 * 64 + 9, -1]


def test_onsets_by_hand():
    after = notes.scan_each(TOKENS, 2)
    np.testing.assert_array_equal(after.note[2], [60 * 64 + 9, -1])
    np.testing.assert_array_equal(after.note[6], [64 * 64 + 9, 60 * 64 + 9])
    np.testing.assert_array_equal(after.note[7], [62 * 64 + 3, 64 * 64 + 9])
    np.testing.assert_array_equal(after.time[7], [105, 5])


def test_features_by_hand():
    tokens = tokens_of(velocity(16), on(60), shift(32), on(62), off(60), shift(32))
    features = features_of(tokens, 2)
    assert features.shape[-1] == notes.feature_count(2)
    since, pitches = features[:, :48], features[:, 48 : 48 + 256].reshape(-1, 2, 128)
    velocities, intervals = features[:, 304 : 304 + 66].reshape(-1, 2, 33), features[:, 370:].reshape(-1, 2, 48)
    assert since[0].sum() == 0  # no note yet
    assert (np.argmax(since[1]), np.argmax(since[2])) == (0, 21)  # now; 32 steps ago
    np.testing.assert_array_equal(np.argmax(pitches[5], axis=-1), [62, 60])
    np.testing.assert_array_equal(np.argmax(velocities[5], axis=-1), [16, 16])
    np.testing.assert_array_equal(np.argwhere(intervals[5]), [[0, 21]])  # the older one's is unknown


def test_interval_classes_are_exact_for_short_times_and_widen():
    """Each of the first steps has its own class; the last classes have hundreds of steps."""
    tokens = np.concatenate([[velocity(16), on(60)], np.full(900, shift(1))]).astype(np.int32)
    classes = np.argmax(features_of(tokens, 1)[1:, :48], axis=-1)
    assert classes[:4].tolist() == [0, 2, 4, 6]
    assert (np.diff(classes) >= 0).all()
    assert len(set(classes[:7].tolist())) == 7
    assert (classes[0], classes[-1]) == (0, 47)
    assert (classes == 46).sum() > 50


def test_hot_indices_are_where_the_ones_are():
    tokens = tokens_of(velocity(16), on(60), shift(32), on(62), off(60), shift(32), on(64))
    categories = notes.categories(notes.scan_each(tokens, 2), times_and_velocities(tokens)[0])
    indices = hot_indices(categories)
    for places, row in zip(indices, one_hot(categories), strict=True):
        np.testing.assert_array_equal(np.sort(places[places >= 0]), np.flatnonzero(row))
    assert (indices[0] < 0).all()  # no note yet
    assert (indices[-1] >= 0).sum() == 6  # two notes, but what was before the older one is unknown


@given(tokens=token_sequences(min_size=1, max_size=40), earlier=st.integers(0, 5000))
def test_features_depend_on_differences_of_time_alone(tokens, earlier):
    waiting = np.full(earlier // 100, SECOND, np.int32)
    later = features_of(np.concatenate([waiting, tokens]), 3)
    np.testing.assert_array_equal(features_of(tokens, 3), later[len(waiting) :])


def test_jax_computes_the_same_features():
    tokens = np.random.default_rng(0).integers(0, 388, (3, 400), np.int32)
    compiled = jax.jit(lambda tokens: features_of(tokens, 4))
    np.testing.assert_array_equal(compiled(jnp.asarray(tokens)), features_of(tokens, 4))
