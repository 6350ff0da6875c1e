"""`Request`: options by keyword, ranges, variations, and prompts as tokens."""

import dataclasses

import numpy as np
import pytest
from event_tokens import on, performance_of

from music_ar.decoding.request import MAX_SEED, GenerationError, Request, limits, stuck_error
from music_ar.decoding.sampling import SamplingError, SamplingOptions
from music_ar.midi.io import read_midi, write_midi
from music_ar.midi.performance import MidiError, Performance
from music_ar.tokens import vocabulary
from music_ar.tokens.codec import encode, event_steps

PROMPT = performance_of([(0.0, 1.0, 60, 65), (0.5, 2.0, 64, 65), (3.0, 4.0, 67, 81)])


def test_options_are_fields_of_the_request_and_of_its_sampling():
    request = Request.of(PROMPT, seconds=5.0, seed=3, temperature=0.5, top_k=4)
    assert request == Request(prompt=PROMPT, seconds=5.0, seed=3, sampling=SamplingOptions(temperature=0.5, top_k=4))
    assert Request.of() == Request()


def test_a_request_is_changed_by_the_options_that_are_given():
    request = Request.of(PROMPT, seconds=5.0, temperature=0.5)
    changed = Request.of(request, seconds=7.0, min_p=0.1)
    assert changed == dataclasses.replace(request, seconds=7.0, sampling=SamplingOptions(temperature=0.5, min_p=0.1))
    assert Request.of(request) == request
    whole = Request.of(request, sampling=SamplingOptions(top_k=3), top_p=0.5)
    assert whole.sampling == SamplingOptions(top_k=3, top_p=0.5)


def test_an_unknown_option_is_refused_with_the_known_ones():
    with pytest.raises(GenerationError, match=r"unknown option mode; expected any of prompt, .*seconds.*temperature"):
        Request.of(None, mode="exact", seconds=3.0)


@pytest.mark.usefixtures("any_types")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 0.0}, "seconds must be a number above 0 and at most 86400, got 0"),
        ({"seconds": float("inf")}, "seconds"),
        ({"seconds": float("nan")}, "seconds"),
        ({"seconds": 3e7}, "seconds .* at most 86400, got 30000000"),
        ({"seconds": True}, "seconds .*, got true"),
        ({"seconds": "60"}, 'seconds .*, got "60"'),
        ({"seed": -1}, "seed must be a whole number from 0 to 2147483647, got -1"),
        ({"seed": 2**31}, "seed must be"),
        ({"seed": 10**400}, "seed must be .* got a number of 401 digits"),
        ({"seed": 1.0}, "seed must be a whole number"),
        ({"latents": "all"}, 'latents must be a whole number of at least 2, or auto, got "all"'),
        ({"seed": 2**31 - 2, "variations": 3}, "first of 3 variations"),
        ({"variations": 0}, "variations must be a whole number from 1 to 10000, got 0"),
        ({"speed": 2.0}, 'speed = 2.0 needs latents = "auto"'),
        ({"latents": 32, "speed": 2.0}, 'needs latents = "auto"'),
        ({"latents": "auto", "speed": 0.0}, "speed must be a number above 0"),
        ({"prompt": PROMPT, "prompt_seconds": 0.0}, "prompt_seconds must be a number above 0"),
        ({"prompt": PROMPT, "prompt_seconds": float("nan")}, "prompt_seconds"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(GenerationError, match=message):
        Request.of(**options)


def test_a_sampling_option_out_of_range_is_refused():
    with pytest.raises(SamplingError, match="temperature"):
        Request.of(temperature=-1.0)


# Seeds and variations.


def test_a_seed_is_drawn_once_where_there_is_none():
    seeds = {Request(variations=5).with_seed().seed for _ in range(20)}
    assert len(seeds) > 10
    assert all(seed is not None and 0 <= seed <= MAX_SEED - 4 for seed in seeds)
    assert Request(seed=0).with_seed() == Request(seed=0)


def test_the_largest_seeds_are_never_exceeded(monkeypatch):
    monkeypatch.setattr("secrets.randbelow", lambda below: below - 1)
    drawn = Request(variations=3).with_seed()
    assert [sample.seed for sample in drawn.samples()] == [MAX_SEED - 2, MAX_SEED - 1, MAX_SEED]


def test_samples_have_the_seeds_that_follow():
    request = Request(prompt=PROMPT, seed=5, variations=3, tag="a", sampling=SamplingOptions(top_k=3))
    samples = list(request.samples())
    assert samples == [dataclasses.replace(request, variations=1, seed=seed) for seed in (5, 6, 7)]
    assert list(samples[1].samples()) == [samples[1]]
    drawn = [sample.seed for sample in Request(variations=3).samples()]
    assert drawn[0] is not None
    assert drawn == [drawn[0], drawn[0] + 1, drawn[0] + 2]


# Prompts.


def test_a_prompt_is_read_once(tmp_path):
    path = tmp_path / "prompt.mid"
    write_midi(PROMPT, path)
    with path.open("rb") as file:
        for prompt in (path, str(path), path.read_bytes(), file):
            read = Request(prompt=prompt, seconds=3.0).read()
            assert read == Request(prompt=read_midi(path), seconds=3.0)
            assert read.read() is read
            assert read.prompt_tokens().tolist() == Request(prompt=PROMPT).prompt_tokens().tolist()
        assert file.read() == b""  # it could not be read again
    assert Request().read() == Request()


def test_what_is_no_midi_file_is_refused():
    for use in (Request.read, Request.prompt_tokens):
        with pytest.raises(MidiError):
            use(Request(prompt=b"not MIDI"))


def test_prompt_tokens_are_those_of_its_events():
    assert Request().prompt_tokens().tolist() == [vocabulary.START]
    assert Request(prompt=PROMPT).prompt_tokens().tolist() == [vocabulary.START, *encode(PROMPT)]


@pytest.mark.parametrize("limit_s", [0.25, 0.5, 0.99, 1.0, 2.5, 3.0, 9.0])
def test_prompt_seconds_keep_events_up_to_the_last_note_within(limit_s):
    """Notes that sound at the cut have no note-off, so they are held."""
    tokens = Request(prompt=PROMPT, prompt_seconds=limit_s).prompt_tokens()
    whole = np.concatenate([[vocabulary.START], encode(PROMPT)])
    np.testing.assert_array_equal(tokens, whole[: len(tokens)])
    kept = vocabulary.is_note(whole) & (event_steps(whole) <= limit_s * 100)
    assert vocabulary.is_note(tokens[-1])
    assert vocabulary.is_note(tokens).sum() == kept.sum()
    assert on(60) in tokens


def test_prompts_without_notes_are_refused():
    with pytest.raises(GenerationError, match="no notes in the prompt"):
        Request(prompt=Performance.empty()).prompt_tokens()
    with pytest.raises(GenerationError, match="no notes in the first 2 s of the prompt"):
        Request(prompt=PROMPT.shift(10.0), prompt_seconds=2.0).prompt_tokens()
    with pytest.raises(GenerationError, match=r"prompt_seconds = 3\.0 needs a prompt"):
        Request(prompt_seconds=3.0).prompt_tokens()


def test_limits_are_a_length_and_enough_tokens_for_the_densest_music():
    assert limits(2.0) == (200, 1500)
    assert limits(0.001)[0] == 1


def test_more_events_than_any_music_has_mean_that_time_stands_still():
    assert stuck_error(500, 0) is None
    assert stuck_error(500 + 1000, 200) is None
    said = "the model wrote 1,501 events for 2.0 s of music and hardly lets time pass"
    assert said in (stuck_error(1501, 200) or "")
