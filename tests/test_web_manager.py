"""Several sessions at once: runs that take turns, long ones that give way, strangers that push nobody out."""

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from app.web import jobs, manager
from app.web.jobs import Mailboxes
from app.web.manager import MAX_SESSIONS, SessionManager
from app.web.settings import Settings, WebError
from app.web.warmup import Machine
from music_ar import Generator


@pytest.fixture(scope="module")
def machine(tiny_checkpoint):
    return Machine(Generator.from_pretrained(tiny_checkpoint))


def last(revisions):
    return list(revisions)[-1]


def test_runs_at_once_give_what_each_gives_alone(machine):
    sessions = SessionManager(machine)

    def run(seed):
        return last(sessions.generate(sessions.session(f"{seed}"), Settings(latents=8, seconds=6, seed=seed)))

    alone = [run(seed).pieces for seed in range(3)]
    at_once: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda seed=seed: at_once.update({seed: run(seed).pieces})) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [at_once[seed] for seed in range(3)] == alone


def test_a_long_run_gives_way_only_to_those_who_wait(machine, monkeypatch):
    monkeypatch.setattr(manager, "LONG_RUN_S", 0.0)
    sessions = SessionManager(machine)
    session = sessions.session("long")
    whole = last(sessions.generate(session, Settings(latents=8, seconds=200, seed=1)))
    sessions.others_wait = lambda: 1
    part = last(sessions.generate(session, Settings(latents=8, seconds=200, seed=1)))
    assert 0 < len(part.pieces[0]) < len(whole.pieces[0])
    assert "Others are waiting" in session.status
    assert not session.generating
    assert last(sessions.extend(session, 5.0)).pieces[0].duration_s > part.pieces[0].duration_s


def test_a_server_that_stops_ends_its_runs(machine):
    sessions = SessionManager(machine)
    run = sessions.generate(sessions.session("a"), Settings(latents=8, seconds=200, seed=1))
    next(run)
    sessions.stopping = True
    with pytest.raises(WebError, match="the server is being stopped"):
        list(run)
    with pytest.raises(WebError, match="the server is being stopped"):
        next(sessions.generate(sessions.session("b"), Settings()))


def test_strangers_push_out_nobody_who_has_music_or_waits_for_it():
    sessions = SessionManager(SimpleNamespace(most_latents=32))  # pyright: ignore[reportArgumentType]
    working, with_music = sessions.session("working"), sessions.session("with music")
    working.begin("Starting …")
    with_music.revisions.append(SimpleNamespace())  # pyright: ignore[reportArgumentType]
    for number in range(2 * MAX_SESSIONS):
        sessions.session(f"stranger {number}")
    assert sessions.session("working") is working
    assert working.generating
    assert sessions.session("with music") is with_music


def test_who_waits_keeps_the_mailbox_and_other_messages_are_dropped(monkeypatch):
    monkeypatch.setattr(jobs, "_MAX_MAILBOXES", 3)
    mailboxes = Mailboxes(SimpleNamespace(busy_sessions=lambda: {"a"}))  # pyright: ignore[reportArgumentType]
    for name in "abcdefg":
        mailboxes[name] = asyncio.Queue()
    assert set(mailboxes) == {"a", "f", "g"}
    mailboxes["nobody"].put_nowait("a message")  # Gradio's own dictionary would raise here
    assert "nobody" not in mailboxes
    del mailboxes["nobody"]
