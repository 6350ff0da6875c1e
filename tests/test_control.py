"""How processes meet, agree and part, without JAX: each is a channel of this process, or a bare socket."""

import json
import queue
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest

from music_ar.training.control import Channel, ClusterError, Place

HERE = socket.gethostname()


@pytest.fixture
def port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


class Process:
    """A channel, and the sentences with which it is told to end."""

    made: ClassVar[list["Process"]] = []

    def __init__(self, port, process, processes, description=None):
        self.lost: queue.Queue[str] = queue.Queue()
        place = Place(host="localhost", port=port, processes=processes, process=process)
        self.channel = Channel(place, description or {}, self.lost.put)
        Process.made.append(self)

    def join(self, timeout_s=20.0):
        """Join, and return why it is refused; "" if it is not."""
        try:
            self.channel.join(timeout_s)
        except ClusterError as error:
            Process.made.remove(self)
            return str(error)
        return ""

    def finish(self):
        self.channel.finish()
        Process.made.remove(self)


def join_all(members, timeout_s=20.0):
    with ThreadPoolExecutor(len(members)) as pool:
        return list(pool.map(lambda member: member.join(timeout_s), members))


def finish_all(members):
    with ThreadPoolExecutor(len(members)) as pool:
        list(pool.map(Process.finish, members))


@pytest.fixture(autouse=True)
def none_left():
    yield
    for member in reversed(Process.made):  # process 0 last
        member.channel.close()
    Process.made.clear()


@pytest.fixture
def three(port):
    members = [Process(port, number, 3) for number in range(3)]
    assert join_all(members) == [""] * 3
    return members


def test_all_follow_process_0_and_part(three):
    leader, *others = (member.channel for member in three)
    words = [[0.1 + 0.2, False, True], [1.0, True, False]]
    for word in words:
        leader.lead(word)
    assert [[other.follow() for _ in words] for other in others] == [words, words]  # floats come exactly
    finish_all(three)
    assert all(member.lost.empty() for member in three)


def test_any_process_can_ask_for_the_end(three):
    leader, _, last = (member.channel for member in three)
    assert not leader.stop_requested
    last.request_stop()
    finish_all(three)  # what was asked has arrived by then
    assert leader.stop_requested


def test_missing_processes_are_named(port):
    there = [Process(port, number, 4) for number in (0, 2)]
    for sentence in join_all(there, timeout_s=1.0):
        assert sentence.startswith("processes 1, 3 have not joined within 1 s, of 4")
        assert f"there are process 0 on {HERE}, process 2 on {HERE}" in sentence


def test_without_process_0_there_is_no_cluster(port):
    assert f"process 1 on {HERE} found no process 0 at localhost:{port} within 1 s" in Process(port, 1, 2).join(1.0)


def test_a_process_that_differs_is_named_with_what_differs(port):
    ours = {"the code": "abc", "--seed": 0, "--teacher": ("a",), "packages": {"jax": "1", "flax": "2"}}
    theirs = {"the code": "abd", "--seed": 1, "--teacher": (), "packages": {"jax": "1", "flax": "3"}}
    members = [Process(port, 0, 3, ours), Process(port, 1, 3, ours), Process(port, 2, 3, theirs)]
    for sentence in join_all(members):
        assert sentence.startswith(f"process 2 on {HERE} differs from process 0 on {HERE}: ")
        assert "--seed is 1, not 0; --teacher is not given, not ['a']; packages.flax is 3, not 2; " in sentence
        assert "the code is abd, not abc" in sentence
        assert "jax" not in sentence


@pytest.mark.parametrize(
    ("numbers", "message"),
    [((0, 1, 1), "which is also the number of process 1 on"), ((0, 1, 3), "3 processes have the numbers 0 to 2")],
)
def test_numbers_that_are_not_each_once_are_refused(port, numbers, message):
    for sentence in join_all([Process(port, number, 3) for number in numbers]):
        assert message in sentence


def test_a_port_in_use_is_refused(port):
    with socket.create_server(("", port)):
        assert f"process 0 cannot listen on port {port}" in Process(port, 0, 2).join()


def knock(port, line):
    """Connect as nobody's member and say something."""
    while True:
        try:
            connection = socket.create_connection(("localhost", port), timeout=20)
            break
        except OSError:
            pass
    connection.sendall(line)
    return connection


def test_strangers_at_the_port_are_ignored(port):
    leader, other = Process(port, 0, 2), Process(port, 1, 2)
    with ThreadPoolExecutor(2) as pool:
        joined = pool.submit(leader.join)
        for line in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"hello": {"process": "1"}}\n'):
            knock(port, line).close()
        assert pool.submit(other.join).result() == joined.result() == ""


def test_a_process_that_died_while_others_were_missing_may_come_again(port):
    members = [Process(port, number, 3) for number in range(3)]
    with ThreadPoolExecutor(3) as pool:
        results = [pool.submit(members[0].join)]
        hello = {"process": 1, "host": "elsewhere", "description": {}}
        with knock(port, json.dumps({"hello": hello}).encode() + b"\n") as first:
            assert first.recv(10) == b"{}\n"[:3]  # it was heard
        results += [pool.submit(member.join) for member in members[1:]]
        assert [result.result() for result in results] == [""] * 3


def test_a_process_that_is_gone_ends_all_by_name(port):
    leader, other = Process(port, 0, 3), Process(port, 2, 3)
    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(member.join) for member in (leader, other)]
        hello = {"process": 1, "host": "far", "description": {}}
        doomed = knock(port, json.dumps({"hello": hello}).encode() + b"\n")
        assert [result.result() for result in results] == ["", ""]
    doomed.close()
    assert [member.lost.get(timeout=20) for member in (leader, other)] == ["process 1 on far is gone"] * 2
    with pytest.raises(ClusterError, match="process 1 on far is gone"):
        other.channel.follow()


def test_a_process_that_fails_tells_why(three):
    three[1].channel.abandon("no space left", wait_s=0.0)
    sentence = f"process 1 on {HERE} has failed: no space left"
    assert [three[number].lost.get(timeout=20) for number in (0, 2)] == [sentence] * 2
    assert three[1].lost.empty()


def test_processes_that_fail_alike_speak_for_themselves(three):
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda member: member.channel.abandon("diverged", wait_s=0.0), three))
    threading.Event().wait(1.5)  # longer than a process waits before it ends because of another
    assert all(member.lost.empty() for member in three)
