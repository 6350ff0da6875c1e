"""The budget: from measured settings to the best at each cost, and requests that name one."""

import dataclasses
import json
import shutil
from typing import Any

import pytest
from conftest import noisy_model

from music_ar.decoding.autotune import MAESTRO_TOKENS_PER_S, Autotuner
from music_ar.decoding.budget import Frontier, Setting
from music_ar.decoding.loading import load_decoder
from music_ar.decoding.request import GenerationError, Request
from music_ar.generator import Generator
from music_ar.model.config import PRESETS
from music_ar.model.pretrained import save_pretrained
from music_ar.model.weights import CheckpointError

CONFIG = dataclasses.replace(PRESETS["tiny"], layers=3, exits=(1, 2))
M, N = CONFIG.context, CONFIG.latents


def row(latents, layers, tokens_per_s, nats_per_token, **other):
    return {
        "context": M, "latents": latents, "layers": layers, "tolerance": 0.0, "batch": 1, "mode": "sliding",
        "tokens_per_s": tokens_per_s, "nats_per_token": nats_per_token, **other,
    }  # fmt: skip


ROWS = [
    row(N, 3, 100, 1.0),
    row(8, 3, 125, 1.3),
    row(N, 3, 200, 1.1, tolerance=0.5),
    row(N, 2, 250, 1.2),
    row(8, 1, 500, 2.0),
    row(N, 1, 400, 2.1),  # slower and worse than the one before
    row(8, 2, 1000, None),  # not scored
    row(8, 1, 9000, 1.0, batch=4),
    row(8, 1, 9000, 1.0, context=16),
    row(8, 1, 9000, 1.0, mode="exact"),
    row(N, 4, 9000, 1.0),  # of another model
]
BEST = [Setting(8, 1), Setting(N, 2), Setting(N, 3, 0.5), Setting(N, 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "exits"
    save_pretrained(noisy_model(CONFIG), folder)
    (folder / "curve.json").write_text(json.dumps({"rows": ROWS}))
    return folder


@pytest.fixture(scope="module")
def generator(folder):
    return Generator.from_pretrained(folder)


def test_the_frontier_holds_what_is_best_at_each_cost():
    frontier = Frontier.of(ROWS, CONFIG)
    assert [measured.setting for measured in frontier.settings] == BEST
    assert [measured.cost for measured in frontier.settings] == pytest.approx([0.2, 0.4, 0.5, 1.0])
    assert [measured.nats_per_token for measured in frontier.settings] == [2.0, 1.2, 1.1, 1.0]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(0.19, None), (0.2, BEST[0]), (0.39, BEST[0]), (0.45, BEST[1]), (0.5, BEST[2]), (0.99, BEST[2]), (1.0, BEST[3])],
)
def test_a_budget_buys_the_best_setting_that_costs_no_more(budget, expected):
    assert Frontier.of(ROWS, CONFIG).best(budget) == expected


def test_rows_of_models_without_exits_were_measured_with_all_layers():
    older = [{name: value for name, value in each.items() if name not in ("layers", "tolerance")} for each in ROWS[:2]]
    settings = Frontier.of(older, dataclasses.replace(CONFIG, exits=())).settings
    assert [measured.setting for measured in settings] == [Setting(8, 3), Setting(N, 3)]


def test_without_the_full_setting_nothing_is_known():
    assert Frontier.of(ROWS[1:], CONFIG) == Frontier()


# Requests.


@pytest.mark.parametrize(
    ("asked", "setting"),
    [
        ({}, Setting(N, 3)),
        ({"latents": 8, "layers": 2}, Setting(8, 2)),
        ({"tolerance": 0.3}, Setting(N, 3, 0.3)),
        ({"budget": 0.45}, BEST[1]),
    ],
)
def test_a_request_names_a_setting(generator, asked, setting):
    assert generator.setting(Request.of(None, **asked)) == setting
    session = generator.session(None, seed=3, **asked)
    assert session.setting == setting


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"layers": 4}, "layers must be 1, 2 or 3, after which this model predicts; got 4"),
        ({"layers": 0}, "layers must be a whole number of at least 1"),
        ({"tolerance": -0.1}, "tolerance must be a number from 0 to 100"),
        ({"budget": 0.0}, "budget must be a number above 0 and at most 1, got 0"),
        ({"budget": 0.1}, r"from 0\.2 to 1, .* \(8 latents, 1 of 3 layers\) .*; got 0\.1"),
        ({"budget": 0.5, "latents": 8}, "either a budget, or latents, layers and tolerance"),
        ({"budget": 0.5, "latents": "auto"}, "either a budget"),
    ],
)
def test_what_the_model_cannot_do_is_refused(generator, asked, message):
    with pytest.raises(GenerationError, match=message):
        generator.setting(Request.of(None, **asked))


