"""Use the HTTP API of the web app: print what it offers, generate two variations and continue the livelier one.

    music-ar web &
    python examples/web_api.py http://127.0.0.1:7860 piece.mid

Needs gradio_client, which the extra `web` installs with Gradio.
"""

import argparse
import json
import shutil
from pathlib import Path

from gradio_client import Client  # pyright: ignore[reportMissingImports]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="address of the web app, for example http://127.0.0.1:7860")
    parser.add_argument("output", type=Path, help="MIDI file to write")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of the piece and of its continuation")
    arguments = parser.parse_args()

    client = Client(arguments.address)
    print(json.dumps(client.predict(api_name="/info"), indent=2))
    # A job yields its progress while it runs. To continue a MIDI file, add prompt=handle_file("mine.mid").
    job = client.submit(seconds=arguments.seconds, variations=2, seed=7, api_name="/generate")
    for progress, _ in job:
        print(progress["status"])
    progress, files = job.result()  # a MIDI file for each variation
    chosen = progress["notes"].index(max(progress["notes"]))
    print(f"continuing variation {chosen} of {len(files)}")
    progress, files = client.predict(seconds=arguments.seconds, variation=chosen, api_name="/continue")
    shutil.copy(files[0], arguments.output)
    print(f"{arguments.output}: {progress['notes'][0]} notes, {progress['seconds'][0]:.1f} s")


if __name__ == "__main__":
    main()
