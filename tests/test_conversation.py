"""Conversations: what is played comes back as it was, answers begin and end in time, and nothing sent can harm."""

import io
import json
import time

import mido
import numpy as np
import pytest
from played import PHRASE
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Mount
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect
from web_browser import wait_until

from app.web import conversations as limits
from app.web.conversation_routes import ConversationRoutes
from app.web.conversations import Conversations
from app.web.limits import Refusal
from app.web.manager import SessionManager
from app.web.reading import Reading
from app.web.warmup import Machine
from music_ar import Generator, decode
from music_ar.decoding.live import aligned
from music_ar.tokens import vocabulary
from music_ar.tokens.codec import event_steps


@pytest.fixture(scope="module")
def machine(tiny_checkpoint):
    return Machine(Generator.from_pretrained(tiny_checkpoint))


@pytest.fixture
def rooms(machine):
    conversations = Conversations(SessionManager(machine))
    yield conversations
    conversations.stop()


@pytest.fixture
def client(rooms):
    def refuse(_, refusal):
        return JSONResponse({"detail": refusal.reason}, refusal.status)

    app = Starlette(routes=[Mount("/", ConversationRoutes(rooms))], exception_handlers={Refusal: refuse})
    with TestClient(app) as client:
        yield client


class Player:
    """A client that plays. It keeps what comes until it is asked for."""

    def __init__(self, connection):
        self.socket = connection

    def say(self, **message):
        self.socket.send_text(json.dumps(message))

    def open(self, **values):
        self.say(type="open", latents=16, **values)
        return self.next("ready")

    def next(self, *types):
        """The next message of these types."""
        while (message := self.socket.receive_json())["type"] not in types:
            pass
        return message

    def answer(self, number=1, start=2.0, **wishes):
        """The events of a whole answer, and its last message."""
        self.say(type="answer", id=number, **{"from": start}, **wishes)
        events = []
        while (message := self.next("music", "end", "error"))["type"] == "music":
            events += message["events"]
        return events, message


@pytest.fixture
def connect(client):
    sockets = []

    def connected():
        socket = client.websocket_connect("/conversation")
        socket.__enter__()
        sockets.append(socket)
        return Player(socket)

    yield connected
    for opened in sockets:
        opened.__exit__(None, None, None)


def test_an_answer_follows_what_was_played(connect):
    player = connect()
    player.open(session=None)
    player.say(type="play", events=PHRASE)
    events, end = player.answer(seconds=3, seed=1)
    times = [event[0] for event in events]
    assert times == sorted(times)
    first = next(event for event in events if event[1] == "on")
    assert 2.15 <= first[0] <= 2.2
    assert end["why"] == "enough"
    assert end["at"] == pytest.approx(5.15)
    assert times[-1] <= end["at"]
    sounding = []
    for _, kind, pitch, *_ in events:
        if kind == "on":
            sounding.append(pitch)
        elif kind == "off":
            sounding.remove(pitch)
    assert sounding == []


@pytest.mark.slow
def test_both_decoders_answer_and_are_silenced(decoder):
    conversations = Conversations(SessionManager(Machine(Generator(decoder))))
    routes = ConversationRoutes(conversations)
    with TestClient(routes) as client, client.websocket_connect("/conversation") as connection:
        player = Player(connection)
        name = player.open(session=None)["session"]
        player.say(type="play", events=PHRASE)
        player.say(type="answer", id=1, **{"from": 2.0}, seconds=60, seed=1)
        while player.next("music")["until"] < 4:
            pass
        player.say(type="play", events=[[3.0, "on", 50, 90], [3.5, "off", 50]])
        assert player.next("end")["at"] == 3.0
        _, end = player.answer(2, 4.0, seconds=1, seed=2)
        assert end["why"] == "enough"
        conversation = conversations.of(name)
        assert conversation is not None
        wait_until(lambda: not conversation.working, "the end of the answer to be read")
        read = conversation.live.tokens
        known = aligned(read, Reading(conversation.timeline).tokens)
    # The state has read all but the last time step, in which the end of the answer also ended its notes.
    differs = [place for place, (one, other) in enumerate(zip(read, known, strict=False)) if one != other]
    unread = np.arange(len(known)) >= min([*differs, len(read)])
    unread &= vocabulary.is_note(known)
    assert set(event_steps(known)[unread].tolist()) <= {round(end["at"] * vocabulary.STEPS_PER_SECOND)}
    conversations.stop()


def test_an_answer_may_have_nothing_before_it(connect):
    player = connect()
    player.open(session=None)
    events, _ = player.answer(start=0.0, seconds=2)
    assert any(event[1] == "on" for event in events)


def test_the_same_seed_answers_the_same(connect):
    answers = []
    for _ in range(2):
        player = connect()
        player.open(session=None)
        player.say(type="play", events=PHRASE)
        answers.append(player.answer(seconds=3, seed=7, temperature=0.9)[0])
    assert answers[0] == answers[1]


