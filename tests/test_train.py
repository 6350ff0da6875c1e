"""`music-ar train` with folds: which pieces it learns from, who teaches them, and what it refuses."""

import dataclasses
import itertools
import shutil

import numpy as np
import pytest
from conftest import noisy_model
from test_cli import refusal, run
from tiny_maestro import forget_compositions

from data_pipeline.augmentation.mode_and_rubato import VIEW_SIZE
from data_pipeline.loader import Pieces
from music_ar.model.config import PRESETS
from music_ar.model.pretrained import identity, load_released, save_released
from music_ar.tokens.vocabulary import PAD
from music_ar.training import trainer

DATA = ["--preset", "tiny", "--data"]
REST = ["--steps", 1, "--batch-size", 4, "--no-augment"]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Two released models."""
    folders = [tmp_path_factory.mktemp("teachers") / f"without-{number}" for number in (1, 2)]
    for seed, folder in enumerate(folders):
        save_released(noisy_model(PRESETS["tiny"], seed), folder)
    return folders


@pytest.fixture
def fits(monkeypatch):
    """What `fit` is called with: some of the batches that it will read, and its options. It does its work."""
    calls = []
    fit = trainer.fit

    def spied(model, config, batches, **options):
        state = batches.get_state()
        calls.append((list(itertools.islice(batches, 20)), options))
        batches.set_state(state)
        return fit(model, config, batches, **options)

    monkeypatch.setattr(trainer, "fit", spied)
    return calls


def holds(pieces, window):
    """Whether a window, as it was cut, stands in one of the pieces."""
    heard = window[window != PAD].astype(np.uint16).tobytes()
    return any(heard in tokens.tobytes() for tokens in pieces.tokens)


def test_a_fold_is_left_out_and_stays_so(capsys, tmp_path, prepared, fits):
    command = ["train", *DATA, prepared, *REST, "--output", tmp_path / "run"]
    code, printed, errors = run(capsys, *command, "--folds", 3, "--without-fold", 2)
    assert code == 0, errors
    assert str(tmp_path / "run" / "model") in printed
    folds = Pieces.open(prepared, "train").folds(3)
    [(batches, options)] = fits
    windows = [window for batch in batches for window in batch["tokens"]]
    assert [any(holds(fold, window) for window in windows) for fold in folds] == [True, False, True]
    assert not options["out_of_fold"]
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
    assert options["out_of_fold"]
    assert options["data"]["teachers"] == [identity(teacher)["weights_sha256"] for teacher in teachers]
    assert "data.folds was" in refusal(capsys, *command, "--resume")


def test_variations_are_read_as_often_as_what_was_played(capsys, tmp_path, prepared, fits):
    command = ["train", *DATA, prepared, *REST, "--output", tmp_path / "run"]
    code, _, errors = run(capsys, *command, "--variations", 2)
    assert code == 0, errors
    played = Pieces.open(prepared, "train")
    [(batches, options)] = fits
    windows = [(window, view) for batch in batches for window, view in zip(batch["tokens"], batch["view"], strict=True)]
    told = [not view.any() for _, view in windows]
    assert [holds(played, window) for window, _ in windows] == told
    assert 0.35 < np.mean(told) < 0.65
    assert options["data"]["variations"] == 2
    assert load_released(tmp_path / "run" / "model").config.view_size == VIEW_SIZE
    assert f"{played.targets:,} tokens" in errors
    assert "data.variations was 2, is 3" in refusal(capsys, *command, "--resume", "--variations", 3)


def test_training_goes_on_from_another_model(capsys, tmp_path, prepared, teachers, fits):
    """At a rate of zero it stays as it was, whatever the preset."""
    command = ["train", *DATA, prepared, *REST, "--output", tmp_path / "run", "--preset", "small"]
    rates = ["--matrix-learning-rate", 0.0, "--learning-rate", 0.0]
    code, _, errors = run(capsys, *command, *rates, "--start", teachers[0])
    assert code == 0, errors
    [(_, options)] = fits
    assert options["data"]["start"] == identity(teachers[0])["weights_sha256"]
    before, after = load_released(teachers[0]), load_released(tmp_path / "run" / "model")
    assert after.config == dataclasses.replace(before.config, view_size=VIEW_SIZE)
    np.testing.assert_allclose(after.embedding[...], before.embedding[...], atol=1e-6)
    assert "data.start was" in refusal(capsys, *command, *rates, "--resume", "--start", teachers[1])
    assert "no checkpoint that ships" in refusal(capsys, *command, "--start", tmp_path / "nothing")


def test_a_model_grows_and_goes_on(capsys, tmp_path, prepared, teachers, fits, monkeypatch):
    larger = dataclasses.replace(PRESETS["tiny"], width=40, layers=3)
    monkeypatch.setitem(PRESETS, "larger", larger)
    command = ["train", *DATA, prepared, *REST, "--output", tmp_path / "run", "--start", teachers[0]]
    code, _, errors = run(capsys, *command, "--grow", "larger")
    assert code == 0, errors
    assert load_released(tmp_path / "run" / "model").config == dataclasses.replace(larger, view_size=VIEW_SIZE)
    assert "cannot become" in refusal(capsys, *command, "--grow", "small")
    assert "--grow must be one of small" in refusal(capsys, *command, "--grow", "none")
    code, _, errors = run(capsys, *command[:-2], "--grow", "larger")
    assert code == 2
    assert "--grow needs --start" in errors


def test_data_without_compositions_has_no_folds(capsys, tmp_path, prepared):
    data = shutil.copytree(prepared, tmp_path / "data")
    forget_compositions(data)
    command = ["train", *DATA, data, *REST, "--output", tmp_path / "run", "--folds", 2, "--without-fold", 1]
    assert "Prepare the data again" in refusal(capsys, *command)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--without-fold 1", "--folds and --without-fold go together"),
        ("--folds 2", "--folds and --without-fold go together"),
        ("--folds 2 --out-of-fold --teacher a b", "as many folds as teachers"),
        ("--folds 2 --without-fold 1 --out-of-fold --teacher a b", "either --without-fold"),
        ("--folds 1 --without-fold 1", "--folds must be at least 2; got 1"),
        ("--folds 4 --without-fold 0", "--without-fold must lie in 1..4; got 0"),
        ("--folds 4 --without-fold 5", "--without-fold must lie in 1..4; got 5"),
        ("--out-of-fold", "two or more --teacher models, each trained with --without-fold; got 0"),
        ("--out-of-fold --teacher a", "each trained with --without-fold; got 1"),
        ("--out-of-fold --teacher a b c", "times their number, 3; got 4"),
        ("--out-of-fold --teacher a b --accumulation 4", "times their number, 8; got 4"),
        ("--variations -1", "--variations must be at least 0; got -1"),
        ("--folds 9 --without-fold 1", "at most 8, one a composition; got 9"),
    ],
)
def test_folds_that_make_no_sense_are_refused(capsys, tmp_path, prepared, options, message):
    code, printed, errors = run(capsys, "train", *DATA, prepared, *REST, "--output", tmp_path / "run", *options.split())
    assert code == 2
    assert printed == ""
    assert message in " ".join(errors.replace("│", " ").split())
    assert not (tmp_path / "run").exists()
