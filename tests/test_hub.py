"""A model on the Hub and back, against a stand-in of the Hub's HTTP interface."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import huggingface_hub
import numpy as np
import pytest
from hub_server import LARGE_BYTES, OTHER_TOKEN, OWNER_TOKEN, READ_TOKEN, HubServer, Repository
from huggingface_hub import constants
from huggingface_hub.repocard_data import model_index_to_eval_results

from app import cli
from music_ar.generator import Generator
from music_ar.model.publishing import prepare_upload
from music_ar.model.weights import CheckpointError, read_companion, read_figures, read_weights

METRICS = {
    "validation": {"nats_per_token": 1.75, "nats_per_note": 6.5, "nats_per_second": float("nan"), "notes": 9},
    "test": {"nats_per_token": 1.5},
    "scored_with": {"latents": 64},
    "train": {"nats_per_token": 1.25},
}
CURVE = {"benchmark": "decode", "rows": [{"latents": 64, "nats_per_token": 1.9}]}
CARD = "# Mine\n\nA model that plays.\n"
_sleep = time.sleep

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the Hub's client, of its own


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    """A model with card, curve and metrics, and a file that is nobody's business."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "MODEL_CARD.md").write_text(CARD)
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    (folder / "curve.json").write_text(json.dumps(CURVE))
    (folder / "diary.txt").write_text("private")
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub, an empty cache, and the token of the user `me`."""
    with HubServer() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)  # the client has read its environment already
        template = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", OWNER_TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(time, "sleep", lambda seconds: _sleep(min(seconds, 0.01)))  # between its tries
        huggingface_hub.close_session()
        yield hub
        huggingface_hub.close_session()


def push(capsys, *arguments):
    """(exit code, standard output, what standard error says) of `music-ar push arguments`."""
    code = cli.main(["push", *map(str, arguments)])
    output, errors = capsys.readouterr()
    assert "Traceback" not in errors
    return code, output, errors.partition("music-ar: ")[2]  # the client's progress bars come before


def metadata(card):
    """The metadata of a card as the Hub's client reads them; scores by split and name of the metric."""
    data = huggingface_hub.ModelCard(card).data.to_dict()
    name, results = model_index_to_eval_results(data.get("model-index", [{"name": None, "results": []}]))
    scores = {(result.dataset_split, result.metric_type): result.metric_value for result in results}
    return data | {"name": name, "scores": scores, "scored on": {result.dataset_name for result in results}}


def commits(hub, name="me/piano"):
    return len(hub.repositories[name].commits)


def test_a_model_is_published_in_one_commit(hub, folder, capsys):
    code, output, _ = push(capsys, folder, "me/piano")
    assert code == 0
    assert output.splitlines()[-1] == f"{hub.address}/me/piano/commit/{2:040x}"
    files = hub.files("me/piano")
    assert files.keys() == {
        ".gitattributes",
        "README.md",
        "config.json",
        "model.safetensors",
        "curve.json",
        "metrics.json",
    }
    for name in ("config.json", "model.safetensors", "curve.json", "metrics.json"):
        assert files[name] == (folder / name).read_bytes()
    assert len(files["model.safetensors"]) > LARGE_BYTES  # so both ways of uploading are taken
    assert commits(hub) == 2
    assert not hub.repositories["me/piano"].private


@pytest.mark.usefixtures("hub")
def test_it_comes_back_with_card_curve_and_metrics(folder, capsys):
    push(capsys, folder, "me/piano")
    back, sent = read_weights("me/piano"), read_weights(folder)
    assert back.config == sent.config
    for name, tensor in sent.tensors.items():
        np.testing.assert_array_equal(back.tensors[name], tensor)
    assert read_companion("me/piano", "MODEL_CARD.md") == CARD
    assert read_figures("me/piano", "curve.json") == CURVE
    assert read_figures("me/piano", "metrics.json")["test"] == METRICS["test"]
    assert Generator.from_pretrained("me/piano").config == sent.config


