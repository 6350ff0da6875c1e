"""`Blocks`: a Gradio app that says in words what is wrong with the values it is sent."""

import re
from typing import Any
from urllib.parse import unquote

import gradio as gr
from gradio.exceptions import InvalidPathError

from app.web.settings import in_words

_OWN_FILE = re.compile(r"https?://[^/]+(?:/[^?#]*)?/gradio_api/file=(/[^?#]+)")
_EXPECTED = "the prompt must be an uploaded MIDI file (in Python: handle_file(path))"


class Blocks(gr.Blocks):
    """Gradio would answer wrong values with a traceback in the log and no reason for the client."""

    async def preprocess_data(
        self, block_fn: Any, inputs: list[Any], state: Any, explicit_call: bool = False
    ) -> list[Any]:
        """Check the values and prepare them for a handler.

        Raises:
            gr.Error: a value cannot be used.
        """
        try:
            for number, (component, value) in enumerate(zip(block_fn.inputs, inputs, strict=False)):
                if isinstance(component, gr.File | gr.UploadButton):
                    inputs[number] = _checked_file(value)
            return await super().preprocess_data(block_fn, inputs, state, explicit_call)
        except FileNotFoundError as error:
            raise gr.Error("this file is gone: upload it again", print_exception=False) from error
        except InvalidPathError as error:
            raise gr.Error(f"{_EXPECTED}, got a path on the server", print_exception=False) from error
        except gr.Error as error:
            raise gr.Error(error.message, print_exception=False) from error
        except Exception as error:
            raise gr.Error("a value has the wrong type; reload the page", print_exception=False) from error


def _checked_file(value: Any) -> Any:
    """Check that a value stands for an uploaded file; Gradio would fetch addresses, and say nothing of other mistakes.

    Raises:
        gr.Error: it does not.
    """
    if value is None:
        return None
    path = value.get("path") if isinstance(value, dict) else value
    own = _OWN_FILE.fullmatch(path) if isinstance(path, str) else None
    if own:  # Gradio then checks that it is in the folder of uploads and downloads
        return {"path": unquote(own[1]), "meta": {"_type": "gradio.FileData"}}
    if isinstance(path, str) and path.lower().startswith(("http:", "https:", "ftp:", "data:")):
        raise gr.Error(f"{_EXPECTED}, got an address: download the file first")
    if not isinstance(value, dict) or not isinstance(path, str) or not path:
        raise gr.Error(f"{_EXPECTED}, got {in_words(value)}")
    if not isinstance(value.get("meta"), dict) or value["meta"].get("_type") != "gradio.FileData":
        raise gr.Error(f"{_EXPECTED}, got an object that is not a file")
    return value
