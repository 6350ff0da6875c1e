"""The cores and the memory that a container lets its processes use."""

import os

import pytest

from music_ar import system


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    """Write the limits of a container of a machine with 8 cores."""
    monkeypatch.setattr(system, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)

    def write(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)

    return write


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "1600000 100000\n"}, 8),
        ({"cpu.max": "nonsense"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
)
def test_cores_follow_the_quota(cgroup, files, cores):
    cgroup(files)
    assert system.usable_cores() == cores


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_memory_follows_the_limit(cgroup, name):
    unlimited = system.usable_memory()
    cgroup({name: "max\n"})
    assert system.usable_memory() == unlimited
    cgroup({name: "1000000\n"})
    assert system.usable_memory() == 1_000_000


def test_cores_follow_the_affinity(cgroup, monkeypatch):
    cgroup({"cpu.max": "max 100000\n"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3}, raising=False)
    assert system.usable_cores() == 2
