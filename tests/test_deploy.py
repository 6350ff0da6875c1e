"""What runs elsewhere: image, manifests, scripts, notebook and Space: their commands, and what confines them."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from app import cli
from music_ar import Generator, read_midi

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
DOCKERFILE = re.sub(r"\\\n\s*", " ", (DEPLOY / "Dockerfile").read_text())
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
MANIFESTS = [
    each for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")) for each in yaml.safe_load_all(path.read_text())
]
needs_shell = pytest.mark.skipif(sys.platform == "win32", reason="shell scripts and signals")


def instructions(name):
    """The arguments of an instruction of the Dockerfile, wherever it stands."""
    return re.findall(rf"^\s*{name} (.*)$", DOCKERFILE, re.M)


def pods(manifest):
    """The pods that a manifest describes."""
    if isinstance(manifest, dict):
        if "containers" in manifest:
            yield manifest
        for value in manifest.values():
            yield from pods(value)
    elif isinstance(manifest, list):
        for value in manifest:
            yield from pods(value)


PODS = [pod for manifest in MANIFESTS for pod in pods(manifest)]
CONTAINERS = {container["name"]: container for pod in PODS for container in pod["containers"]}
COMMANDS = {
    "image": json.loads(instructions("CMD")[-1]),
    "page in compose": COMPOSE["services"]["page"]["command"],
    "render in compose": [*COMPOSE["services"]["render"]["entrypoint"][1:], *COMPOSE["services"]["render"]["command"]],
    "page in Kubernetes": CONTAINERS["page"]["args"],
    "render in Kubernetes": CONTAINERS["render"]["args"],
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_commands_can_be_given(words):
    command = cli.parse(words)
    assert type(command).__name__.lower() == words[0]
    if words[0] == "web":
        assert (vars(command)["host"], vars(command)["port"]) == ("0.0.0.0", 7860)


def test_the_image_is_not_run_by_root_and_downloads_nothing():
    assert int(instructions("USER")[-1].split(":")[0]) >= 1000
    assert instructions("EXPOSE") == ["7860"]
    assert json.loads(instructions("ENTRYPOINT")[-1]) == ["music-ar"]
    assert "HF_HUB_OFFLINE=1" in " ".join(instructions("ENV"))
    targets = [words.split() for words in instructions("FROM")]
    assert [words[-1] for words in targets][-2:] == ["cuda", "cpu"]  # the last is the default
    assert {words[0] for words in targets[-2:]} == {"runtime"}
    *_, licenses = re.findall(r'image\.licenses="([^"]*)"', DOCKERFILE)
    assert licenses.split(" AND ") == ["Apache-2.0", "CC-BY-NC-SA-4.0", "CC-BY-3.0"]


def test_the_image_is_built_from_what_the_wheel_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    kept = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert all((ROOT / name).exists() for name in kept)
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {*wheel["only-include"], wheel["hooks"]["custom"]["path"]} <= kept
    assert {project["project"]["readme"], *project["project"]["license-files"]} <= kept
    assert {"pyproject.toml", "requirements.lock"} <= kept
    copied = {words.split()[0] for words in instructions("COPY") if not words.startswith("--from")} - {"."}
    assert copied <= kept
    extras = {extra for listed in re.findall(r"'\.\[([\w,]+)\]'", DOCKERFILE) for extra in listed.split(",")}
    assert extras <= project["project"]["optional-dependencies"].keys()


@pytest.mark.parametrize("pod", PODS, ids=[pod["containers"][0]["name"] for pod in PODS])
def test_pods_are_confined_and_can_write_where_they_must(pod):
    [container] = pod["containers"]
    assert container["image"].split(":")[0] == "music-ar"
    own = pod["securityContext"]
    assert own["runAsNonRoot"]
    assert f"{own['runAsUser']}:{own['runAsGroup']}" == instructions("USER")[-1]
    confined = container["securityContext"]
    assert confined["readOnlyRootFilesystem"]
    assert not confined["allowPrivilegeEscalation"]
    assert confined["capabilities"] == {"drop": ["ALL"]}
    assert "memory" in container["resources"]["limits"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}
    assert {"/cache", "/tmp"} <= mounts.keys()
    claims = {each["metadata"]["name"] for each in MANIFESTS if each["kind"] == "PersistentVolumeClaim"}
    assert {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v} <= claims
    absolute = [word.split("=")[-1] for word in container["args"] if word.split("=")[-1].startswith("/")]
    assert all(path.startswith("/shared/") for path in absolute)
    assert ("/shared" in mounts) == bool(absolute)


def test_probes_ask_for_health_at_the_port_of_the_page():
    page = CONTAINERS["page"]
    [port] = page["ports"]
    assert str(port["containerPort"]) == page["args"][page["args"].index("--port") + 1]
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert page[name]["httpGet"] == {"path": "/health", "port": port["name"]}
    [service] = [each["spec"] for each in MANIFESTS if each["kind"] == "Service"]
    [deployment] = [each["spec"] for each in MANIFESTS if each["kind"] == "Deployment"]
    assert service["selector"].items() <= deployment["template"]["metadata"]["labels"].items()
    assert service["ports"][0]["targetPort"] == port["name"]


def test_jobs_are_such_as_jax_detects():
    kinds = {each["kind"]: each for each in MANIFESTS}
    [hosts] = kinds["JobSet"]["spec"]["replicatedJobs"]
    for job in (hosts["template"]["spec"], kinds["Job"]["spec"]):
        assert job["completionMode"] == "Indexed"
        assert job["completions"] == job["parallelism"]
        assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert hosts["replicas"] == 1
    account = hosts["template"]["spec"]["template"]["spec"]["serviceAccountName"]
    assert account == kinds["ServiceAccount"]["metadata"]["name"] == kinds["RoleBinding"]["subjects"][0]["name"]
    assert kinds["RoleBinding"]["roleRef"]["name"] == kinds["Role"]["metadata"]["name"]
    allowed = {(what, verb) for rule in kinds["Role"]["rules"] for what in rule["resources"] for verb in rule["verbs"]}
    assert {("pods", "list"), ("jobs", "get")} <= allowed


def test_containers_of_compose_are_confined():
    for name, service in COMPOSE["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"]
        assert (DEPLOY / service["build"]["context"]).resolve() == ROOT
        assert service["build"]["target"] in {words.split()[-1] for words in instructions("FROM")}
        assert {volume.split(":")[0] for volume in service["volumes"]} <= COMPOSE["volumes"].keys()
    assert COMPOSE["services"]["page"]["ports"] == ["127.0.0.1:7860:7860"]  # without a password, for this machine only


class Shell:
    """Runs scripts of deploy/ where `music-ar`, `srun` and `scontrol` note that they were called."""

    def __init__(self, folder):
        self._folder, self._commands = folder, folder / "commands"
        self._commands.mkdir()
        (folder / "home" / "music-ar").mkdir(parents=True)
        (folder / "home" / "music-ar" / "bin").symlink_to(self._commands)

    def _write(self, name, script):
        (self._commands / name).write_text(f"#!/bin/sh\n{script}\n")
        (self._commands / name).chmod(0o755)

    def start(self, script, *arguments, music_ar="", srun='exec "$@"', **environment):
        """Start a file, or a text; `music_ar` and `srun` are what those commands do."""
        self._write("music-ar", f'printf "%s\\n" "$@" > {self._folder}/music-ar.txt\n{music_ar}')
        self._write("scontrol", f'printf "%s\\n" "$@" > {self._folder}/scontrol.txt')
        self._write("srun", srun)
        own = {"PATH": f"{self._commands}:{os.environ['PATH']}", "HOME": str(self._folder / "home")}
        words = ["sh", *([] if isinstance(script, Path) else ["-c"]), str(script), *map(str, arguments)]
        return subprocess.Popen(words, cwd=ROOT, env=os.environ | own | {"SLURM_JOB_ID": "7"} | environment)

    def run(self, *arguments, **options):
        """The exit code of what `start` starts."""
        return self.start(*arguments, **options).wait(timeout=400)

    def called(self, name):
        """The arguments of the last call of a command, which is then forgotten; None if there was none."""
        path = self._folder / f"{name}.txt"
        words = path.read_text().splitlines() if path.exists() else None
        path.unlink(missing_ok=True)
        return words


@pytest.fixture
def shell(tmp_path):
    return Shell(tmp_path)


FINISH = 'mkdir -p "$3/model" && touch "$3/model/config.json"'  # $3 is the value of --output
DATA = ["--data", "data/maestro", "--minutes", "60"]
TRAIN = DEPLOY / "train_until_done.sh"


@needs_shell
@pytest.mark.parametrize(
    ("there", "does", "resumed", "code"),
    [
        (None, FINISH, False, 0),
        (None, "exit 0", False, 75),
        (None, "exit 4", False, 4),
        ("training/settings.json", FINISH, False, 0),
        ("training/20.orbax-checkpoint-tmp/state", FINISH, False, 0),
        ("training/20/state", FINISH, True, 0),
        ("training/20/state", "exit 0", True, 75),
        ("training/20/state", "exit 2", True, 2),
    ],
)
def test_training_goes_on_until_the_model_is_there(shell, tmp_path, there, does, resumed, code):
    run = tmp_path / "a run"
    if there is not None:
        (run / there).parent.mkdir(parents=True)
        (run / there).touch()
    assert shell.run(TRAIN, run, *DATA, music_ar=does) == code
    assert shell.called("music-ar") == ["train", "--output", str(run), *DATA, *(["--resume"] if resumed else [])]


@needs_shell
def test_a_finished_run_is_not_started_again(shell, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    assert shell.run(TRAIN, tmp_path, *DATA) == 0
    assert shell.called("music-ar") is None


@needs_shell
@pytest.mark.parametrize("code", [0, 130])  # a checkpoint is saved; the run had not begun
def test_sigterm_is_handed_on_and_waited_for(shell, tmp_path, code):
    """As in a container, where the script is the first process and gets the signal alone."""
    saves = f"trap 'sleep 0.3; touch {tmp_path}/saved; exit {code}' TERM; touch {tmp_path}/started"
    process = shell.start(TRAIN, tmp_path / "run", *DATA, music_ar=f"{saves}; while :; do sleep 0.02; done")
    wait_for((tmp_path / "started").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert (tmp_path / "saved").exists()


def wait_for(condition, seconds=60):
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.02)


def example_of(script):
    """The arguments of the command that the head of a script shows."""
    [line] = re.findall(rf"^#     sbatch deploy/{script} (.*)$", (DEPLOY / script).read_text(), re.M)
    return shlex.split(line)


@needs_shell
def test_training_commands_can_be_given(shell):
    """Those of Slurm, SkyPilot and Kubernetes, as they reach `music-ar`."""
    sky = yaml.safe_load((DEPLOY / "skypilot.yaml").read_text())
    pod = CONTAINERS["train"]
    assert pod["command"] == [TRAIN.name]
    for script, arguments in ((DEPLOY / "slurm.sh", example_of("slurm.sh")), (sky["run"], ()), (TRAIN, pod["args"])):
        assert shell.run(script, *arguments, music_ar="exit 3") == 3
        command = cli.parse(shell.called("music-ar"))
        assert vars(command)["output"] == Path("/shared/runs/small")
        assert vars(command)["processes"] is None  # the launcher says it
    assert 75 in sky["resources"]["job_recovery"]["recover_on_exit_codes"]


@needs_shell
@pytest.mark.parametrize(("code", "requeued"), [(75, ["requeue", "7"]), (2, None)])
def test_slurm_queues_what_was_stopped_again(shell, tmp_path, code, requeued):
    ended = shell.run(DEPLOY / "slurm.sh", tmp_path / "run", *DATA, music_ar=f"exit {code}")
    assert ended == (0 if requeued else code)
    assert shell.called("scontrol") == requeued


# Tasks on this machine, as Slurm would start them: two at first, whose time limit nears as soon as a step is logged.
SRUN = """
import os, pathlib, signal, subprocess, sys, time
log = pathlib.Path(sys.argv[3], "log.jsonl")
limited = not log.exists()
count = 2 if limited else 1
own = {"SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_LOCALID": "0", "CUDA_VISIBLE_DEVICES": "0"}
own |= {"SLURM_NTASKS": str(count)}
tasks = [subprocess.Popen(sys.argv[1:], env=os.environ | own | {"SLURM_PROCID": str(i)}) for i in range(count)]
while limited and not (log.exists() and log.read_text()) and all(task.poll() is None for task in tasks):
    time.sleep(0.02)
