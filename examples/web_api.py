"""Uses the HTTP API of the web app: what it offers, a new piece, and its continuation.

    music-ar web &
    python examples/web_api.py http://127.0.0.1:7860 piece.mid

Needs gradio_client, which comes with Gradio.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from gradio_client import Client, handle_file  # pyright: ignore[reportMissingImports]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="where the app listens, such as http://127.0.0.1:7860")
    parser.add_argument("output", type=Path, help="MIDI file to write")
    parser.add_argument("--seconds", type=float, default=20.0)
    arguments = parser.parse_args()

    client = Client(arguments.address)
    print(json.dumps(client.predict(api_name="/info"), indent=2))
    piece = file_of(client.predict(seconds=arguments.seconds, seed=7, api_name="/generate"))
    longer = file_of(client.predict(handle_file(piece), seconds=arguments.seconds, seed=7, api_name="/continue"))
    shutil.copy(longer, arguments.output)
    print(arguments.output)


def file_of(result: Any) -> str:
    """The MIDI file in a result: the path alone, or the first of several values."""
    return result[0] if isinstance(result, list | tuple) else result


if __name__ == "__main__":
    main()
