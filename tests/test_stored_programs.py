"""Programs that outlast their process: loaded without tracing, compiled anew if that fails."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from music_ar.decoding.stored_programs import StoredPrograms


@pytest.fixture(autouse=True)
def serialization(monkeypatch):
    """Stands in for JAX's: on a CPU, a program that it loads may lack functions."""
    kept = {}

    class Serialization:
        @staticmethod
        def serialize(program):
            payload = f"program {len(kept)}".encode()
            kept[payload] = program
            return payload, None, None

        @staticmethod
        def deserialize_and_load(payload, arguments, result, execution_devices):
            program = kept[payload]
            assert jax.tree.structure(program.args_info) == arguments
            assert program.out_tree == result
            assert execution_devices == jax.devices()[:1]
            return program

    monkeypatch.setattr("music_ar.decoding.stored_programs.serialize_executable", Serialization)


@pytest.fixture
def traced():
    """A jitted function that notes each time it is traced; and the notes."""
    notes = []

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def scale(factor, state, other):
        notes.append(factor)
        return {"a": state["a"] * factor + other}, jnp.float32(factor)

    return scale, notes


def call(programs, scale, factor, size=3, name=None):
    arguments = ({"a": jnp.arange(size, dtype=jnp.float32)}, np.ones(size, np.float32))
    result, given = programs.call(name or f"scale-{factor}", scale, (factor,), arguments, ({"a": 0}, 0))
    return np.asarray(result["a"]).tolist(), float(given)


def test_a_stored_program_is_not_traced_again(tmp_path, traced):
    scale, notes = traced
    for identity, trace in (("model", [2]), ("model", [2]), ("other model", [2, 2])):
        programs = StoredPrograms(identity, tmp_path)
        for _ in range(2):
            assert call(programs, scale, 2) == ([1, 3, 5], 2)
        jax.clear_caches()
        assert notes == trace


@pytest.mark.parametrize("other", [{"factor": 3}, {"factor": 2, "size": 4}])
def test_other_arguments_have_other_programs(tmp_path, traced, other):
    scale, notes = traced
    programs = StoredPrograms("model", tmp_path)
    call(programs, scale, 2)
    size, factor = other.get("size", 3), other["factor"]
    assert call(programs, scale, **other) == ([factor * x + 1 for x in range(size)], factor)
    assert len(notes) == 2
    assert len(list(tmp_path.glob("scale-*.program"))) == 2


def test_a_damaged_program_is_compiled_again(tmp_path, traced):
    scale, notes = traced
    call(StoredPrograms("model", tmp_path), scale, 2)
    [path] = tmp_path.glob("*.program")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    jax.clear_caches()
    assert call(StoredPrograms("model", tmp_path), scale, 2) == ([1, 3, 5], 2)
    assert len(notes) == 2
    assert path.stat().st_size > len(whole) // 2


def test_nothing_is_stored_without_a_folder(tmp_path, traced, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(StoredPrograms("model", None), traced[0], 2) == ([1, 3, 5], 2)
    assert not list(tmp_path.rglob("*.program"))
