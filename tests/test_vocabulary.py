"""The vocabulary is note-seq's, and its masks tell the token types apart."""

import numpy as np
import pytest

from music_ar.tokens import vocabulary
from music_ar.tokens.vocabulary import EventError, flat_integers


def test_the_vocabulary_is_that_of_note_seq_and_three_control_tokens():
    v = vocabulary
    assert (v.NOTE_ON, v.NOTE_OFF, v.TIME_SHIFT, v.VELOCITY, v.EVENT_CLASSES) == (0, 128, 256, 356, 388)
    assert (v.PAD, v.START, v.END, v.VOCABULARY_SIZE) == (388, 389, 390, 391)


def test_fingerprint():
    assert vocabulary.FINGERPRINT == "343f09a5a086dbda934ad744c83af7e9f0ebbb57bfe49534912b252764d8ce44", (
        "the vocabulary or the encoding rules have changed, so prepared data sets and checkpoints made before cannot "
        "be used any more; if that is what you want, put the new fingerprint here"
    )


def test_every_token_has_one_type():
    tokens = np.arange(-1, vocabulary.VOCABULARY_SIZE + 1)
    note_off = vocabulary.is_note(tokens) & ~vocabulary.is_note_on(tokens)
    masks = [vocabulary.is_note_on(tokens), note_off, vocabulary.is_shift(tokens), vocabulary.is_velocity(tokens)]
    expected = np.repeat([-1, 0, 1, 2, 3, -1], [1, 128, 128, 100, 32, 4])
    assert [np.flatnonzero(found).tolist() for found in np.transpose(masks)] == [
        [] if of_type == -1 else [of_type] for of_type in expected
    ]
    boundaries = np.flatnonzero(np.diff(expected)) + tokens[0] + 1
    assert boundaries.tolist() == [0, *vocabulary.TYPE_STARTS]


@pytest.mark.parametrize("tokens", [np.zeros((2, 3), np.int32), np.array([1.5, 2.0]), np.array(["60"])])
def test_only_flat_integer_arrays_are_tokens(tokens):
    with pytest.raises(EventError, match="flat array of integers"):
        flat_integers(tokens)


def test_any_integer_type_will_do():
    for dtype in (np.uint8, np.uint16, np.int32, np.int64):
        found = flat_integers(np.array([0, 255], dtype))
        assert (found.tolist(), found.dtype) == ([0, 255], np.int64)
    assert flat_integers(np.array([])).dtype == np.int64