def test_a_key_that_goes_down_ends_the_answer_and_what_was_heard_is_kept(connect, client):
    player = connect()
    name = player.open(session=None)["session"]
    player.say(type="play", events=PHRASE)
    player.say(type="answer", id=1, **{"from": 2.0}, seconds=100, seed=1)
    events = []
    while not events or events[-1][0] < 4.0:
        events += player.next("music")["events"]
    player.say(type="play", events=[[3.0, "on", 50, 90], [3.5, "off", 50]])
    end = player.next("end")
    assert (end["why"], end["at"]) == ("silenced", 3.0)
    player.say(type="replace")  # refused, so what follows is the answer to it
    assert player.next("error", "music")["type"] == "error"
    heard = client.get(f"/conversation/{name}.mid").content
    notes = [note for note in _notes(heard) if note[2] == "Answers"]
    began = [event for event in events if event[1] == "on" and event[0] <= 3.0]
    assert [note[0] for note in notes] == pytest.approx([event[0] for event in began], abs=1e-3)
    assert max(note[1] for note in notes) <= 3.001


def test_an_answer_that_was_made_can_still_be_silenced(connect, rooms):
    player = connect()
    name = player.open(session=None)["session"]
    _, end = player.answer(start=0.0, seconds=4)
    player.say(type="silence", id=1, heard=1.0)
    player.say(type="answer", id=2, **{"from": 1.5}, seconds=1)
    player.next("end")
    answered = rooms.of(name).timeline.answered
    assert all(time_s <= 1.0 or time_s >= 1.65 for time_s, *_ in answered)
    assert end["at"] == pytest.approx(4.15)


def test_the_next_answer_knows_all_and_reads_only_what_is_new(connect, rooms):
    player = connect()
    name = player.open(session=None)["session"]
    player.say(type="play", events=PHRASE)
    _, end = player.answer(seconds=3, seed=1)
    later = end["at"] + 1
    player.say(type="play", events=[[later, "on", 50, 90], [later + 0.5, "off", 50]])
    player.answer(2, later + 1.5, seconds=1, seed=2)
    conversation = rooms.of(name)
    before = conversation.timeline.copied()
    before.answered = [each for each in before.answered if each[0] < later]
    known = Reading(before).tokens
    read = conversation.live.tokens
    same = aligned(read, known)  # the model may order the events of a time step in its own way
    assert read[: len(same)].tolist() == same.tolist()
    assert decode(same) == decode(known)


def test_what_was_played_comes_back_as_it_was(connect, client):
    player = connect()
    name = player.open(session=None)["session"]
    player.say(type="play", events=PHRASE)
    player.say(type="answer", id=1, **{"from": 2.0}, seconds=1)
    player.say(type="play", events=[[2.4, "pedal", 90], [2.45, "off", 64]])
    player.next("end")
    content = client.get(f"/conversation/{name}.mid").content
    played, tick = [], 0
    for message in next(track for track in mido.MidiFile(file=io.BytesIO(content)).tracks if track.name == "Played"):
        tick += message.time
        if message.type in ("note_on", "note_off", "control_change"):
            played.append((tick / 2000, message.type, *message.bytes()[1:]))
    kinds = {"on": "note_on", "off": "note_off", "pedal": "control_change"}
    for (at_s, kind, *_), event in zip(played, [*PHRASE, [2.4, "pedal", 90], [2.45, "off", 64]], strict=False):
        assert kind == kinds[str(event[1])]
        assert at_s == pytest.approx(event[0], abs=0.00026)


def test_a_session_goes_on_after_the_connection_is_lost(client, rooms):
    with client.websocket_connect("/conversation") as socket:
        player = Player(socket)
        opened = player.open(session=None)
        player.say(type="play", events=PHRASE)
        player.answer(seconds=1, seed=1)
    conversation = rooms.of(opened["session"])
    with client.websocket_connect("/conversation") as socket:
        ready = Player(socket).open(session=opened["session"])
    assert not opened["resumed"]
    assert ready["resumed"]
    assert ready["answers"] == 1
    assert ready["timeline"]["played"] == PHRASE
    assert ready["timeline"] == conversation.timeline.flat()
    with client.websocket_connect("/conversation") as socket:
        again = Player(socket).open(session=opened["session"], timeline=ready["timeline"])
    assert again["resumed"]
    assert "timeline" not in again
    assert rooms.of(opened["session"]).timeline.flat() == ready["timeline"]


