"""Filling gaps: what comes before and after stays as it is, and what is between them lasts exactly as long as asked."""

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
from conftest import make_performance
from event_tokens import performance_of, rows_of
from flax import nnx
from test_cli import refusal, run

from app.web.session import Session
from app.web.settings import Settings, WebError
from music_ar.decoding import backend
from music_ar.decoding.gap_request import GapRequest
from music_ar.decoding.loading import load_decoder
from music_ar.decoding.request import GenerationError, Request
from music_ar.generator import Generator
from music_ar.midi.io import read_midi, read_prompt, write_midi
from music_ar.midi.performance import Performance
from music_ar.model.config import PRESETS
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.model.pretrained import save_pretrained
from music_ar.tokens import codec, gaps, vocabulary

CONTEXT = 512
BEFORE, AFTER = make_performance(1, 30), make_performance(2, 30)
OPTIONS: dict[str, Any] = {"seed": 3, "latents": 16}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model that can fill gaps and finds all events equally likely."""
    config = dataclasses.replace(
        PRESETS["tiny"], context=CONTEXT, onsets=2, vocabulary_size=vocabulary.INFILL_VOCABULARY_SIZE
    )
    folder = tmp_path_factory.mktemp("checkpoint") / "infill"
    save_pretrained(PerceiverAR(config, rngs=nnx.Rngs(0)), folder)
    return folder


@pytest.fixture(scope="module")
def generator(checkpoint):
    if not backend.native():
        pytest.skip("the native engine was not compiled")
    return Generator(load_decoder(checkpoint))


def parts_of(piece, begin_s, end_s):
    """The notes that begin before a gap, in it, and after it."""
    before, after = piece.onset_s < begin_s - 1e-6, piece.onset_s >= end_s - 1e-6
    return piece.select(before), piece.select(~before & ~after), piece.select(after)


def assert_no_key_is_struck_while_down(piece):
    for pitch in np.unique(piece.pitch):
        ours = piece.select(piece.pitch == pitch)
        assert (ours.onset_s[1:] >= ours.offset_s[:-1] - 1e-9).all()


def one_key_at_a_time(piece):
    """The piece without notes that begin while their key is down."""
    kept, until = np.ones(len(piece), bool), dict[int, float]()
    for note, (on_s, off_s, pitch) in enumerate(zip(piece.onset_s, piece.offset_s, piece.pitch.tolist(), strict=True)):
        kept[note] = on_s >= until.get(pitch, 0.0)
        if kept[note]:
            until[pitch] = off_s
    return piece.select(kept)


@pytest.mark.parametrize("seconds", [0.1, 0.73, 1.5])
def test_a_gap_is_filled_and_both_sides_stay(generator, seconds):
    before, after = one_key_at_a_time(BEFORE), one_key_at_a_time(AFTER)
    piece = generator.infill(before, after, seconds=seconds, **OPTIONS)
    end_s = before.duration_s
    first, middle, last = parts_of(piece, end_s, end_s + seconds)
    assert first == before
    assert len(middle) or seconds < 0.5
    assert np.array_equal(last.pitch, after.pitch)
    assert np.array_equal(last.velocity, after.velocity)
    np.testing.assert_allclose(last.onset_s - end_s - seconds, after.onset_s, atol=1e-9)
    np.testing.assert_allclose(last.offset_s - end_s - seconds, after.offset_s, atol=1e-9)
    assert_no_key_is_struck_while_down(piece)


def test_a_passage_is_made_anew_and_the_rest_stays(generator):
    piece = one_key_at_a_time(BEFORE)
    made = generator.generate(Request.replacing(piece, 1.0, 2.0, **OPTIONS))
    (before, old, after), (first, new, last) = parts_of(piece, 1.0, 2.0), parts_of(made, 1.0, 2.0)
    assert np.array_equal(first.onset_s, before.onset_s)
    assert np.array_equal(first.pitch, before.pitch)
    ended = before.offset_s <= 1.0
    assert np.array_equal(first.offset_s[ended], before.offset_s[ended])
    np.testing.assert_allclose(last.onset_s, after.onset_s, atol=1e-9)
    np.testing.assert_allclose(last.offset_s, after.offset_s, atol=1e-9)
    assert new != old
    assert_no_key_is_struck_while_down(made)


def test_keys_that_are_held_into_the_gap_are_released_after_its_beginning(generator):
    piece = performance_of([(0.0, 3.0, 60, 64), (0.5, 0.6, 62, 64), (2.5, 3.0, 65, 64)])
    made = generator.generate(Request.replacing(piece, 1.0, 2.0, **OPTIONS))
    assert made.offset_s[0] >= 1.0
    assert_no_key_is_struck_while_down(made)


@pytest.mark.parametrize(("before", "after"), [(None, AFTER), (BEFORE, None), (None, None)])
def test_either_side_may_be_missing(generator, before, after):
    piece = generator.infill(before, after, seconds=1.0, **OPTIONS)
    end_s = 0.0 if before is None else before.duration_s
    first, middle, last = parts_of(piece, end_s, end_s + 1.0)
    assert [len(first), len(last)] == [0 if part is None else len(part) for part in (before, after)]
    assert len(middle)


def test_nothing_rings_for_longer_than_keys_are_held(generator):
    piece = generator.infill(BEFORE, None, seconds=1.0, **OPTIONS)
    assert piece.duration_s <= BEFORE.duration_s + 1.0 + 10.0


def test_many_gaps_are_filled_as_each_alone(generator):
    requests = [
        Request.replacing(BEFORE, 1.0, 2.0, **OPTIONS),
        Request(prompt=BEFORE, after=AFTER, seconds=0.5, **OPTIONS),
        Request(prompt=BEFORE, seconds=1.0, **OPTIONS),
    ]
    pieces = list(generator.generate_many([dataclasses.replace(each, tag=n) for n, each in enumerate(requests)]))
    assert [piece.error for piece in pieces] == [None] * 3
    for piece in pieces:
        assert piece.performance == generator.generate(requests[piece.request.tag])


def test_a_gap_is_filled_once(generator):
    request = Request(prompt=BEFORE, after=AFTER, seconds=0.5, **OPTIONS)
    session = generator.session(request)
    assert list(session.extend(0.5))[-1].finished
    with pytest.raises(GenerationError, match="has been filled"):
        session.extend(0.5)


def test_a_prompts_file_is_kept_up_to_the_gap(generator, tmp_path):
    piece = one_key_at_a_time(codec.decode(codec.encode(BEFORE)))
    write_midi(piece, tmp_path / "piece.mid")
    prompt = read_prompt(tmp_path / "piece.mid")
    write_midi(generator.generate(Request.replacing(prompt, 1.0, 2.0, **OPTIONS)), tmp_path / "new.mid")
    made, kept = read_midi(tmp_path / "new.mid"), (piece.onset_s < 0.999) & (piece.offset_s < 0.999)
    rows = set(rows_of_file(made))
    assert rows.issuperset(rows_of_file(piece.select(kept)))
    assert rows.issuperset(rows_of_file(piece.select(piece.onset_s > 2.001)))


def rows_of_file(piece):
    columns = np.rint(1000 * piece.onset_s), np.rint(1000 * piece.offset_s), piece.pitch
    return list(zip(*(column.astype(int).tolist() for column in columns), strict=True))


# What a model is given.


def gap_of(before, after, seconds=1.0, begin_s=None, context=CONTEXT):
    gap = GapRequest.of(before, after, seconds, begin_s, context)
    assert gap is not None
    return gap


def test_a_short_piece_is_given_whole():
    gap = gap_of(BEFORE, AFTER)
    assert gap.cut is None
    assert len(gap.tokens) <= CONTEXT


def test_the_far_ends_of_a_long_piece_are_not_read_and_that_is_said():
    long = make_performance(5, 400)
    gap = gap_of(long, long)
    assert len(gap.tokens) <= CONTEXT - 100
    assert gap.cut is not None
    assert re.match(r"the model reads only \d s before it and \d s after it: ", gap.cut)
    before, whole = gaps.before_part(gap.tokens), codec.encode(long)
    assert np.array_equal(before, whole[len(whole) - len(before) :])


def test_keys_struck_again_end_what_rings():
    piece = performance_of([(0.0, 1.0, 60, 65), (1.5, 9.0, 60, 65), (1.6, 9.0, 62, 65), (1.7, 9.0, 64, 65)])
    after = performance_of([(0.5, 1.0, 60, 65), (1.0, 1.5, 60, 65), (2.0, 2.5, 64, 65)])
    filled = gap_of(performance_of([(0.0, 1.0, 60, 65)]), after).filled(piece)
    assert rows_of(filled) == [
        (0, 100, 60, 17), (150, 250, 60, 17), (160, 900, 62, 17), (170, 400, 64, 17), (250, 300, 60, 17),
        (300, 350, 60, 17), (400, 450, 64, 17),
    ]  # fmt: skip


# What is refused.


def test_a_model_that_was_not_trained_to_refuses(tiny_checkpoint):
    generator = Generator(load_decoder(tiny_checkpoint))
    with pytest.raises(GenerationError, match="this model cannot fill a gap"):
        generator.infill(BEFORE, AFTER, seconds=1.0)
    [piece] = generator.generate_many([Request(prompt=BEFORE, after=AFTER, seconds=1.0)])
    assert piece.error is not None
    assert "cannot fill a gap" in piece.error


@pytest.mark.parametrize("seconds", [0.05, 61.0])
def test_gaps_of_lengths_that_were_not_trained_are_refused(generator, seconds):
    with pytest.raises(GenerationError, match=r"a gap must last from 0\.1 s, a short note, to 60 s"):
        generator.infill(BEFORE, AFTER, seconds=seconds)


@pytest.mark.parametrize("passage", [(2.0, 99.0), (3.0, 3.0), (-1.0, 2.0), (3.0, 2.0)])
def test_a_passage_outside_of_the_piece_is_refused(passage):
    with pytest.raises(GenerationError, match=r"expected a passage from 0 s to at most .* where the piece ends"):
        Request.replacing(BEFORE, *passage)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(prompt=Performance.empty(), after=AFTER, seconds=1.0), "no notes in the prompt before the gap"),
        (Request(prompt_seconds=2.0, after=AFTER, seconds=1.0), "needs a prompt"),
    ],
)
def test_a_gap_without_what_it_needs_is_refused(generator, request_, message):
    with pytest.raises(GenerationError, match=message):
        generator.generate(request_)


def test_a_gap_that_does_not_fit_in_the_context_is_refused():
    with pytest.raises(GenerationError, match="a gap of 60 s does not fit in the 64 events"):
        Request(prompt=BEFORE, after=AFTER, seconds=60.0).gap(64)


# The command line.


@pytest.fixture
def files(tmp_path):
    write_midi(BEFORE, tmp_path / "a.mid")
    write_midi(AFTER.shift(2.0), tmp_path / "b.mid")
    return tmp_path / "a.mid", tmp_path / "b.mid"


def test_generate_joins_two_files_exactly(capsys, tmp_path, checkpoint, files):
    command = ["generate", "--output", tmp_path / "new.mid", "--checkpoint", checkpoint, "--latents", 16, "--seed", 1]
    code, printed, _ = run(capsys, *command, "--between", *files, "--seconds", 1.5)
    assert code == 0
    assert "new.mid" in printed
    made = read_midi(tmp_path / "new.mid")
    after = read_midi(files[1])
    expected = read_midi(files[0]).duration_s + 1.5 + after.onset_s - after.onset_s[0]
    assert np.abs(made.onset_s[-len(after) :] - expected).max() < 0.01


def test_generate_replaces_a_passage(capsys, tmp_path, checkpoint, files):
    command = ["generate", "--output", tmp_path / "new.mid", "--checkpoint", checkpoint, "--latents", 16, "--seed", 1]
    code, _, _ = run(capsys, *command, "--replace", "1:2.5", files[0])
    assert code == 0
    made, piece = read_midi(tmp_path / "new.mid"), read_midi(files[0])
    for kept in (lambda onset_s: onset_s < 0.999, lambda onset_s: onset_s > 2.501):
        np.testing.assert_allclose(made.onset_s[kept(made.onset_s)], piece.onset_s[kept(piece.onset_s)], atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--replace", "1:99"], "expected a passage from 0 s to at most"),
        (["--replace", "1-2"], "two numbers of seconds, such as 12:20"),
        (["--replace", "1:nan"], "two numbers of seconds, such as 12:20"),
    ],
)
def test_wrong_passages_are_refused_with_one_line(capsys, tmp_path, files, options, message):
    assert message in refusal(capsys, "generate", "--output", tmp_path / "new.mid", *options, files[0])


def test_a_prompt_and_a_gap_are_not_given_together(capsys, tmp_path, files):
    command = ["generate", "--output", tmp_path / "new.mid", "--prompt", files[0], "--replace", "1:2", files[0]]
    code, _, errors = run(capsys, *command)
    assert code == 2
    assert "give only one of --prompt, --between and --replace" in errors


# The API.


def test_the_api_fills_the_chosen_part():
    settings = Settings.read({"start_s": 1.0, "end_s": 2.5, "fill": True})
    session = Session()
    with pytest.raises(WebError, match="there is no piece to fill a part of"):
        session.cropped_prompt(settings)
    session.prompt = BEFORE
    prompt, prompt_seconds = session.cropped_prompt(settings)
    request = settings.request(prompt, prompt_seconds, 16)
    assert request.prompt is BEFORE
    assert (request.prompt_seconds, request.seconds) == (1.0, 1.5)
    assert request.after == BEFORE.crop(2.5)
