"""Which cluster a process finds itself in, by its options and its environment."""

import os

import pytest

from music_ar.training.cluster import Alone, Decision, find
from music_ar.training.control import ClusterError, Place

TORCHRUN = {"MASTER_ADDR": "node-a", "MASTER_PORT": "1234", "WORLD_SIZE": "8", "RANK": "5"}
SKYPILOT = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "gpu[07-10]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.9.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "16",
    "OMPI_COMM_WORLD_RANK": "9",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "8",
}


@pytest.fixture
def environment(monkeypatch):
    """Sets variables, after those of any launcher are removed."""
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "SKYPILOT_", "KUBERNETES_", "JAX_COORD", "LOCAL_", "CUDA_VISIBLE")):
            monkeypatch.delenv(name)
    for name in (*TORCHRUN, "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)

    def put(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


def place(host, port, processes, process, devices=None):
    return Place(host=host, port=port, processes=processes, process=process, local_devices=devices)


@pytest.mark.parametrize(
    ("variables", "options", "expected"),
    [
        ({}, (None, None, None), None),
        ({}, ("a:1", 2, 1), place("a", 1, 2, 1)),
        ({}, ("a", 2, 0), place("a", 8476, 2, 0)),
        ({}, ("[fe80::1]:9", 2, 0), place("fe80::1", 9, 2, 0)),
        ({}, (None, 1, None), None),
        (TORCHRUN, (None, None, None), place("node-a", 1234, 8, 5)),
        (TORCHRUN, ("b:7", None, None), place("b", 7, 8, 5)),
        (TORCHRUN, (None, 1, None), None),
        (TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"}, (None, None, None), None),
        (
            TORCHRUN | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
            (None, None, None),
            place("node-a", 1234, 8, 5, (1,)),
        ),
        (TORCHRUN | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, (None, None, None), place("node-a", 1234, 8, 5)),
        ({"WORLD_SIZE": "8", "RANK": "5"}, (None, None, None), None),
        (SKYPILOT, (None, None, None), place("10.0.0.1", 8476, 2, 1)),
        (SKYPILOT | {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"}, (None, None, None), None),
        (SLURM, (None, None, None), place("gpu07", 61441, 4, 3)),
        (SLURM, ("c:5", None, None), place("c", 5, 4, 3)),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "d:6"}, (None, None, None), place("d", 6, 4, 3)),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, (None, None, None), None),
        (
            SLURM | {"SLURM_LOCALID": "2", "SLURM_STEP_TASKS_PER_NODE": "4"},
            (None, None, None),
            place("gpu07", 61441, 4, 3, (2,)),
        ),
        (
            SLURM | {"SLURM_LOCALID": "2", "SLURM_STEP_TASKS_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": "2"},
            (None, None, None),
            place("gpu07", 61441, 4, 3),
        ),
        (OPEN_MPI, (None, None, None), place("10.9.0.1", 61441, 16, 9, (1,))),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, (None, None, None), None),
    ],
)
def test_the_cluster_of_a_process(environment, variables, options, expected):
    environment(variables)
    assert find(*options, timeout_s=1.0) == expected


@pytest.mark.parametrize(
    ("variables", "options", "message"),
    [
        ({}, ("a:1", None, None), "--processes and --process are missing"),
        ({}, (None, 4, 1), "--coordinator is missing"),
        ({}, ("a:1", 2, 2), r"--process must be in 0\.\.1, for 2 processes; got 2"),
        ({}, ("a:port", 2, 1), "--coordinator must be HOST:PORT, such as node-1:8476, got 'a:port'"),
        ({}, ("a:99999", 2, 1), "got 'a:99999'"),
        (TORCHRUN | {"RANK": "first"}, (None, None, None), "variable RANK must be a whole number, got 'first'"),
        (SLURM | {"SLURM_NTASKS": "many"}, (None, None, None), "this looks like a cluster, but JAX cannot join it"),
    ],
)
def test_half_a_cluster_is_refused(environment, variables, options, message):
    environment(variables)
    with pytest.raises(ClusterError, match=message):
        find(*options, timeout_s=1.0)


def test_who_is_alone_decides_alone():
    decision = Decision(progress=0.5, save=True, stop=False)
    assert Alone().agree(decision) == decision