def test_a_server_that_restarted_gets_the_notes_anew(connect):
    timeline = {"notes": [[0, 0.4, 72, 50]], "played": PHRASE, "answered": [[2, "on", 60, 70], [2.5, "off", 60]]}
    player = connect()
    ready = player.open(session="a name from before", timeline=timeline)
    assert not ready["resumed"]
    assert ready["session"] != "a name from before"
    assert len(ready["session"]) >= 32
    assert player.answer(start=3.0, seconds=1)[1]["why"] == "enough"


def test_another_tab_takes_the_session_over(connect):
    first, second = connect(), connect()
    name = first.open(session=None)["session"]
    assert second.open(session=name)["resumed"]
    with pytest.raises(WebSocketDisconnect) as closed:
        first.next("never")
    assert closed.value.code == 4001
    assert "another tab" in closed.value.reason
    second.say(type="play", events=PHRASE)
    assert second.answer(seconds=1)[1]["why"] == "enough"


@pytest.mark.parametrize(
    ("message", "code", "said"),
    [
        ("not JSON", "message", "a JSON object"),
        ("[1]", "message", "a JSON object"),
        ("[" * 100_000, "message", "a JSON object"),
        ('{"type": "dance"}', "message", "the type must be play, answer, silence or replace, got “dance”"),
        ('{"type": ["play"]}', "message", "got a list"),
        ('{"type": "play"}', "message", "events must be a list, got nothing"),
        ('{"type": "play", "events": [[1, "on", 60]]}', "message", "event 0 must be [time, “on”, pitch, velocity]"),
        ('{"type": "play", "events": [[1, "on", 128, 80]]}', "message", "from 0 to 127, got 128"),
        ('{"type": "play", "events": [[1, "on", 60, 0]]}', "message", "from 1 to 127, got 0"),
        ('{"type": "play", "events": [[1, "on", true, 80]]}', "message", "got true"),
        ('{"type": "play", "events": [[-1, "off", 60]]}', "message", "from 0 to 14400, got -1"),
        ('{"type": "play", "events": [[NaN, "off", 60]]}', "message", "got no number (NaN)"),
        ('{"type": "play", "events": [[1e999, "off", 60]]}', "message", "got infinity"),
        ('{"type": "play", "events": [[1, "release", 60]]}', "message", "[time, “pedal”, position]"),
        ('{"type": "play", "events": [[2, "off", 60], [1, "off", 60]]}', "order", "one at 1 s after one at 2 s"),
        ('{"type": "play", "events": [[1.4, "off", 60]]}', "order", "one at 1.4 s after one at 1.5 s"),
        ('{"type": "answer", "id": 1, "from": 1.0}', "order", "before the last event at 1.5 s"),
        ('{"type": "answer", "id": 0, "from": 2}', "message", "a whole number above 0"),
        ('{"type": "answer", "id": 1}', "message", "from must be a number of seconds"),
        ('{"type": "answer", "id": 1, "from": 2, "seconds": 121}', "message", "from 0 to 120, got 121"),
        ('{"type": "answer", "id": 1, "from": 2, "temperature": 9}', "message", "temperature must be"),
        ('{"type": "answer", "id": 1, "from": 2, "seed": -1}', "message", "seed must be"),
        ('{"type": "silence", "id": 1, "heard": "now"}', "message", "heard must be a number of seconds"),
        ('{"type": "replace", "timeline": 5}', "message", "the timeline must be an object, got 5"),
        ('{"type": "replace", "timeline": {"notes": [[1, 1, 60, 80]]}}', "message", "must end after it begins"),
        ('{"type": "replace", "timeline": {"answered": [[1, "pedal", 60]]}}', "message", "[time, “release”, pitch]"),
        (json.dumps({"type": "play", "events": [], "x": "x" * 70_000}), "message", "at most 64 kB"),
    ],
)
def test_a_wrong_message_is_refused_in_words_and_changes_nothing(connect, rooms, message, code, said):
    player = connect()
    name = player.open(session=None)["session"]
    player.say(type="play", events=PHRASE)
    player.socket.send_text(message)
    refused = player.next("error")
    assert refused["code"] == code
    assert said in refused["message"]
    assert rooms.of(name).timeline.flat()["played"] == PHRASE
    assert player.answer(seconds=0.5)[1]["why"] == "enough"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("not JSON", "a JSON object"),
        ('{"type": "play"}', "the first message must be of type “open”"),
        ('{"type": "open", "latents": 7.5}', "the latent budget must be a whole number"),
        ('{"type": "open", "timeline": {"played": 1}}', "played must be a list"),
    ],
)
def test_a_conversation_must_be_opened(client, message, said):
    with client.websocket_connect("/conversation") as socket:
        socket.send_text(message)
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_json()
        assert closed.value.code == 4000
        assert said in closed.value.reason


