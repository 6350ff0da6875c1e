""" "What is this like?" on the page and in the API: answers, refusals, and nothing of it without an index."""

from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from histogram import Histogram, index_of
from tiny_maestro import midi_bytes, random_performance
from web_browser import needs_browser, upload, wait_for_notes, wait_until
from web_client import running_page

from app.web.likeness import MAX_LIKENESS_S, Likeness, shown_piece
from app.web.manager import SessionManager
from app.web.session import Session
from app.web.settings import WebError
from music_ar import Performance, read_midi
from music_ar.embedding import PieceEmbedder
from music_ar.embedding.passages import PassageGrid
from music_ar.model.weights import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore")  # from Gradio's client and Playwright
PIECES = [random_performance(seed, 100) for seed in range(4)]


@pytest.fixture(scope="module")
def index():
    return index_of(PIECES)


@pytest.fixture
def manager():
    return SessionManager(SimpleNamespace(most_latents=32))  # pyright: ignore[reportArgumentType]


@pytest.fixture
def likeness(manager, index):
    return Likeness(manager, lambda: SimpleNamespace(encoder=Histogram(), index=index))  # pyright: ignore[reportArgumentType]


@pytest.fixture
def uploaded(tmp_path):
    """A file as Gradio gives it to a handler."""

    def write(data):
        (tmp_path / "piece.mid").write_bytes(data)
        return {"path": str(tmp_path / "piece.mid"), "orig_name": "mine.mid"}

    return write


def test_the_api_names_pieces_and_passages(likeness, index, uploaded):
    answer = likeness.similar(uploaded(midi_bytes(2, 100)), 3)
    best, *others = answer["matches"]
    assert (best["name"], best["title"], best["composer"]) == ("2.mid", "Study 2", "A. Composer")
    assert best["similarity"] == pytest.approx(1, abs=0.02)
    assert abs(best["start_s"] - best["query_start_s"]) < 0.5
    assert len(others) == 2
    assert answer["usual_similarity"] == pytest.approx(index.usual.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("data", "count", "message"),
    [
        (None, 5, "there is no piece"),
        (midi_bytes(0, 5), 5, "at least 8, and it has 5"),
        (b"MThd", 5, "“mine.mid” cannot be used"),
        (midi_bytes(0), 0, "count must be a whole number from 1 to 50, got 0"),
        (midi_bytes(0), 51, "count must be a whole number from 1 to 50, got 51"),
        (midi_bytes(0), 1.5, "count must be"),
        (midi_bytes(0), "many", "count must be"),
    ],
)
def test_bad_input_is_explained(likeness, uploaded, data, count, message):
    with pytest.raises(gr.Error, match=message):
        likeness.similar(None if data is None else uploaded(data), count)


def in_session(manager, prompt) -> Any:
    manager.session("someone").prompt = prompt
    return SimpleNamespace(session_hash="someone", headers={})


def test_the_page_answers_in_a_table(likeness, manager):
    answer = likeness.on_ask(in_session(manager, PIECES[1]))
    assert "| A. Composer: Study 1 | 1.00 |" in answer
    assert answer.count("A. Composer: Study") == 4


def test_titles_are_shown_as_they_are(manager):
    odd = index_of(PIECES[:2])
    object.__setattr__(odd.pieces[0], "title", "<b>a|b</b> *c* [d](e)")
    likeness = Likeness(manager, lambda: SimpleNamespace(encoder=Histogram(), index=odd))  # pyright: ignore[reportArgumentType]
    answer = likeness.on_ask(in_session(manager, PIECES[0]))
    assert r"&lt;b&gt;a\|b&lt;/b&gt; \*c\* \[d\](e)" in answer


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "There is no piece here yet"),
        (PIECES[0].crop(0, 0.5), "at least 8"),
        (random_performance(0).shift(MAX_LIKENESS_S), "1:00:0. long, and at most 1:00:00 can be compared"),
    ],
)
def test_the_page_says_what_it_cannot_compare(likeness, manager, prompt, message):
    with pytest.raises(gr.Error, match=message):
        likeness.on_ask(in_session(manager, prompt))


