"""The documents keep their promises: links lead somewhere, snippets run, commands parse, and the site builds."""

import ast
import json
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import make_performance
from histogram import index_of

from app import cli
from music_ar import write_midi
from music_ar.embedding import PieceEmbedder
from music_ar.model.weights import PASSAGES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
WRITTEN = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md", *DOCS.rglob("*.md")])
HISTORY = {DOCS / "results" / "training-log.md"}  # its commands are those of the commit that it names
NOT_RUN = ("<!-- test: needs the server -->", "<!-- test: needs a model that fills gaps -->")


class Snippet(NamedTuple):
    """A code block of a document."""

    page: Path
    line: int
    language: str
    code: str
    comment: str

    def __str__(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def snippets(*languages):
    """The code blocks of all documents in these languages, in order."""
    fence = re.compile(
        r"(?P<comment>^ *<!--[^\n]*-->\n)?^(?P<indent> *)```(?P<language>\w+)\n(?P<code>.*?)^(?P=indent)```$",
        re.M | re.S,
    )
    for page in WRITTEN:
        text = page.read_text(encoding="utf-8")
        for found in fence.finditer(text):
            if found["language"] in languages:
                line = text.count("\n", 0, found.start("code")) + 1
                comment = (found["comment"] or "").strip()
                yield Snippet(page, line, found["language"], textwrap.dedent(found["code"]), comment)


def shell_commands():
    """Each command of the shell snippets, as a list of words without the environment variables before it."""
    for snippet in snippets("sh"):
        for line in snippet.code.replace("\\\n", " ").splitlines():
            for command in line.split(" && "):
                words = shlex.split(command, comments=True)
                while words and re.fullmatch(r"\w+=\S*", words[0]):
                    words.pop(0)
                if words:
                    yield pytest.param([Path(words[0]).name, *words[1:]], id=f"{snippet} {' '.join(words)}")


def options_of(script):
    """The options that a script with argparse takes, read from its source: some import what is not installed here."""
    calls = (node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call))
    names = (call.args for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument")
    return {name.value for args in names for name in args if isinstance(name, ast.Constant)} | {"--help"}


@pytest.mark.parametrize("words", [*shell_commands()])
def test_commands_in_snippets_can_be_typed(words):
    program, arguments = words[0], words[1:]
    if program == "music-ar":
        if "--version" in arguments or "--help" in arguments:
            with pytest.raises(SystemExit, match=r"^0$"):
                cli.parse(arguments)
        else:
            assert type(cli.parse(arguments)).__name__.lower().startswith(arguments[0].replace("-", ""))
    elif program in ("python", "python3") and arguments[0].endswith(".py") and "/" in arguments[0]:
        given = {argument.split("=")[0] for argument in arguments if argument.startswith("--")}
        assert given <= options_of(ROOT / arguments[0])
    elif program == "pip":
        extras = re.findall(r"\.\[([\w,-]+)\]", " ".join(arguments))
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert {extra for listed in extras for extra in listed.split(",")} <= known.keys()
    else:
        assert program in (
            "python",
            "python3",
            "sh",
            "ruff",
            "pyright",
            "lint-imports",
            "pytest",
            "ray",
            "sbatch",
            "docker",
            "kubectl",
            "sky",
            "node",
            "npx",
            "hf",
        )


def inline_commands():
    for page in WRITTEN:
        if page not in HISTORY:
            for command in re.findall(r"`music-ar ([a-z]+ [^`\n]*--[^`\n]*)`", page.read_text(encoding="utf-8")):
                yield pytest.param(command.split(), id=f"{page.relative_to(ROOT)} {command}")


@pytest.mark.parametrize("words", [*inline_commands()])
def test_options_in_the_text_exist(words, capsys):
    subcommand = [word for word in words[1:2] if not word.startswith("-") and words[0] == "bench"]
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.parse([words[0], *subcommand, "--help"])
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert {word for word in words if word.startswith("--")} <= known


@pytest.fixture(scope="module")
def workplace(tiny_checkpoint, tiny_encoder, tmp_path_factory):
    """A folder with the files that the snippets read."""
    folder = tmp_path_factory.mktemp("snippets")
    for name in ("piece.mid", "mine.mid"):
        write_midi(make_performance(len(name), notes=120), folder / name)
    shutil.copytree(tiny_encoder, encoder := folder / "runs" / "encoder" / "model")
    pieces = [make_performance(seed) for seed in range(3)]
    index_of(pieces, PieceEmbedder.from_pretrained(encoder)).save(encoder / PASSAGES)
    render = ["render", "--count", "1", "--seconds", "1", "--checkpoint", str(tiny_checkpoint)]
    assert cli.main([*render, "--output", str(folder / "out")]) == 0
    return folder


PYTHON = [snippet for snippet in snippets("python") if snippet.comment not in NOT_RUN]


# As users run them: `seconds=60` is no float to the types that tests check.
RUN_SNIPPETS = """
import contextlib, json, sys, traceback
from music_ar import Generator

checkpoint, pretrained = sys.argv[1], Generator.from_pretrained
Generator.from_pretrained = lambda source=None: pretrained(source or checkpoint)
errors = {}
for name, code in json.load(sys.stdin).items():
    with contextlib.redirect_stdout(sys.stderr):
        try:
            exec(compile(code, name, "exec"), {"__name__": "__main__"})
        except Exception:
            errors[name] = traceback.format_exc()
json.dump(errors, sys.stdout)
"""


@pytest.fixture(scope="module")
def errors(workplace, tiny_checkpoint):
    """The tracebacks of the Python snippets that fail, all run in one process with the tiny model."""
    codes = {str(snippet): re.sub(r"latents=\d+", "latents=32", snippet.code) for snippet in PYTHON}
    command = [sys.executable, "-c", RUN_SNIPPETS, str(tiny_checkpoint)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, cwd=workplace, env=environment, input=json.dumps(codes), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("snippet", PYTHON, ids=map(str, PYTHON))
def test_python_snippets_run(snippet, errors):
    assert errors.get(str(snippet)) is None, errors[str(snippet)]


def test_snippets_are_found():
    assert len(PYTHON) >= 9
    assert len([*shell_commands()]) >= 50
    assert len([*inline_commands()]) >= 5


def headings(page):
    """The anchors of a Markdown file, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize(
    "page", [page for page in WRITTEN if DOCS not in page.parents], ids=lambda page: str(page.relative_to(ROOT))
)
def test_links_outside_of_the_site_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#([^)]+))?\)", page.read_text(encoding="utf-8"))
    assert links or page.parent.name == "examples"
    for target, anchor in links:
        path = page.parent / target
        assert path.exists(), target
        assert not anchor or anchor in headings(path), f"{target}#{anchor}"


def test_pictures_and_samples_of_the_site_are_there_and_small():
    for page in DOCS.rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        for source in re.findall(r'!\[[^\]]*\]\(([^)]+)\)|src="([^"]+)"', text):
            assert (page.parent / "".join(source)).is_file(), f"{page}: {source}"
    samples = [*(DOCS / "samples").glob("*.mp3")]
    assert len(samples) >= 2
    assert max(sample.stat().st_size for sample in samples) < 300_000


def test_documents_that_the_code_names_exist():
    folders = ("app", "benchmarks", "data_pipeline", "examples", "music_ar", "checkpoints", ".github")
    files = [path for folder in folders for kind in ("*.py", "*.md", "*.yml") for path in (ROOT / folder).rglob(kind)]
    named = {(path, name) for path in files for name in re.findall(r"\bdocs/[\w/-]+\.\w+", path.read_text("utf-8"))}
    assert named
    assert {(path, name) for path, name in named if not (ROOT / name).exists()} == set()


def test_code_that_the_documents_name_exists():
    folders = [ROOT, *(ROOT / name for name in ("app", "data_pipeline", "examples", "music_ar"))]
    for page in WRITTEN:
        text = page.read_text(encoding="utf-8")
        for path in re.findall(r"`([\w/]+\.py)`", text):
            assert any((folder / path).is_file() for folder in folders), f"{page}: {path}"
        for name in re.findall(r"`((?:app|data_pipeline|music_ar)(?:\.\w+)+)`", text):
            pkgutil.resolve_name(name)


def test_the_readme_is_short_and_has_both_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= 6000
    for mark in ("run", "test"):
        assert text.count(f"<!-- {mark} -->\n```sh\n") == 1


def test_metrics_in_the_documents_are_those_of_the_checkpoint():
    metrics = json.loads((ROOT / "checkpoints/maestro-small/metrics.json").read_text())
    validation, test = (f"{metrics[split]['nats_per_token']:.3f}" for split in ("validation", "test"))
    for page in ("README.md", "docs/results/index.md", "checkpoints/maestro-small/MODEL_CARD.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert validation in text, page
        assert test in text, page
        assert f"{metrics['parameters'] / 1e6:.1f} " in text, page


def test_contributors_and_ci_run_the_same_commands():
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    commands = [line.removeprefix("- ").removeprefix("run: ").strip() for line in map(str.strip, workflow.splitlines())]
    told = (ROOT / "CONTRIBUTING.md").read_text().replace(".venv/bin/", "").splitlines()
    for command in ("ruff format --check .", "ruff check .", "pyright", "lint-imports", "pytest", "pytest -m slow"):
        assert command in commands
        assert command in told
    assert BUILD in " ".join(commands)
    assert BUILD in told


BUILD = "python -m zensical build --clean --strict"


@pytest.fixture(scope="module")
def site():
    """The folder of the site, built strictly: a broken link or a reference to a missing name fails."""
    result = subprocess.run(
        [sys.executable, *BUILD.split()[1:]], cwd=ROOT, capture_output=True, encoding="utf-8", check=False, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return ROOT / "site"


@pytest.mark.slow
def test_the_site_has_every_page_and_asks_no_other_server(site):
    pages = [*site.rglob("*.html")]
    assert len(pages) > len([*DOCS.rglob("*.md")])
    for page in pages:
        html = page.read_text(encoding="utf-8")
        foreign = re.findall(r"<(?:script|img|audio|source|iframe)\b[^>]*?src=\"?(https?:[^\s\">]+)", html)
        foreign += re.findall(r"<link\b[^>]*rel=\"?(?:stylesheet|preload|preconnect)[^>]*?(https?:[^\s\">]+)", html)
        assert foreign == [], page


@pytest.mark.slow
def test_the_reference_has_the_public_names_and_every_command(site):
    import music_ar

    python = (site / "reference/python/index.html").read_text(encoding="utf-8")
    anchors = {name.rpartition(".")[2] for name in re.findall(r'id="(music_ar\.[\w.]+)"', python)}
    assert set(music_ar.__all__) <= anchors
    commands = (site / "reference/command-line/index.html").read_text(encoding="utf-8")
    assert [name for name in cli.COMMANDS if f"usage: music-ar {name}" not in commands] == []


@pytest.mark.slow
@pytest.mark.parametrize("snippet", [each for each in snippets("python") if each.comment == NOT_RUN[0]], ids=str)
def test_snippets_of_the_http_api_run(snippet, workplace, tiny_checkpoint, monkeypatch):
    pytest.importorskip("gradio")
    command = [sys.executable, "-m", "app.cli", "web", "--checkpoint", str(tiny_checkpoint), "--no-measure"]
    monkeypatch.chdir(workplace)
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8"
    ) as server:
        try:
            assert server.stdout is not None
            address = next(found[0] for line in server.stdout if (found := re.search(r"http://[\w.:]+", line)))
            code = snippet.code.replace("http://127.0.0.1:7860", address).replace("seconds=30", "seconds=2")
            names: dict[str, object] = {}
            exec(compile(code, str(snippet), "exec"), names)
        finally:
            server.terminate()
    assert isinstance(names["progress"], dict)
    assert names["progress"]["finished"]
