"""The page in a hosted Space: `music-ar web`, reached by the Space's own address.

Options are handed on: `python app.py --checkpoint owner/name`.
"""

import os
import sys


def options(hosts: str) -> list[str]:
    """The options of `music-ar web` in a Space.

    Args:
        hosts: names of the Space, separated by commas: the variable SPACE_HOST.
    """
    addresses = [f"https://{host.strip()}" for host in hosts.split(",")]
    # The Hub shows the Space in a frame of its own page. The machine is shared, so nothing is timed in advance.
    allowed = ["--allow-origin", *addresses, "https://huggingface.co"]
    return ["--host", "0.0.0.0", "--root-path", addresses[0], "--no-measure", *allowed]


if __name__ == "__main__":
    os.environ.setdefault("FORWARDED_ALLOW_IPS", "*")  # only the Hub's proxy reaches this machine
    # This file has the name of a package of Music AR, so the command must not look here: -P, and -E for PYTHONPATH.
    command = [sys.executable, "-E", "-P", "-m", "app.cli", "web", *options(os.environ["SPACE_HOST"]), *sys.argv[1:]]
    os.execv(sys.executable, command)
