"""`Health`: whether the server can do its work, for supervisors and for `/health`."""

from typing import Any

from app.web.jobs import Jobs


class Health:
    """The state of a server.

    Args:
        jobs: its queue.
        model: name of the model that it has loaded.
    """

    def __init__(self, jobs: Jobs, model: str):
        self._jobs, self._model = jobs, model

    def report(self) -> tuple[int, dict[str, Any]]:
        """An HTTP status, 200 or 503, and what it means."""
        alive = self._jobs.alive
        return 200 if alive else 503, {
            "status": "ok" if alive else "failed",
            "queue": "running" if alive else "ended: restart the server",
            "model": self._model,
            "jobs_running": len(self._jobs.running()),
            "jobs_waiting": len(self._jobs.waiting()),
        }
