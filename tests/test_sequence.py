"""`Sequence` gives what `decode` gives for all tokens, in whatever chunks they come."""

import numpy as np
import pytest
from event_tokens import SECOND, off, on, performances, shift, token_sequences, tokens_of, velocity
from hypothesis import given
from hypothesis import strategies as st

from music_ar.decoding import sequence as module
from music_ar.decoding.request import Request
from music_ar.decoding.sequence import Sequence
from music_ar.midi.performance import Performance
from music_ar.tokens import codec, vocabulary
from music_ar.tokens.codec import decode, length_steps
from music_ar.tokens.vocabulary import END, PAD, START


def rows_in(performance: Performance) -> list[tuple[float, float, int, int]]:
    columns = (performance.onset_s, performance.offset_s, performance.pitch, performance.velocity)
    return list(zip(*(column.tolist() for column in columns), strict=True))


CHUNKED = st.tuples(token_sequences(), token_sequences(max_size=20), st.lists(st.integers(0, 30), max_size=12))


def final_until_steps(tokens):
    """By definition: the onset of the first note that is still held, or the time of the last event."""
    held: dict[int, list[int]] = {}
    time = 0
    for token in tokens.tolist():
        if token < vocabulary.NOTE_OFF:
            held.setdefault(token, []).append(time)
        elif token < vocabulary.TIME_SHIFT:
            del held.get(token - vocabulary.NOTE_OFF, [])[:1]
        elif token < vocabulary.VELOCITY:
            time += token - vocabulary.TIME_SHIFT + 1
    return min([time, *(onset for onsets in held.values() for onset in onsets)])


@given(CHUNKED)
def test_the_performance_is_that_of_all_tokens_however_they_are_chunked(chunked):
    tokens, prompt, sizes = chunked
    tokens = tokens[tokens != END]
    sequence, taken = Sequence(np.append(np.int32(START), prompt)), 0
    all_tokens = sequence.prompt
    for size in [*sizes, len(tokens)]:
        assert not sequence.add(tokens[taken : taken + size])
        taken = min(taken + size, len(tokens))
        all_tokens = np.concatenate([sequence.prompt, tokens[:taken]])
        if size % 2 == 0:  # what is looked at in between changes nothing
            assert sequence.notes().performance() == decode(all_tokens)
            assert sequence.notes().final_s == final_until_steps(all_tokens) / 100
    assert sequence.notes().performance() == decode(all_tokens)
    assert sequence.notes().final_s == final_until_steps(all_tokens) / 100
    np.testing.assert_array_equal(sequence.tokens, tokens[tokens != PAD])
    assert (sequence.count, sequence.ended) == (len(sequence.tokens), False)
    assert sequence.time == length_steps(all_tokens)
    assert (sequence.prompt_time, sequence.generated_steps) == (length_steps(sequence.prompt), length_steps(tokens))


def test_held_notes_end_at_the_last_event():
    sequence = Sequence(tokens_of(START, velocity(5), on(60), SECOND))
    sequence.add(tokens_of(on(64), shift(50)))
    assert sequence.notes().performance().offset_s.tolist() == [1.5, 1.5]
    sequence.add(tokens_of(off(60), shift(50)))
    assert sequence.notes().performance().offset_s.tolist() == [1.5, 2.0]


def test_notes_are_final_before_the_first_held_one():
    """Of three notes, two of one pitch, of which the older ends first."""
    sequence = Sequence(tokens_of(START, velocity(1), on(60), SECOND, on(64), SECOND, on(60), SECOND))
    final_s = [sequence.notes().final_s]
    for token in (off(60), off(64), off(60)):
        sequence.add(tokens_of(token))
        final_s.append(sequence.notes().final_s)
    assert final_s == [0.0, 1.0, 2.0, 3.0]


# The prompt's own notes, and moments.


@given(performances(), st.floats(0.01, 6.0), token_sequences(max_size=30))
def test_a_prompts_own_notes_come_back_before_what_the_tokens_say(played, prompt_seconds, tokens):
    """Those that sound at the cut end as the tokens say."""
    tokens = tokens[tokens != END]
    step = codec.quantize(played.onset_s)
    if not len(played) or prompt_seconds * 100 < step.min():
        return
    prompt = Request(prompt=played, prompt_seconds=prompt_seconds).prompt_tokens()
    sequence = Sequence(prompt, played)
    sequence.add(tokens)
    piece, decoded = sequence.notes().performance(), decode(np.concatenate([prompt, tokens[tokens != PAD]]))
    assert len(piece) == len(decoded)
    own = played.select(step <= sequence.prompt_time)
    complete = np.maximum(codec.quantize(own.offset_s), codec.quantize(own.onset_s) + 1) <= sequence.prompt_time
    left = rows_in(piece)
    for row in rows_in(own.select(complete)):
        left.remove(row)  # it is there, with its own end
    for row in rows_in(own.select(~complete)):
        del left[next(place for place, other in enumerate(left) if other[0] == row[0] and other[2:] == row[2:])]
    new = decoded.select(codec.quantize(decoded.onset_s) >= sequence.prompt_time)
    assert {row[0] for row in left} <= set(new.onset_s.tolist())