def test_a_keyboard_that_sends_without_end_is_stopped_and_others_are_answered(connect):
    stuck, other = connect(), connect()
    stuck.open(session=None)
    other.open(session=None)
    for first in range(0, 10_000, 500):
        stuck.say(type="play", events=[[n / 170, "on", 21 + n % 88, 60] for n in range(first, first + 500)])
    assert "check the keyboard" in stuck.next("error")["message"]
    other.say(type="play", events=PHRASE)
    assert other.answer(seconds=1)[1]["why"] == "enough"


def test_a_flood_is_refused_in_few_words_and_the_conversation_goes_on(connect):
    player = connect()
    player.open(session=None)
    for n in range(6000):
        player.say(type="play", events=[[n / 170, "on", 21 + n % 88, 60]])
    player.socket.send_text("not JSON")  # is refused by another reason, after all of it
    refused = []
    while (message := player.next("error"))["code"] == "rate":
        refused.append(message)
    assert 1 <= len(refused) < 200


def test_an_address_cannot_make_the_model_read_without_end(connect):
    player, other = connect(), connect()
    player.open(session=None)
    large = {"timeline": {}, "more": "x" * 1_900_000}
    for _ in range(4):
        player.say(type="replace", **large)
    assert player.next("error")["code"] == "rate"
    other.say(type="open", session=None, **large)
    with pytest.raises(WebSocketDisconnect) as closed:
        other.next("never")
    assert closed.value.code == 1013


def test_at_most_so_many_are_answered_and_connected(connect, client, monkeypatch):
    monkeypatch.setattr(limits, "MAX_ANSWERS", 1)
    monkeypatch.setattr(limits, "MAX_OF_AN_ADDRESS", 2)
    first, second = connect(), connect()
    first.open(session=None)
    second.open(session=None)
    first.say(type="answer", id=1, **{"from": 0.0}, seconds=100)
    first.next("music")
    assert second.answer(start=0.0)[1]["code"] == "busy"
    with client.websocket_connect("/conversation") as third, pytest.raises(WebSocketDisconnect) as closed:
        third.receive_json()
    assert closed.value.code == 1008


def test_old_sessions_are_forgotten(client, rooms, monkeypatch):
    names = []
    for _ in range(2):
        with client.websocket_connect("/conversation") as socket:
            names.append(Player(socket).open(session=None)["session"])
    monkeypatch.setattr(limits, "MAX_CONVERSATIONS", 2)
    with client.websocket_connect("/conversation") as socket:
        names.append(Player(socket).open(session=None)["session"])
        assert [rooms.of(name) is not None for name in names] == [False, True, True]
        monkeypatch.setattr(limits, "FORGOTTEN_AFTER_S", 0.0)
        time.sleep(0.01)
        rooms.forget_old()
        assert [rooms.of(name) is not None for name in names] == [False, False, True]


def test_caches_of_others_make_room_and_are_filled_again(connect, rooms, monkeypatch):
    monkeypatch.setattr(limits, "MAX_LIVE", 1)
    first, second = connect(), connect()
    names = [player.open(session=None)["session"] for player in (first, second)]
    for player in (first, second):
        player.say(type="play", events=PHRASE)
        player.answer(seconds=0.5, seed=1)
    assert len(rooms.of(names[0]).live.tokens) == 0
    assert first.answer(2, 5.0, seconds=0.5)[1]["why"] == "enough"


def test_a_server_that_stops_says_so(connect, rooms):
    player = connect()
    player.open(session=None)
    rooms.manager.stopping = True
    player.say(type="answer", id=1, **{"from": 0.0})
    assert "being stopped" in player.next("error")["message"]
    assert player.next("end")["why"] == "failed"


def test_a_file_is_made_without_a_session(client):
    timeline = {"notes": [[0, 1, 60, 80]], "played": PHRASE, "answered": []}
    answer = client.post("/conversation", json={"timeline": timeline})
    assert answer.status_code == 200
    assert {note[2] for note in _notes(answer.content)} == {"Before", "Played"}
    assert client.post("/conversation", json={"timeline": {}}).json()["detail"].startswith("nothing has been played")
    assert client.post("/conversation", content=b"x").status_code == 400
    assert client.get("/conversation/unknown.mid").status_code == 404


def _notes(content):
    """Onset, end and track of each note, read by another library."""
    found = []
    for track in mido.MidiFile(file=io.BytesIO(content)).tracks:
        tick, sounding, name, pedal, held = 0, {}, track.name, False, []
        for message in track:
            tick += message.time
            if message.type == "control_change" and message.control == 64:
                pedal = message.value >= 64
                if not pedal:
                    for note in held:
                        note[1] = tick / 2000
                    held = []
            elif message.type == "note_on" and message.velocity:
                sounding[message.note] = [tick / 2000, None, name]
                found.append(sounding[message.note])
            elif message.type in ("note_on", "note_off") and message.note in sounding:
                note = sounding.pop(message.note)
                note[1] = tick / 2000
                if pedal:
                    held.append(note)
    return sorted(found, key=lambda note: note[0])
