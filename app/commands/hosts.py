"""What a command does on many hosts: join the others, do the work, and part, or end when one of them fails."""

import os
import sys
import traceback
from collections.abc import Callable
from importlib import metadata
from typing import TYPE_CHECKING, Any, NoReturn

from app.console import HOST_GONE, error_line, is_bad_input
from music_ar.code import code_digest

if TYPE_CHECKING:
    from music_ar.training.cluster import Hosts
    from music_ar.training.control import Place


def run_together(
    place: "Place", description: dict[str, Any], work: Callable[["Hosts"], None], *, timeout_s: float
) -> None:
    """Join the cluster and do the work.

    Once it is joined, a failure ends the process without Python's usual exit, in which JAX waits for all others.

    Args:
        place: where this process stands.
        description: what must be the same on all hosts.
        work: gets the joined processes.
        timeout_s: how long to wait for all of them.

    Raises:
        ClusterError: some processes are missing, or differ.
    """
    from music_ar.training.cluster import join

    cluster = join(
        place,
        description,
        timeout_s=timeout_s,
        on_lost=lambda sentence: _end(HOST_GONE, f"{sentence}; the same command with --resume continues the run"),
    )
    try:
        work(cluster)
        cluster.leave()
    except KeyboardInterrupt:
        cluster.abandon("interrupted", is_own_fault=True)
        _end(130, "interrupted")
    except Exception as error:
        bad_input = is_bad_input(error)
        cluster.abandon(error_line(error), is_own_fault=bad_input)
        if not bad_input:
            traceback.print_exc()
        _end(2 if bad_input else 1, error_line(error))


def code_and_packages() -> dict[str, Any]:
    """Return what tells one version of the code from another, and the versions of the packages that compute."""
    packages = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "grain")}
    return {"the code": code_digest()[:12], "packages": packages}


def _end(code: int, sentence: str) -> NoReturn:
    """End the process at once, whatever its other threads wait for."""
    sys.stdout.flush()
    print(f"music-ar: {sentence}", file=sys.stderr, flush=True)
    os._exit(code)
