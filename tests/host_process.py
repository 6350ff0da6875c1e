"""One of several processes that train the tiny model together; started by `test_hosts`, one by one.

Its argument is JSON: where it stands, the folder of the run, and when it gets which signal.
"""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import tiny_training

from music_ar.training.cluster import Alone, Place, join
from music_ar.training.mesh import make_mesh, process_rows
from music_ar.training.trainer import Trainer


class SharedBatches(tiny_training.CountingBatches):
    """This process's rows of the counting batches; it sends itself a signal while it makes one of them."""

    def __init__(self, rows, signal_at=None, number=signal.SIGTERM):
        super().__init__()
        self.rows, self.signal_at, self.number = list(rows), signal_at, number

    def __next__(self):
        if self.next == self.signal_at:
            os.kill(os.getpid(), self.number)
        return {name: array[self.rows] for name, array in super().__next__().items()}


def end(sentence):
    print(f"ended: {sentence}", flush=True)
    os._exit(4)


def main():
    given: dict[str, Any] = json.loads(sys.argv[1])
    place = Place(host="127.0.0.1", port=given["port"], processes=given["processes"], process=given["process"])
    cluster = None
    if place.processes > 1:
        cluster = join(place, {}, timeout_s=300, on_lost=end)
    config = dataclasses.replace(tiny_training.TRAINING, final_fraction=0.0, log_every=1, **given["config"])
    mesh = make_mesh()
    batches = SharedBatches(process_rows(mesh, config.batch_size), given["signal_at"], signal.Signals[given["signal"]])
    validated = []

    def validate(model):
        validated.append(float(model.head.bias[...].sum()))
        return -len(validated)

    try:
        fitted = Trainer(
            tiny_training.fresh_model(), config, batches, output=Path(given["output"]), resume=given["resume"],
            validate=validate, hosts=cluster or Alone(), mesh=mesh,
        ).fit()  # fmt: skip
    except Exception as error:
        if cluster is not None:
            cluster.abandon(str(error), is_own_fault=isinstance(error, ValueError))
        print(f"failed: {error}", flush=True)
        os._exit(2)
    print(json.dumps({"step": fitted.step, "finished": fitted.finished, "validated": validated}), flush=True)
    if cluster is not None:
        cluster.leave()


if __name__ == "__main__":
    main()
