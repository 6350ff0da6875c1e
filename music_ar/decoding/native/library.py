"""The engine's shared library: finding and loading it, and the C types of its interface (engine.cpp)."""

import ctypes
import functools
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int8, c_int32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from music_ar.decoding.native.sources import digest
from music_ar.system import usable_cores

PATH = Path(__file__).with_name("_engine.so")
"""Where the installation puts the library, if it found a compiler."""
_MOST_THREADS = 16  # more gain nothing: the products of a step are too short to share


class CConfig(ctypes.Structure):
    """`Config` in state.h: the sizes of a model."""

    SIZES = (
        "context",
        "width",
        "layers",
        "heads",
        "kv_heads",
        "head_size",
        "hidden",
        "conv_width",
        "onsets",
        "retrieval_notes",
        "time_heads",
        "rotary_size",
        "wish_rows",
        "vocabulary_size",
    )
    _fields_ = (
        *((name, c_int32) for name in SIZES),
        ("exit_count", c_int32),
        ("rotary_rates", POINTER(c_float)),
        ("exits", POINTER(c_int32)),
    )


class CTensor(ctypes.Structure):
    """`Tensor` in model.h: a matrix in int8 with its scales, or a vector of floats."""

    _fields_ = (
        ("name", c_char_p),
        ("numbers", POINTER(c_int8)),
        ("values", POINTER(c_float)),
        ("inputs", c_int32),
        ("outputs", c_int32),
    )


class CState(ctypes.Structure):
    """`State` in state.h: sizes, and pointers to the arrays of a batch."""

    SIZES = ("rows", "notes_kept", "self_slots", "cross_slots", "layers")
    ARRAYS = (
        "age_B",
        "latents_B",
        "recent_BxL",
        "held_Bx128",
        "time_B",
        "velocity_B",
        "keys_Bx128",
        "note_count_B",
        "note_first_B",
        "note_BxC",
        "note_time_BxC",
        "match_keys_BxWxC",
        "match_level_B",
        "match_number_B",
        "gap_begin_B",
        "gap_length_B",
        "gap_end_B",
        "gap_over_B",
        "pitches_Bx128",
        "velocities_Bx32",
        "cross_k",
        "cross_v",
        "self_k",
        "self_v",
        "prompt_end_B",
        "limit_B",
        "key_Bx2",
        "ended_B",
        "tolerance_B",
        "layers_run_B",
        "wishes_BxD",
    )
    _fields_ = (*((name, c_int32) for name in SIZES), *((name, c_void_p) for name in ARRAYS))


class COptions(ctypes.Structure):
    """`Options` in sampling.h: an array for each sampling option, with an entry for each row; perhaps the guidance."""

    TYPES = (
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("steadiness", np.float32),
        ("lowest_pitch", np.int32),
        ("highest_pitch", np.int32),
    )
    _fields_ = (*((name, c_void_p) for name, _ in TYPES), ("guidance", c_void_p))


_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "sources": (c_char_p, []),
    "path": (c_char_p, [c_void_p]),
    "cached_bytes": (c_int, [c_void_p]),
    "threads": (c_int, []),
    "set_threads": (None, [c_int]),
    "open": (c_void_p, [POINTER(CConfig), POINTER(CTensor), c_int]),
    "close": (None, [c_void_p]),
    "prefill": (None, [c_void_p, POINTER(CState), c_int, c_void_p, c_int]),
    "decode": (None, [c_void_p, POINTER(CState), POINTER(COptions), c_int, c_void_p, c_void_p]),
    "teacher_force": (None, [c_void_p, POINTER(CState), c_void_p, c_int, c_void_p]),
    "bare_products_s": (c_double, [c_void_p, c_int, c_int, c_int]),
    "process": (None, [c_void_p, POINTER(CState), POINTER(COptions), c_void_p]),
    "draw": (c_int, [c_void_p, c_void_p, c_int]),
}


class Library:
    """The functions of the engine, by the names in engine.cpp without their prefix. Calls release the GIL."""

    def __init__(self, path: Path):
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, f"music_ar_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:  # for type checkers: `__init__` sets the functions
        raise AttributeError(name)


@functools.cache
def load() -> Library | None:
    """The library; None if it was not built, was built from other sources, or does not load on this machine."""
    try:
        library = Library(PATH)
    except (OSError, AttributeError):
        return None
    if library.sources().decode() != digest(PATH.parent):
        return None
    library.set_threads(min(_MOST_THREADS, usable_cores()))
    return library
