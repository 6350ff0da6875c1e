"""`music-ar train`: which pieces it learns from, which teacher teaches them, and what it refuses."""

import dataclasses
import itertools
import shutil
import sys

import numpy as np
import pytest
from conftest import make_performance, noisy_model
from jax.sharding import PartitionSpec
from test_cli import refusal, run
from tiny_maestro import forget_compositions

from data_pipeline.augmentation.mode_and_rubato import LABEL_SIZE
from data_pipeline.dataset import Pieces
from data_pipeline.prepare import prepare_midi
from music_ar.midi.io import write_midi
from music_ar.model.config import PRESETS
from music_ar.model.pretrained import load_pretrained, save_pretrained
from music_ar.model.weights import identity
from music_ar.tokens.vocabulary import PAD
from music_ar.training import trainer
from music_ar.training.distillation import CrossFitted

DATA = ["--preset", "tiny", "--data"]
REST = ["--steps", 1, "--batch-size", 4, "--no-augment"]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Two pretrained models."""
    folders = [tmp_path_factory.mktemp("teachers") / f"without-{number}" for number in (1, 2)]
    for seed, folder in enumerate(folders):
        save_pretrained(noisy_model(PRESETS["tiny"], seed), folder)
    return folders


@pytest.fixture
def fits(monkeypatch):
    """What each `Trainer` is made with: some of the batches that it will read, and its options. It does its work."""
    calls = []

    class Spied(trainer.Trainer):
        def __init__(self, model, config, batches, **options):
            state = batches.get_state()
            calls.append((list(itertools.islice(batches, 20)), options))
            batches.set_state(state)
            super().__init__(model, config, batches, **options)

    monkeypatch.setattr(trainer, "Trainer", Spied)
    return calls


def holds(pieces, window):
    """Whether a window, as it was cut, is in one of the pieces."""
    found = window[window != PAD].astype(np.uint16).tobytes()
    return any(found in tokens.tobytes() for tokens in pieces.tokens)


def test_a_fold_is_left_out_and_stays_so(capsys, tmp_path, prepared, fits):
    command = ["train", *DATA, prepared, *REST, "--output", tmp_path / "run"]
    code, printed, errors = run(capsys, *command, "--folds", 3, "--without-fold", 2)
    assert code == 0, errors
    assert str(tmp_path / "run" / "model") in printed
    folds = Pieces.open(prepared, "train").folds(3)
    [(batches, options)] = fits
    windows = [window for batch in batches for window in batch["tokens"]]
    assert [any(holds(fold, window) for window in windows) for fold in folds] == [True, False, True]
    assert options["data"]["teachers"] == []
    kept = sum(fold.targets for fold in folds) - folds[1].targets
    assert f"{kept:,} tokens" in errors

    other = refusal(capsys, *command, "--resume", "--folds", 3, "--without-fold", 1)
    assert "data.folds.without was 2, is 1" in other
    assert "data.folds.of was 3, is 4" in refusal(capsys, *command, "--resume", "--folds", 4, "--without-fold", 2)
    assert "data.folds was" in refusal(capsys, *command, "--resume")


def test_out_of_fold_part_k_is_the_fold_that_teacher_k_has_not_seen(capsys, tmp_path, prepared, teachers, fits):
    command = ["train", *DATA, prepared, *REST, "--output", tmp_path / "run", "--teacher", *teachers]
    code, _, errors = run(capsys, *command, "--out-of-fold")
    assert code == 0, errors
    first, second = Pieces.open(prepared, "train").folds(2)
    [(batches, options)] = fits
    for batch in batches:
        assert [holds(first, window) for window in batch["tokens"]] == [True, True, False, False]
        assert [holds(second, window) for window in batch["tokens"]] == [False, False, True, True]
    assert options["objective"].sharding == CrossFitted.sharding != PartitionSpec()
    assert options["data"]["teachers"] == [identity(teacher)["weights_sha256"] for teacher in teachers]
    assert "data.folds was" in refusal(capsys, *command, "--resume")


@pytest.mark.parametrize(
    ("mesh", "message"),
    [("fsdp=two", "axis fsdp needs a number of devices"), ("data=3", "mesh data=3 needs 3 devices, and there are 1")],
)
def test_a_mesh_that_does_not_fit_is_refused(capsys, tmp_path, prepared, mesh, message):
    command = ["train", *DATA, prepared, *REST, "--output", tmp_path / "run", "--mesh", mesh]
    assert message in refusal(capsys, *command)
    assert not (tmp_path / "run").exists()


def test_augmented_copies_are_read_as_often_as_originals(capsys, tmp_path, prepared, fits):
    command = ["train", *DATA, prepared, *REST, "--output", tmp_path / "run"]
    code, _, errors = run(capsys, *command, "--augmented-copies", 2)
    assert code == 0, errors
    originals = Pieces.open(prepared, "train")
    [(batches, options)] = fits
    windows = [pair for batch in batches for pair in zip(batch["tokens"], batch["labels"], strict=True)]
    unlabeled = [not label.any() for _, label in windows]
    assert [holds(originals, window) for window, _ in windows] == unlabeled
    assert 0.35 < np.mean(unlabeled) < 0.65
    assert options["data"]["augmented_copies"] == 2
    assert load_pretrained(tmp_path / "run" / "model").config.label_size == LABEL_SIZE
    assert f"{originals.targets:,} tokens" in errors
    assert "data.augmented_copies was 2, is 3" in refusal(capsys, *command, "--resume", "--augmented-copies", 3)


def test_training_continues_from_another_model(capsys, tmp_path, prepared, teachers, fits):
    """At a rate of zero it stays as it was, whatever the preset; exits may be added."""
    command = ["train", *DATA, prepared, *REST, "--output", tmp_path / "run", "--preset", "small"]
    rates = ["--muon-learning-rate", 0.0, "--adamw-learning-rate", 0.0]
    code, _, errors = run(capsys, *command, *rates, "--start", teachers[0], "--exits", 1)
    assert code == 0, errors
    [(_, options)] = fits
    assert options["data"]["start"] == identity(teachers[0])["weights_sha256"]
    before, after = load_pretrained(teachers[0]), load_pretrained(tmp_path / "run" / "model")
    assert after.config == dataclasses.replace(before.config, label_size=LABEL_SIZE, exits=(1,))
    np.testing.assert_allclose(after.embedding[...], before.embedding[...], atol=1e-6)
    assert float(after.exit_costs.bias[...][0]) < 10  # fitted
    assert "data.start was" in refusal(capsys, *command, *rates, "--resume", "--start", teachers[1])
    refused = refusal(capsys, *command, "--start", teachers[0], "--exits", 1, 2)
    assert "--exits must rise and be below the model's 2 blocks, got 1, 2" in refused
    assert "expected the name of a model that ships" in refusal(capsys, *command, "--start", tmp_path / "nothing")


def test_a_model_is_expanded_and_trained(capsys, tmp_path, prepared, teachers, monkeypatch):
    larger = dataclasses.replace(PRESETS["tiny"], width=40, layers=3)
    monkeypatch.setitem(PRESETS, "larger", larger)
    command = ["train", *DATA, prepared, *REST, "--output", tmp_path / "run", "--start", teachers[0]]
    code, _, errors = run(capsys, *command, "--expand-to", "larger")
    assert code == 0, errors
    assert load_pretrained(tmp_path / "run" / "model").config == dataclasses.replace(larger, label_size=LABEL_SIZE)
    assert "cannot expand the model" in refusal(capsys, *command, "--expand-to", "small")
    assert "--expand-to must be one of small" in refusal(capsys, *command, "--expand-to", "none")
    code, _, errors = run(capsys, *command[:-2], "--expand-to", "larger")
    assert code == 2
    assert "--expand-to needs --start" in errors


def test_data_without_compositions_has_no_folds(capsys, tmp_path, prepared):
    data = shutil.copytree(prepared, tmp_path / "data")
    forget_compositions(data)
    command = ["train", *DATA, data, *REST, "--output", tmp_path / "run", "--folds", 2, "--without-fold", 1]
    assert "Prepare the data again" in refusal(capsys, *command)


def test_an_installation_without_the_extra_is_told_of_it(capsys, tmp_path, prepared, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    command = ["train", *DATA, prepared, *REST, "--output", tmp_path / "run"]
    assert "training needs grain: pip install '.[train]'" in refusal(capsys, *command)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--coordinator a:1 --processes 2", "from these options; --process is missing"),
        ("--coordinator a:1 --processes 2 --process 2", "--process must be in 0..1, for 2 processes; got 2"),
        ("--coordinator a:b --processes 2 --process 1", "--coordinator must be HOST:PORT"),
        ("--processes 0", "--processes must be a whole number from 1 to"),
        ("--join-timeout 0", "--join-timeout must be a number above 0"),
    ],
)
def test_half_a_cluster_is_refused(capsys, tmp_path, prepared, options, message):
    command = ["train", *DATA, prepared, *REST, "--output", tmp_path / "run", *options.split()]
    code, _, errors = run(capsys, *command)
    assert code == 2
    assert message in " ".join(errors.replace("│", " ").split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--without-fold 1", "--folds and --without-fold must be given together"),
        ("--folds 2", "--folds and --without-fold must be given together"),
        ("--folds 2 --out-of-fold --teacher a b", "the number of folds is the number of teachers"),
        ("--folds 2 --without-fold 1 --out-of-fold --teacher a b", "either --without-fold"),
        ("--folds 1 --without-fold 1", "--folds must be a whole number from 2 to 1000, got 1"),
        ("--folds 4 --without-fold 0", "--without-fold must be a whole number from 1 to 1000, got 0"),
        ("--folds 4 --without-fold 5", "--without-fold must be in 1..4, got 5"),
        ("--out-of-fold", "two or more --teacher models, each trained with --without-fold, got 0"),
        ("--out-of-fold --teacher a", "each trained with --without-fold, got 1"),
        ("--out-of-fold --teacher a b c", "must be a multiple of 3, which is --micro-batches times"),
        ("--out-of-fold --teacher a b --micro-batches 4", "number of teachers, got 4"),
        ("--augmented-copies -1", "--augmented-copies must be a whole number from 0 to 1000, got -1"),
        ("--folds 9 --without-fold 1", "expected 1 to 8 folds, the number of compositions; got 9"),
    ],
)
def test_folds_that_make_no_sense_are_refused(capsys, tmp_path, prepared, options, message):
    code, printed, errors = run(capsys, "train", *DATA, prepared, *REST, "--output", tmp_path / "run", *options.split())
    assert code == 2
    assert printed == ""
    assert message in " ".join(errors.replace("│", " ").split())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_several_sources_are_mixed_told_and_wished(capsys, tmp_path, prepared, teachers, fits):
    (tmp_path / "midi").mkdir()
    for seed in range(20, 24):
        write_midi(make_performance(seed), tmp_path / "midi" / f"{seed}.mid")
    prepare_midi(tmp_path / "midi", tmp_path / "other", validation=0.0, test=0.0, workers=1)
    table = tmp_path / "sources.csv"
    table.write_text(f"source,data,share\nmain,{prepared},1\nother,other,1\n")
    command = ["train", "--preset", "tiny", "--sources", table, "--wishes", "--final-fraction", 0.5, *REST]
    code, _, errors = run(capsys, *command, "--output", tmp_path / "run")
    assert code == 0, errors
    [(batches, options)] = fits
    other = Pieces.open(tmp_path / "other", "train")
    windows = [window for batch in batches for window in batch["tokens"]]
    assert {holds(other, window) for window in windows} == {True, False}
    final = list(itertools.islice(options["final_batches"], 10))
    assert not any(holds(other, window) for batch in final for window in batch["tokens"])
    assert any((batch["wishes"] > 0).any() for batch in batches)

    model = tmp_path / "run" / "model"
    found = load_pretrained(model).config.wishes
    assert found is not None
    assert found.sources == ("main", "other")
    generate = ["generate", "--checkpoint", model, "--output", tmp_path / "x.mid", "--seconds", 1, "--latents", 8]
    assert 'knows no source "x9"; it knows main, other' in refusal(capsys, *generate, "--source", "x9")
    assert run(capsys, *generate, "--source", "other", "--density", found.edges[0][1], "--guidance", 2)[0] == 0

    fits.clear()
    # Without a validation split, what leaving costs cannot be measured.
    plain = ["train", *DATA, tmp_path / "other", *REST, "--exits", 1, "--output", tmp_path / "exits"]
    code, printed, errors = run(capsys, *plain)
    assert code == 0, errors
    assert "no event of this model will leave early" in " ".join(printed.split())
    assert float(load_pretrained(tmp_path / "exits" / "model").exit_costs.bias[...][0]) == 20
    fits.clear()
    assert run(capsys, *command, "--output", tmp_path / "student", "--out-of-fold", "--teacher", *teachers)[0] == 0
    [(batches, _)] = fits
    folds = Pieces.open(prepared, "train").folds(2)
    for part, fold in enumerate(folds):
        windows = [window for batch in batches for window in np.split(batch["tokens"], 2)[part]]
        assert {(holds(fold, window), holds(other, window)) for window in windows} == {(True, False), (False, True)}

    table.write_text(f"source,data,share\nmain,{prepared},1\nthird,other,1\n")
    again = [*command, "--output", tmp_path / "again", "--start", model]
    assert "knows the sources main, other and cannot learn new ones" in refusal(capsys, *again)
