"""Takes: music that the browser keeps, and gives back to a session."""

import base64
import contextlib
import dataclasses
import io
import zlib

import numpy as np
import pytest
from conftest import make_performance, noisy_model
from hypothesis import given
from hypothesis import strategies as st

from app.web.manager import SessionManager
from app.web.music_events import find_prompt
from app.web.session import Session, prompt_revision
from app.web.settings import Settings, WebError
from app.web.takes import notes_for_link, read_take, unpacked
from app.web.warmup import Machine
from music_ar import Generator, read_midi, write_midi
from music_ar.model.config import PRESETS
from music_ar.model.pretrained import save_pretrained
from music_ar.tokens import vocabulary

PIECE = make_performance(1, notes=60)


def sent(**changes):
    """A take as the page sends it."""
    file = io.BytesIO()
    write_midi(PIECE, file)
    midi = base64.b64encode(zlib.compress(file.getvalue())).decode()
    settings = "?seconds=20&temperature=0.9&start_s=3&end_s=9"
    return {
        "take": "a-1-0",
        "join": 2.0,
        "seed": 7,
        "latents": 16,
        "settings": settings,
        "midi": midi,
    } | changes


def test_a_take_comes_back_with_its_settings():
    revision = read_take(sent(), most_latents=32)
    assert np.allclose(revision.pieces[0].onset_s, PIECE.onset_s, atol=0.001)
    assert revision.pieces[0].pitch.tolist() == PIECE.pitch.tolist()
    assert (revision.join_s, revision.latents, revision.seeds, revision.takes) == (2, 16, (7,), ("a-1-0",))
    assert revision.settings == Settings.read({"seconds": 20, "temperature": 0.9, "seed": 7}), "the part is cut already"


@pytest.mark.parametrize(
    "changes",
    [
        {"midi": "!"}, {"midi": ""}, {"midi": base64.b64encode(b"no zlib").decode()},
        {"midi": base64.b64encode(zlib.compress(b"no MIDI")).decode()}, {"join": -1}, {"join": float("nan")},
        {"seed": 2**70}, {"seed": "x"}, {"take": ""}, {"take": "x" * 1000}, {"settings": "?seconds=abc"},
        {"settings": "?" + 5000 * "a"}, {"latents": -1}, {"take": None}, {"midi": 5},
    ],
)  # fmt: skip
def test_damaged_takes_are_refused(changes):
    with pytest.raises(WebError):
        read_take(sent(**changes), most_latents=32)


def test_a_take_that_unpacks_to_too_much_is_refused():
    bomb = base64.b64encode(zlib.compress(bytes(50 * 2**20))).decode()
    with pytest.raises(WebError, match="more notes than"):
        unpacked(bomb)


@given(st.text(max_size=60))
def test_any_text_is_refused_or_unpacked(text):
    with contextlib.suppress(WebError):
        unpacked(text)


def test_short_prompts_fit_into_a_link():
    short = PIECE.crop(0, 5)
    assert len(short)
    notes = notes_for_link(short)
    assert notes is not None
    assert read_midi(unpacked(notes)).pitch.tolist() == short.pitch.tolist()
    assert notes_for_link(make_performance(0, notes=2000)) is None
    assert notes_for_link(PIECE.crop(0, 0)) is None


def test_an_adopted_take_is_shown_and_known_takes_keep_their_revision():
    session = Session()
    run = session.begin("")
    made = prompt_revision(PIECE, Settings(variations=2, seed=3), run)
    session.show(made)
    session.end(run)
    names = [session.take(session.revision, variation) for variation in range(2)]
    assert len(set(names)) == 2

    session.adopt(read_take(sent(), most_latents=32))
    assert session.take(session.revision, session.chosen) == "a-1-0"
    assert session.show_take(names[1])
    assert (session.revision.number, session.chosen) == (made.number, 1), "the caches of its run can be used"
    session.adopt(read_take(sent(take="b-1-0"), most_latents=32))
    session.adopt(read_take(sent(), most_latents=32))
    assert len(session.revisions) == 3, "a take that is known is not added again"
    session.undo()
    assert session.take(session.revision, 0) == "b-1-0"
    assert not session.show_take("nothing")
    session.begin("")
    with pytest.raises(WebError, match="press Stop"):
        session.adopt(read_take(sent(), most_latents=32))


def test_a_cut_keeps_what_is_before_it():
    revision = read_take(sent(), most_latents=32)
    cut = revision.cut(0, 5.0)
    assert cut.pieces[0].pitch.tolist() == PIECE.pitch[PIECE.onset_s < 5].tolist()
    assert cut.pieces[0].duration_s <= 5
    assert cut.until_s == (5.0,)
    assert (cut.join_s, revision.cut(0, 1.0).join_s) == (2, 1)
    with pytest.raises(WebError, match="no note before"):
        revision.cut(0, 0.0)


def test_a_part_of_a_take_is_made_anew(tmp_path):
    config = dataclasses.replace(PRESETS["tiny"], vocabulary_size=vocabulary.INFILL_VOCABULARY_SIZE)
    save_pretrained(noisy_model(config), tmp_path / "model")
    manager, session = SessionManager(Machine(Generator.from_pretrained(tmp_path / "model"))), Session()
    session.adopt(read_take(sent(), most_latents=32))
    piece, end_s = session.revision.pieces[0], float(PIECE.onset_s[40])
    settings = session.revision.settings.model_copy(update={"fill": True, "start_s": 3.0, "end_s": end_s, "seed": 1})
    for _ in manager.generate(session, settings, piece):
        pass
    made = session.revision.pieces[0]
    assert made.pitch[made.onset_s < 3].tolist() == piece.pitch[piece.onset_s < 3].tolist()
    assert made.pitch[made.onset_s >= end_s - 0.005].tolist() == piece.pitch[piece.onset_s >= end_s - 0.005].tolist()
    inside = (made.onset_s >= 3) & (made.onset_s < end_s - 0.005)
    assert inside.any()


def test_a_restarted_server_finds_the_prompt_that_the_page_shows_or_says_so():
    session = Session()
    find_prompt(session, "")
    assert session.prompt is None
    with pytest.raises(WebError, match=r"“mine\.mid”\. Choose it again"):
        find_prompt(session, "mine.mid")
    find_prompt(session, "Bach prelude in f minor")
    assert session.prompt is not None
    assert len(session.prompt) == 139
