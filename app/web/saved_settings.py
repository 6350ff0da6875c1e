"""Settings that come back from outside: the settings.json of a download."""

import json
from pathlib import Path
from typing import Any

from app.web.settings import Settings, WebError

_MAX_BYTES = 64 * 1024  # the page writes less than one of these


def read_settings_file(path: Path) -> dict[str, Any]:
    """The values in a settings.json, for `Settings.read`, which checks them.

    Raises:
        WebError: the file is none that this page has written.
    """
    if path.stat().st_size <= _MAX_BYTES:
        try:
            values = json.loads(path.read_bytes())
        except (ValueError, RecursionError):  # not JSON, not text, too many brackets, numbers with too many digits
            values = None
        if isinstance(values, dict) and values.keys() & Settings().flat().keys():
            return values
    raise WebError(
        f"“{path.name}” holds no settings of this page. Choose the settings.json from a ZIP that you downloaded here."
    )