def test_a_model_without_exits_refuses_what_it_cannot_do(tiny_checkpoint):
    generator = Generator.from_pretrained(tiny_checkpoint)
    assert generator.setting(Request(layers=2)) == Setting(32, 2)
    for asked, message in [
        ({"layers": 1}, "layers must be all 2"),
        ({"tolerance": 0.5}, "only after all 2 layers; got 0.5"),
        ({"budget": 0.5}, "no curve.json: choose latents and layers"),
    ]:
        with pytest.raises(GenerationError, match=message):
            generator.setting(Request.of(None, **asked))


def test_a_damaged_curve_is_refused_when_it_is_needed(folder, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    for text in ("{", "[]", '{"rows": [{"latents": 8}]}', '{"rows": 5}'):
        (damaged / "curve.json").write_text(text)
        generator = Generator.from_pretrained(damaged)
        assert generator.setting(Request(layers=1)) == Setting(N, 1)
        with pytest.raises(CheckpointError, match=r"curve\.json"):
            generator.setting(Request(budget=0.5))


def test_pieces_of_different_settings_in_one_call_are_those_of_each_alone(generator):
    asked = [{"layers": 1}, {"tolerance": 0.8}, {}, {"budget": 0.3}, {"tolerance": 1.5}]
    requests = [Request.of(None, seconds=1.0, seed=number, **each) for number, each in enumerate(asked)]
    together = list(generator.generate_many(requests, batch_size=2))
    assert [piece.error for piece in together] == [None] * len(asked)
    for piece in together:
        alone = generator.generate(piece.request)
        assert piece.performance == alone


def test_layers_change_the_piece(generator):
    hot = {"seconds": 2.0, "seed": 5, "temperature": 5.0, "top_p": 1.0}
    whole, first, leaving = (generator.generate(**hot, **depth) for depth in ({}, {"layers": 1}, {"tolerance": 100.0}))
    assert first != whole
    assert leaving == first


# "auto".


# Seconds per token.
SECONDS = {BEST[0]: 0.001, BEST[1]: 0.0025, BEST[2]: 0.003, BEST[3]: 0.005}


class Given(Autotuner):
    """Times that are given instead of measured."""

    def seconds_per_token(self, latents, variations=1, *, layers=None, tolerance=0.0, again=False):
        del variations, again
        return SECONDS[Setting(latents, layers or CONFIG.layers, tolerance)]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.006, BEST[3]), (0.004, BEST[2]), (0.0028, BEST[1]), (0.0022, BEST[0]), (0.0001, BEST[0])],
)
def test_auto_takes_the_best_setting_that_is_fast_enough(folder, seconds, expected):
    autotuner = Given(load_decoder(folder))
    speed = 1 / (seconds * MAESTRO_TOKENS_PER_S * 1.15)
    assert autotuner.setting(speed, Frontier.of(ROWS, CONFIG)) == expected


def test_auto_of_a_model_with_exits_goes_below_the_fewest_latents(folder):
    generator = Generator.from_pretrained(folder)
    generator.autotuner = Given(generator.decoder)
    assert generator.setting(Request(latents="auto", speed=900.0)) == BEST[0]
    assert generator.setting(Request(latents="auto", speed=1.0)) == BEST[3]


# Batches.


def test_a_manifest_records_a_depth_only_if_it_is_not_all(folder, tmp_path):
    from app.commands.render import Render

    common: dict[str, Any] = {"checkpoint": str(folder), "count": 1, "seconds": 3.0, "batch_size": 1}
    asked: dict[str, dict[str, Any]] = {
        "all": {},
        "budget": {"budget": 0.45},
        "layers": {"layers": 1, "tolerance": 0.5},
    }
    for name, options in asked.items():
        assert Render(**common, **options, output=str(tmp_path / name)).run() == 0
    settings = {
        path.parent.name: json.loads(path.read_text().splitlines()[0])["settings"]
        for path in tmp_path.glob("*/manifest.jsonl")
    }
    assert settings["all"].keys().isdisjoint(("layers", "tolerance", "budget"))
    assert settings["budget"] == settings["all"] | {"layers": 2}
    assert settings["layers"] == settings["all"] | {"layers": 1, "tolerance": 0.5}
