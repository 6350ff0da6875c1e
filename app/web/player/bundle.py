"""The script of the player: its modules in one text, since Gradio takes the script of a component as a text."""

import re
from pathlib import Path

_IMPORT = re.compile(r"^import (\{[^}]*\}) from '((?:\./|\.\./)\w+)\.js';\n", re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:function\*?|class|const) (\w+))", re.MULTILINE)


def script(folder: Path, first: str) -> str:
    """A script that does what importing a module does.

    Args:
        folder: of the modules. They import each other by name, as `import { a, b } from './module.js';` on one line,
            never in a circle, and export functions, classes and constants where they are declared.
        first: name of the module to run, without its suffix.
    """
    done: dict[Path, str] = {}

    def add(path: Path) -> None:
        if path in done:
            return
        text = path.read_text(encoding="utf-8")
        for _, needed in _IMPORT.findall(text):
            add((path.parent / f"{needed}.js").resolve())
        exported = ", ".join(_EXPORT.findall(text))
        body = _EXPORT.sub("", _IMPORT.sub(lambda found: f"const {found[1]} = modules.{Path(found[2]).name};\n", text))
        done[path] = f"modules.{path.stem} = (() => {{\n{body}\nreturn {{ {exported} }};\n}})();\n"

    add((folder / f"{first}.js").resolve())
    return "const modules = {};\n" + "\n".join(done.values())