@given(CHUNKED)
def test_added_notes_are_those_that_become_final(chunked):
    """Each once, in order; with the open ones they are the piece. An earlier moment stays as it was."""
    tokens, prompt, sizes = chunked
    tokens = tokens[tokens != END]
    sequence, taken, earlier, rows, moments = Sequence(np.append(np.int32(START), prompt)), 0, None, [], []
    for size in [*sizes, len(tokens)]:
        sequence.add(tokens[taken : taken + size])
        taken += size
        notes = sequence.notes()
        added = rows_in(notes.added(earlier))
        assert [row[0] for row in rows + added] == sorted(row[0] for row in rows + added)
        rows, earlier = rows + added, notes
        whole = rows_in(notes.performance())
        assert sorted(rows + rows_in(notes.open())) == sorted(whole)
        assert rows == [row for row in whole if row[0] < notes.final_s]
        moments.append((notes, whole))
    for notes, whole in moments:
        assert rows_in(notes.performance()) == whole


def test_the_continuation_is_timed_from_the_end_of_the_prompt():
    sequence = Sequence(tokens_of(START, velocity(5), on(60), SECOND, off(60)))
    sequence.add(tokens_of(shift(50), on(62), shift(30), off(62)))
    notes = sequence.notes()
    assert notes.join_s == 1.0
    assert [row[:3] for row in rows_in(notes.performance(continuation_only=True))] == [(0.5, 0.8, 62)]
    assert [row[:3] for row in rows_in(notes.performance(1.6))] == [(0.0, 1.0, 60), (1.5, 1.6, 62)]


# Limits.

TOKENS = tokens_of(velocity(5), on(60), shift(30), on(62), shift(30), off(60), shift(60))


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({"limit_steps": 30}, 3),
        ({"limit_steps": 31}, 5),
        ({"limit_steps": 120}, 7),
        ({"max_tokens": 4}, 4),
        ({"max_tokens": 4, "limit_steps": 30}, 3),
        ({"max_tokens": 2, "limit_steps": 30}, 2),
    ],
)
@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_tokens_up_to_the_one_that_reaches_a_limit_are_taken(limits, kept, chunk):
    """Wherever chunks begin; the prompt does not count."""
    sequence = Sequence(tokens_of(START, SECOND))
    for first in range(0, len(TOKENS), chunk):
        done = sequence.add(TOKENS[first : first + chunk], **limits)
        assert done == (first + chunk >= kept)
        if done:
            break
    np.testing.assert_array_equal(sequence.tokens, TOKENS[:kept])


def test_limits_beyond_the_tokens_are_not_reached():
    assert not Sequence(tokens_of(START)).add(TOKENS, limit_steps=121, max_tokens=8)


def test_a_piece_that_ends_takes_nothing_more():
    sequence = Sequence(tokens_of(START))
    assert sequence.add(tokens_of(velocity(5), on(60), shift(1), off(60), END, PAD, PAD))
    assert (sequence.ended, sequence.count) == (True, 5)
    sequence.add(tokens_of(PAD, PAD))
    assert (sequence.tokens[-1], sequence.count, sequence.ended) == (END, 5, True)


def test_nll_is_that_of_the_kept_tokens():
    sequence = Sequence(tokens_of(START))
    sequence.add(np.append(np.int32(PAD), TOKENS[:2]), np.array([9, 1, 2], np.float32))
    sequence.add(TOKENS[2:], np.array([3, 4, 5, 6, 7], np.float32), limit_steps=60)
    assert sequence.nats.tolist() == [1, 2, 3, 4, 5]
    assert Sequence(tokens_of(START)).nats.tolist() == []


def test_each_token_is_read_once(monkeypatch):
    """Work is linear in the tokens: what is read again is the held notes alone."""
    lengths = []
    monkeypatch.setattr(module, "pair_notes", lambda tokens: lengths.append(len(tokens)) or codec.pair_notes(tokens))
    sequence = Sequence(tokens_of(START, velocity(5), on(30)))  # held throughout
    notes = np.concatenate([[on(60 + number % 20), shift(5), off(60 + number % 20)] for number in range(400)])
    for chunk in np.split(notes.astype(np.int32), 100):
        sequence.add(chunk)
        assert sequence.notes().final_s == 0.0
        sequence.notes().performance()
    assert len(sequence.notes().performance()) == 401
    assert sum(lengths) == 3 + len(notes) + 100  # and the held note in each chunk