@pytest.mark.usefixtures("hub")
def test_what_was_fetched_is_there_without_a_connection(folder, capsys, monkeypatch):
    push(capsys, folder, "me/piano")
    read_weights("me/piano")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert read_weights("me/piano").config == read_weights(folder).config
    assert read_companion("me/piano", "MODEL_CARD.md") == CARD


def test_the_card_has_the_metadata_that_the_hub_reads(folder):
    card = prepare_upload(folder, "me/piano").card
    assert huggingface_hub.ModelCard(card).text.strip() == CARD.strip()
    data = metadata(card)
    assert (data["license"], data["library_name"], data["datasets"]) == (
        "cc-by-nc-sa-4.0",
        "music-ar",
        ["maestro-v3.0.0"],
    )
    assert {"piano", "midi", "perceiver-ar"} <= set(data["tags"])
    assert data["name"] == "piano"
    assert data["scores"] == {
        ("validation", "nats_per_token"): 1.75,
        ("validation", "nats_per_note"): 6.5,
        ("test", "nats_per_token"): 1.5,
    }


def test_own_metadata_are_kept_and_options_win(folder):
    own = "license: mit\nthumbnail: a.png\ntags: jazz\ndatasets: own\nmodel-index: [{name: old, results: []}]"
    (folder / "MODEL_CARD.md").write_text(f"---\n{own}\n---\n# Mine\n")
    data = metadata(prepare_upload(folder, "me/piano").card)
    assert (data["license"], data["thumbnail"], data["tags"][0], data["name"]) == ("mit", "a.png", "jazz", "piano")
    assert data["datasets"] == ["own"]
    card = prepare_upload(folder, "me/piano", license="apache-2.0", datasets=["mine", "yours"]).card
    data = metadata(card)
    assert (data["license"], data["datasets"], data["scored on"]) == ("apache-2.0", ["mine", "yours"], {"mine"})
    assert card.count("\n---\n") == 1


def test_a_model_without_a_card_gets_one(hub, tiny_checkpoint, capsys):
    code, output, _ = push(capsys, tiny_checkpoint, "me/piano")
    assert code == 0
    assert "curve.json" not in output
    card = hub.files("me/piano")["README.md"].decode()
    assert 'Generator.from_pretrained("me/piano")' in card
    assert metadata(card)["scores"] == {}
    assert read_companion("me/piano", "MODEL_CARD.md").startswith("# piano\n")
    assert read_figures("me/piano", "curve.json") == {}


@pytest.mark.usefixtures("hub")
def test_what_was_fetched_is_published_again_the_same(folder, capsys):
    push(capsys, folder, "me/piano")
    read_weights("me/piano")
    fetched = huggingface_hub.snapshot_download("me/piano")
    assert prepare_upload(fetched, "me/piano").card == prepare_upload(folder, "me/piano").card