def test_a_long_piece_leaves_turns_to_others(likeness, manager, monkeypatch):
    turns = []
    guest = manager.guest
    monkeypatch.setattr(manager, "guest", lambda: turns.append(1) or guest())
    likeness.on_ask(in_session(manager, random_performance(7, 1000)))
    assert len(turns) > 2


def test_the_piece_on_the_timeline_is_the_chosen_one():
    session = Session()
    with pytest.raises(WebError, match="there is no piece here yet"):
        shown_piece(session)
    session.prompt = Performance.empty()
    assert shown_piece(session) is session.prompt
    shown = SimpleNamespace(pieces=(1, 2), shown=lambda variation: PIECES[variation])
    session.revisions.append(shown)  # pyright: ignore[reportArgumentType]
    session.chosen = 1
    assert shown_piece(session) is PIECES[1]


# --- a server ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tiny_checkpoint, tiny_encoder, tmp_path_factory):
    """A page with an encoder and an index."""
    folder = tmp_path_factory.mktemp("similar")
    index_of(PIECES, PieceEmbedder.from_pretrained(tiny_encoder), passages=PassageGrid()).save(folder / "index")
    options = ("--encoder", str(tiny_encoder), "--index", str(folder / "index"))
    with running_page(tiny_checkpoint, folder, *options) as page:
        yield page


@pytest.mark.slow
def test_a_client_asks(server, midi_file, tmp_path):
    from gradio_client import Client, handle_file

    client = Client(server.address, verbose=False)
    assert client.predict(api_name="/info")["finds_similar"] is True
    answer = client.predict(piece=handle_file(midi_file), count=2, api_name="/similar")
    assert len(answer["matches"]) == 2
    (tmp_path / "bad.mid").write_bytes(b"no music")
    with pytest.raises(Exception, match="cannot be used"):
        client.predict(piece=handle_file(tmp_path / "bad.mid"), api_name="/similar")
    client.close()
    # A path of the server's own is not read.
    secret = {"path": str(tmp_path / "bad.mid"), "meta": {"_type": "gradio.FileData"}}
    status, _ = server.request("/gradio_api/run/similar", {"data": [secret, 5]})
    assert status >= 400


@pytest.mark.slow
@needs_browser
def test_the_page_asks(server, browser, midi_file):
    page = browser.new_page()
    page.goto(server.address)
    page.wait_for_selector("#player .player")
    upload(page, midi_file)
    wait_for_notes(page, len(read_midi(midi_file)))
    page.locator("#likeness").click()
    answer = page.locator("#likeness-answer")
    wait_until(lambda: "A. Composer: Study" in answer.inner_text(), "there is an answer")
    assert answer.locator("tbody tr").count() == 4
    page.locator("#generate").click()
    wait_until(lambda: "Study" not in answer.inner_text(), "new music takes the answer back")
    page.close()


@pytest.mark.slow
def test_the_page_has_the_encoder_that_ships(tiny_checkpoint, midi_file, tmp_path):
    """It is read with the first question."""
    from gradio_client import Client, handle_file

    with running_page(tiny_checkpoint, tmp_path) as page:
        config = page.request("/config")[1]
        assert "similar" in {each["api_name"] for each in config["dependencies"]}
        assert "What is this like?" in str(config["components"])
        client = Client(page.address, verbose=False)
        answer = client.predict(piece=handle_file(midi_file), count=3, api_name="/similar")
        assert len(answer["matches"]) == 3
        client.close()


def test_a_damaged_encoder_is_an_answer_in_words(manager):
    def damaged():
        raise CheckpointError("model.safetensors is damaged")

    with pytest.raises(gr.Error, match=r"This server cannot compare music: model\.safetensors is damaged"):
        Likeness(manager, damaged).on_ask(in_session(manager, PIECES[0]))