for task in tasks if limited else ():
    task.send_signal(signal.SIGTERM)
sys.exit(max(task.wait() for task in tasks))
"""


def free_job():
    """Number of a job whose port, which JAX derives from it, is free."""
    for job in range(os.getpid() % 4000, 4096):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 61440 + job)):
                return str(job)
    raise AssertionError("no port is free")


@needs_shell
@pytest.mark.slow
def test_training_under_slurm_continues_after_the_time_limit(shell, prepared, tmp_path):
    run, python = tmp_path / "run", shlex.quote(sys.executable)
    options = ["--preset", "tiny", "--steps", 80, "--batch-size", 4, "--log-every", 1, "--data", prepared]
    for requeued in (True, False):
        code = shell.run(
            DEPLOY / "slurm.sh",
            *(run, *options),
            music_ar=f'exec {python} -m app.cli "$@"',
            srun=f'exec {python} -c {shlex.quote(SRUN)} "$@"',
            SLURM_JOB_ID=free_job(),
            PYTHONPATH=str(ROOT),
        )
        assert code == 0
        assert (shell.called("scontrol") is not None) == requeued
        assert (run / "model" / "config.json").exists() != requeued
    steps = [
        each["step"] for line in (run / "log.jsonl").read_text().splitlines() if "step" in (each := json.loads(line))
    ]
    assert max(steps) == 80


@pytest.mark.usefixtures("any_types")
def test_the_notebook_runs(tiny_checkpoint, tmp_path, monkeypatch):
    display = pytest.importorskip("IPython.display")
    notebook = json.loads((DEPLOY / "colab.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["metadata"].get("tags") for cell in cells[:2]] == [["install"], None]
    assert all(cell["outputs"] == [] for cell in cells)
    shown = []
    monkeypatch.setattr(display, "display", shown.append)
    monkeypatch.setattr(Generator, "from_pretrained", lambda: pretrained(tiny_checkpoint))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in cells[1:]:
        code = re.sub(r"\b(prompt_seconds|seconds)=\d+", r"\1=2", "".join(cell["source"]))
        exec(compile(code, cell["id"], "exec"), names)
    assert [type(each).__name__ for each in shown] == ["Audio", "Audio", "Figure"]
    assert len(read_midi("longer.mid")) > len(read_midi("piece.mid")) > 0
    assert len(list(Path("pieces").glob("*.mid"))) == 4
    assert Path("pieces.zip").exists()


pretrained = Generator.from_pretrained


def test_the_card_of_the_space_fits_the_lock_file():
    card = yaml.safe_load((DEPLOY / "space" / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert f"gradio=={card['sdk_version']}" in (ROOT / "requirements.lock").read_text().splitlines()
    assert (DEPLOY / "space" / card["app_file"]).exists()
    assert card["license"] == "cc-by-nc-sa-4.0"
    assert card["python_version"] in re.findall(r"python:([\d.]+)-", DOCKERFILE)


@needs_shell
@pytest.mark.slow
def test_the_space_runs_and_the_image_can_ask_for_its_health(tiny_checkpoint, tmp_path):
    own = {"SYSTEM": "spaces", "SPACE_ID": "owner/music", "SPACE_HOST": "owner-music.hf.space"}
    app = tmp_path / "app.py"  # alone in its folder, on the path, as in a Space
    app.write_bytes((DEPLOY / "space" / "app.py").read_bytes())
    process = subprocess.Popen(
        [sys.executable, app.name, "--checkpoint", str(tiny_checkpoint)],
        cwd=tmp_path,
        env=os.environ | own | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://[^\s,]+?:(\d+)", process.stdout.readline())
        assert found is not None
        port = found[1]
        for host, path, expected in (
            ("owner-music.hf.space", "/health", 200),
            ("owner-music.hf.space", "/", 200),
            ("elsewhere.example", "/health", 421),
        ):
            status, headers = ask(port, host, path)
            assert status == expected, (host, path)
        status, headers = ask(port, "owner-music.hf.space", "/")
        assert "https://huggingface.co" in headers["content-security-policy"].split("frame-ancestors")[1]
        _, *asks = json.loads(instructions("HEALTHCHECK")[0].partition(" CMD ")[2].replace("7860", port))
        assert subprocess.run([sys.executable, *asks], check=False).returncode == 0
    finally:
        process.terminate()
        process.communicate(timeout=30)
    assert subprocess.run([sys.executable, *asks], check=False, stderr=subprocess.DEVNULL).returncode != 0


def ask(port, host, path):
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", headers={"Host": host, "X-Forwarded-Proto": "https"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.headers