def test_a_dry_run_lists_files_with_their_sizes_and_asks_nothing(hub, folder, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    code, output, _ = push(capsys, folder, "me/piano", "--dry-run")
    assert code == 0
    assert hub.asked == []
    sizes = dict(line.split() for line in output.splitlines()[1:6])
    assert sizes.keys() == {"README.md", "config.json", "model.safetensors", "curve.json", "metrics.json"}
    assert sizes["model.safetensors"] == f"{(folder / 'model.safetensors').stat().st_size:,}"
    card = prepare_upload(folder, "me/piano").card
    assert sizes["README.md"] == str(len(card.encode()))
    assert card in output


def test_a_private_model_is_for_its_owner(hub, folder, capsys, monkeypatch):
    assert push(capsys, folder, "me/piano", "--private")[0] == 0
    assert hub.repositories["me/piano"].private
    for token in (OTHER_TOKEN, ""):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(CheckpointError, match=r"me/piano .*no such repository, or it is private: .*HF_TOKEN"):
            read_weights("me/piano")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(CheckpointError, match="the access token is wrong or has expired"):
        read_weights("me/piano")
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    assert read_weights("me/piano").config == read_weights(folder).config


def test_a_private_model_does_not_go_where_everybody_sees_it(hub, folder, capsys):
    push(capsys, folder, "me/piano")
    code, _, said = push(capsys, folder, "me/piano", "--private", "--update")
    assert (code, commits(hub)) == (2, 2)
    assert "everybody can see it" in said
    push(capsys, folder, "me/secret", "--private")
    assert push(capsys, folder, "me/secret", "--private", "--update")[0] == 0


def test_access_on_request_is_explained(hub, folder, capsys):
    push(capsys, folder, "me/piano")
    hub.refused = ("GET ", 403, "GatedRepo")
    with pytest.raises(CheckpointError, match="its owner gives access on request"):
        read_weights("me/piano")


def test_a_repository_of_something_else_is_named(hub):
    hub.repositories["me/notes"] = Repository(private=False)
    with pytest.raises(CheckpointError, match=r"me/notes on the hub has no config\.json"):
        read_weights("me/notes")


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        ("", "me/piano", "pushing to the Hub needs an account there: log in"),
        ("hf_wrong", "me/piano", "the access token is wrong or has expired"),
        (READ_TOKEN, "me/piano", "the access token does not allow it .*namespace me"),
        (OWNER_TOKEN, "you/piano", "the access token does not allow it .*namespace you"),
    ],
)
def test_who_may_not_write_is_told_why(hub, folder, capsys, monkeypatch, token, name, message):
    monkeypatch.setenv("HF_TOKEN", token)
    code, _, said = push(capsys, folder, name)
    assert code == 2
    assert re.search(message, said)
    assert hub.repositories == {}


def test_a_name_that_is_taken_is_refused_until_it_is_to_be_updated(hub, folder, capsys):
    push(capsys, folder, "me/piano")
    before = dict(hub.files("me/piano"))
    (folder / "curve.json").unlink()
    (folder / "MODEL_CARD.md").write_text("# Better\n")
    code, _, said = push(capsys, folder, "me/piano")
    assert (code, commits(hub)) == (2, 2)
    assert "me/piano exists already" in said
    assert "--update" in said
    hub.files("me/piano")["notes.txt"] = b"by hand"
    assert push(capsys, folder, "me/piano", "--update")[0] == 0
    after = hub.files("me/piano")
    assert commits(hub) == 3
    assert after.keys() == before.keys() - {"curve.json"} | {"notes.txt"}  # no curve of another model stays
    assert b"# Better" in after["README.md"]


@pytest.mark.parametrize("step", ["POST .*/preupload/", "POST .*/objects/batch", "PUT /large/", "POST .*/commit/"])
def test_a_connection_that_breaks_leaves_nothing_half_done(hub, folder, capsys, step):
    hub.broken = step
    code, _, said = push(capsys, folder, "me/piano")
    assert code == 2
    assert "me/piano could not be uploaded" in said
    assert "repeat the command" in said
    assert hub.files("me/piano").keys() == {".gitattributes"}
    hub.broken = "^$"
    assert push(capsys, folder, "me/piano")[0] == 0  # an empty repository is not a taken name
    assert commits(hub) == 2


def test_an_update_that_breaks_leaves_what_was_there(hub, folder, capsys):
    push(capsys, folder, "me/piano")
    before = dict(hub.files("me/piano"))
    (folder / "MODEL_CARD.md").write_text("# Better\n")
    hub.broken = "POST .*/commit/"
    assert push(capsys, folder, "me/piano", "--update")[0] == 2
    assert hub.files("me/piano") == before


@pytest.mark.parametrize(
    ("status", "message"), [(412, "somebody else has changed"), (503, "error 503"), (429, "too many requests")]
)
def test_a_hub_that_refuses_the_commit_is_understood(hub, folder, capsys, status, message):
    hub.refused = ("POST .*/commit/", status, "")
    code, _, said = push(capsys, folder, "me/piano")
    assert code == 2
    assert message in said
    assert commits(hub) == 1


