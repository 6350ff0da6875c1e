"""The place in the queue, in words."""

from types import SimpleNamespace
from typing import Any

import pytest
from gradio.queueing import EventQueue

from app.web.calls import DEVICE
from app.web.session import Session
from app.web.waiting import waiting_in_words

pytestmark = pytest.mark.filterwarnings("ignore")  # from Gradio


def running(left_s, run_s):
    session = Session()
    session.begin("Starting …")
    session.left_s, session.run_s = left_s, run_s
    return session


@pytest.mark.parametrize(
    ("name", "runs", "words"),
    [
        ("first", [(30.0, 100.0)], "Other pieces come first: you are next, in about 0:30."),
        ("second", [(30.0, 100.0)], "Other pieces come first: you are number 2, in about 2:10."),
        ("second", [(90.0, 100.0), (30.0, 50.0)], "Other pieces come first: you are number 2, in about 1:30."),
        ("third", [(90.0, 100.0), (30.0, 50.0)], "Other pieces come first: you are number 3, in about 1:20."),
        ("third", [(None, 0.0)], "Other pieces come first: you are number 3."),
        ("somebody", [(30.0, 100.0)], None),
    ],
)
def test_the_place_and_the_estimate(name, runs, words):
    device = EventQueue(DEVICE["concurrency_id"], 1)
    waiting: Any = [SimpleNamespace(session_hash=each) for each in ("first", "second", "third")]
    device.queue = waiting
    queue: Any = SimpleNamespace(event_queue_per_concurrency_id={DEVICE["concurrency_id"]: device})
    manager: Any = SimpleNamespace(in_progress=lambda: [running(*run) for run in runs])
    assert waiting_in_words(queue, manager, name) == words
