"""Map items over the workers of a Ray cluster. The only package that knows Ray (the extra `ray`).

A worker is an actor that holds one thing, such as a decoder, on a device or a core of its own. Ray restarts the worker
of a lost node wherever there is room, and what it was working on goes to another one in the meantime. What workers are
built from is put into Ray's object store once, so that no node needs a copy of the model or of the data.
"""

from music_ar.cluster.connection import AUTO, Cluster
from music_ar.cluster.workers import ClusterError, Result, Workers

__all__ = ["AUTO", "Cluster", "ClusterError", "Result", "Workers"]