def test_a_change_by_somebody_else_is_not_overwritten(hub, folder, capsys, monkeypatch):
    push(capsys, folder, "me/piano")
    (folder / "MODEL_CARD.md").write_text("# Better\n")
    real = huggingface_hub.HfApi.create_commit

    def late(api, *arguments, **options):
        hub.repositories["me/piano"].commits.append({"README.md": b"of somebody else"})
        return real(api, *arguments, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", late)
    code, _, said = push(capsys, folder, "me/piano", "--update")
    assert code == 2
    assert "somebody else has changed" in said
    assert hub.files("me/piano") == {"README.md": b"of somebody else"}


def test_a_download_that_breaks_is_continued(hub, folder, capsys):
    push(capsys, folder, "me/piano")
    hub.broken = "GET .*/resolve/.*safetensors"
    with pytest.raises(CheckpointError, match="me/piano"):
        read_weights("me/piano")
    hub.broken = "^$"
    assert read_weights("me/piano").config == read_weights(folder).config


@pytest.mark.usefixtures("hub")
def test_a_hub_that_is_gone_is_named(monkeypatch):
    with pytest.raises(CheckpointError, match=r"me/nothing .*no such repository"):
        read_weights("me/nothing")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(CheckpointError, match=r"me/piano .*fetched from the hub: .*[Cc]onnect"):
        read_weights("me/piano")


def damage(folder, name, text):
    (folder / name).write_text(text)


def flip_a_weight(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (shutil.rmtree, "expected a folder, or the name of a model that ships"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
        (flip_a_weight, "model.safetensors"),
        (lambda folder: damage(folder, "config.json", "{"), "not a model configuration"),
        (lambda folder: damage(folder, "curve.json", '{"rows": ['), "curve.json of the model is not JSON"),
        (lambda folder: damage(folder, "metrics.json", "[1]"), "metrics.json of the model has no names"),
        (
            lambda folder: damage(folder, "MODEL_CARD.md", "---\na: [\n---\n# Mine"),
            "the metadata at the top of the card",
        ),
        (
            lambda folder: damage(folder, "MODEL_CARD.md", "---\n- a\n---\n# Mine"),
            "the metadata at the top of the card",
        ),
    ],
)
def test_what_is_no_model_is_refused_before_anything_is_sent(hub, folder, capsys, harm, message):
    harm(folder)
    code, _, said = push(capsys, folder, "me/piano")
    assert code == 2
    assert message in said
    assert hub.asked == []


@pytest.mark.usefixtures("hub")
def test_the_folder_of_a_run_is_told_from_its_model(folder, capsys):
    code, _, said = push(capsys, folder.parent, "me/piano")
    assert code == 2
    assert f"its model is {folder}" in said


@pytest.mark.parametrize("name", ["piano", "me/", "me/a/b", "me/my piano", "me/--", "../piano", ""])
def test_a_name_that_no_repository_can_have_is_refused(hub, folder, capsys, name):
    code, _, said = push(capsys, folder, name)
    assert code == 2
    assert "a name such as owner/name" in said
    assert hub.asked == []


@pytest.mark.slow
def test_the_environment_names_hub_token_and_cache(hub, folder, tmp_path):
    names = {"HF_ENDPOINT": hub.address, "HF_TOKEN": OWNER_TOKEN, "HF_HOME": str(tmp_path / "home")}
    environment = os.environ | names | {"HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "app.cli"]
    subprocess.run([*command, "push", folder, "me/piano"], check=True, env=environment)
    song = tmp_path / "song.mid"
    options = ["--checkpoint", "me/piano", "--seconds", "1", "--output", song]
    subprocess.run([*command, "generate", *options], check=True, env=environment)
    assert song.exists()
