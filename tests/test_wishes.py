"""Wishes: what is measured, how it becomes ids, and what a model and its decoders make of them."""

import dataclasses
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training
from conftest import make_performance, noisy_model
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import CountingBatches

from music_ar import GenerationError, Generator, Performance, Request
from music_ar.decoding import backend
from music_ar.decoding.backend import Backend
from music_ar.decoding.decoder import Decoder
from music_ar.decoding.guidance import GuidedDecoder
from music_ar.decoding.interface import shared_options
from music_ar.decoding.loading import load_decoder
from music_ar.decoding.sampling import SamplingOptions
from music_ar.features.composers import canonical, era_of
from music_ar.features.measured import Measured, measure
from music_ar.features.wish_options import NUMBERS, WishError, Wishes
from music_ar.features.wishes import WishTable
from music_ar.midi.pedalling import unfold
from music_ar.model.config import PRESETS
from music_ar.model.expansion import expand
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.model.pretrained import load_pretrained, save_pretrained
from music_ar.tokens import grammar, vocabulary
from music_ar.tokens.codec import encode
from music_ar.tokens.vocabulary import START
from music_ar.training.trainer import Trainer

TABLE = WishTable(
    edges=((1.0, 3.0, 6.0, 12.0), (20.0, 60.0, 100.0), (40.0, 60.0, 80.0), (0.0, 0.5, 1.0), (0.0, 0.3, 0.8)),
    composers=("Frédéric Chopin", "Franz Liszt"),
    eras=("Romantic",),
    sources=("maestro", "rolls"),
)
CONFIG = dataclasses.replace(PRESETS["tiny"], context=48, layers=1, onsets=3, wishes=TABLE)
WISHED = Wishes(density=7.0, composer="Liszt")
TOKENS = np.concatenate([[START], encode(make_performance(1, 30))]).astype(np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pretrained model that takes wishes."""
    path = tmp_path_factory.mktemp("model") / "wishful"
    save_pretrained(noisy_model(CONFIG), path)
    return path


@pytest.fixture(scope="module", params=["native", "jax"])
def decoder(request, folder):
    if request.param == "jax":
        return Decoder(load_pretrained(folder), Backend())
    if not backend.native():
        pytest.skip("the native engine was not compiled")
    return load_decoder(folder)


@pytest.fixture(scope="module")
def fast_decoder(folder):
    """The model in the decoder that starts fastest."""
    return load_decoder(folder)


LENGTH = 12  # of the prompt: within one window of latents, so that nothing has slid


def start(decoder, wishes):
    prompts = [TOKENS[:LENGTH]] * len(wishes)
    return decoder.start(prompts, latents=16, seeds=range(len(wishes)), limit_steps=2**30, wishes=wishes)


def logits_after(decoder, wishes):
    """Logits of the first tokens after a prompt, for each row of wishes."""
    following = np.broadcast_to(TOKENS[LENGTH : LENGTH + 3], (len(wishes), 3))
    return np.asarray(decoder.teacher_force(start(decoder, wishes), following)[1])


# What is measured.


@given(
    onsets=st.lists(st.integers(0, 2000), min_size=1, max_size=40),
    pitch=st.integers(30, 90),
    velocity=st.integers(1, 31),
)
def test_density_loudness_and_register_are_those_of_the_notes(onsets, pitch, velocity):
    onset_s = np.sort(np.array(onsets)) / 100
    length_s = onset_s[-1] + 1
    notes = Performance(
        onset_s=onset_s,
        offset_s=np.full(len(onset_s), length_s),
        pitch=pitch + np.arange(len(onset_s)) % 8,
        velocity=np.full(len(onset_s), 1 + 4 * velocity),
    )
    found = measure(encode(notes))
    assert found.density == pytest.approx(len(notes) / length_s)
    assert found.loudness == 1 + 4 * velocity
    assert found.register == pytest.approx(notes.pitch.mean())


def test_pedal_share_is_that_of_the_unfolded_pedal():
    notes = make_performance(3, 100)
    found = measure(encode(notes)).pedal_share
    onset, offset = (np.rint(times * 100).astype(int) for times in (notes.onset_s, notes.offset_s))
    _, down, up = unfold(onset, offset, notes.pitch, 100.0)
    assert found == pytest.approx((up - down).sum() / offset.max(), abs=0.05)


def regular(jitter_s, count=60):
    onset_s = 0.1 + np.arange(count) * 0.4 + np.random.default_rng(0).normal(0, 1, count) * jitter_s
    onset_s = np.sort(np.maximum(onset_s, 0))
    pitch = 40 + np.arange(count) % 30
    return encode(Performance(onset_s=onset_s, offset_s=onset_s + 0.2, pitch=pitch, velocity=np.full(count, 64)))


def test_a_steady_beat_is_more_stable_than_an_unsteady_one():
    found = [measure(regular(jitter_s)).tempo_stability for jitter_s in (0, 0.03, 0.15)]
    metronome, human, erratic = (-1.0 if each is None else each for each in found)
    assert metronome > 0.9 > human > 0.4 > erratic >= 0


def test_the_tokens_before_the_measured_part_only_tell_the_velocity():
    loud_then_silent_then_one = encode(
        Performance(
            onset_s=np.array([0.0, 2.0]), offset_s=np.array([1.0, 3.0]), pitch=np.array([40, 80]),
            velocity=np.array([101, 101]),
        )
    )  # fmt: skip
    first_end = int(np.flatnonzero(loud_then_silent_then_one == vocabulary.NOTE_OFF + 40)[0])
    found = measure(loud_then_silent_then_one, first_end + 1)
    assert (found.loudness, found.register, found.density) == (101, 80, 0.5)


@pytest.mark.parametrize("tokens", [[], [vocabulary.START, vocabulary.PAD], [vocabulary.VELOCITY, 60]])
def test_too_little_music_has_no_numbers(tokens):
    assert measure(np.array(tokens, np.int32)) == Measured()


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("Chopin", "Frédéric Chopin"),
        ("CHOPIN, FREDERIC", "Frédéric Chopin"),
        ("J. S. Bach", "Johann Sebastian Bach"),
        ("Bach, Johann Christian", None),
        ("Strauss, Josef", None),
        ("Mendelssohn-Bartholdy, Felix", "Felix Mendelssohn"),
        ("Tchaikovsky, Peter Ilich", "Pyotr Ilyich Tchaikovsky"),
        ("Franz Schubert / Franz Liszt", None),
        ("Weber, Carl Maria von", "Carl Maria von Weber"),
        ("nobody", None),
        ("", None),
        (None, None),
    ],
)
def test_a_composer_is_found_by_any_spelling(spelled, name):
    assert canonical(spelled) == name


def test_eras_are_those_of_the_composers():
    assert [era_of(name) for name in ("Bach", "Haydn", "Chopin", "Debussy", "nobody")] == [
        "Baroque", "Classical", "Romantic", "Modern", None,
    ]  # fmt: skip


# Ids.


@pytest.mark.parametrize(
    ("wishes", "ids"),
    [
        ({}, (0, 0, 0, 0, 0, 0, 0, 0)),
        ({"density": 1.0}, (1, 0, 0, 0, 0, 0, 0, 0)),
        ({"density": 3.0}, (2, 0, 0, 0, 0, 0, 0, 0)),
        ({"density": 12.0, "loudness": 59.9}, (3, 1, 0, 0, 0, 0, 0, 0)),
        ({"composer": "liszt", "era": "romantic", "source": "rolls"}, (0, 0, 0, 0, 0, 2, 1, 2)),
    ],
)
def test_wishes_have_these_ids(wishes, ids):
    assert tuple(TABLE.ids(Wishes(**wishes))) == ids


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        ({"density": 12.5}, "density must be from 1 to 12 notes a second, which is what this model has heard"),
        ({"loudness": 1.0}, "loudness must be from 20 to 100 of MIDI velocity"),
        ({"composer": "Shopin"}, 'knows no composer "Shopin"; did you mean Frédéric Chopin?'),
        ({"composer": "Bach"}, "it knows Frédéric Chopin, Franz Liszt"),
        ({"era": "Baroque"}, 'knows no era "Baroque"; it knows Romantic'),
    ],
)
def test_what_a_model_does_not_know_is_refused(wishes, said):
    with pytest.raises(WishError) as error:
        TABLE.ids(Wishes(**wishes))
    assert said in str(error.value)


def test_music_beyond_the_range_has_the_nearest_id():
    measured = Measured(density=100.0, loudness=0.5, register=None)
    assert tuple(TABLE.nearest_ids(measured, {"composer": "nobody", "era": None})) == (3, 1, 0, 0, 0, 0, 0, 0)


def test_ids_choose_rows_and_0_chooses_none():
    hot = TABLE.hot(np.array([[0] * 8, [3, 0, 0, 0, 0, 0, 0, 2]], np.int32))
    assert np.flatnonzero(hot[0]).tolist() == []
    assert np.flatnonzero(hot[1]).tolist() == [2, TABLE.rows - 1]


def test_a_table_survives_json():
    assert WishTable.of_json(json.loads(json.dumps(dataclasses.asdict(TABLE)))) == TABLE


def test_controls_have_the_range_of_the_model_and_the_values_of_the_prompt():
    controls = {each.name: each for each in TABLE.controls(Measured(density=20.0, register=55.5))}
    assert set(controls) == {*NUMBERS, "composer", "era", "source"}
    density = controls["density"]
    assert (density.least, density.most, density.default) == (1, 12, 12)
    assert controls["register"].default == 55.5
    assert controls["loudness"].default is None
    assert controls["composer"].choices == TABLE.composers
    assert all(each.help and each.label for each in controls.values())


# The model.


@nnx.jit
def logits_of(model, tokens, ids=None):
    """Logits with the same wishes in all parts, or with those of each part."""
    return model(tokens, wishes_BxPxW=ids if ids is None or ids.ndim == 3 else ids[:, None])


def test_wishes_are_added_to_a_model_without_effect_and_act_on_their_own_row():
    tokens = jnp.asarray(np.stack([TOKENS, TOKENS]))
    ids = jnp.asarray(np.stack([TABLE.ids(each) for each in (Wishes(), WISHED)]))
    without = noisy_model(dataclasses.replace(CONFIG, wishes=None))
    expected = logits_of(without, tokens)
    model = expand(without, CONFIG, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(logits_of(model, tokens, ids), expected, atol=1e-5)
    model.wishes.kernel[...] += np.random.default_rng(0).standard_normal(model.wishes.kernel.shape)
    found = logits_of(model, tokens, ids)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    assert np.abs(found[1] - expected[1]).max() > 0.1


def test_each_part_of_the_latents_has_its_own_wishes():
    """Changing those of the last part changes nothing before it, and other parts are those of the first."""
    model, tokens = noisy_model(CONFIG), jnp.asarray(TOKENS[None])
    none, wished = (TABLE.ids(each) for each in (Wishes(), WISHED))
    halves = [logits_of(model, tokens, jnp.asarray([parts])) for parts in ([none, none], [none, wished])]
    last = CONFIG.latents // 2
    np.testing.assert_allclose(halves[1][:, :-last], halves[0][:, :-last], atol=1e-5)
    assert (np.abs(halves[1] - halves[0])[:, -last:].max(axis=-1) > 1e-3).all()
    np.testing.assert_allclose(halves[0], logits_of(model, tokens, jnp.asarray([none])), atol=1e-5)
    both = logits_of(model, tokens, jnp.asarray([[wished, wished]]))
    np.testing.assert_allclose(both, logits_of(model, tokens, jnp.asarray([wished])), atol=1e-5)


# Decoding.


def test_decoders_compute_what_the_model_computes(decoder, folder):
    rows = [Wishes(), WISHED]
    found = logits_after(decoder, rows)
    model = load_pretrained(folder)
    ids = jnp.asarray(np.stack([TABLE.ids(each) for each in rows]))
    tokens = jnp.asarray(np.stack([TOKENS[: LENGTH + 2]] * 2))
    expected = logits_of(model, tokens, ids)[:, -3:]
    np.testing.assert_allclose(found, expected, atol=2e-2)  # caches and activations are rounded
    assert np.abs(found[0] - found[1]).max() > 0.1


def test_equal_prompts_with_other_wishes_are_prefilled_apart(fast_decoder):
    together = logits_after(fast_decoder, [WISHED, Wishes(), WISHED])
    np.testing.assert_allclose(together[0], together[2], atol=1e-5)
    np.testing.assert_allclose(together[1], logits_after(fast_decoder, [Wishes()])[0], atol=1e-4)


def decoded(decoder, state, guidance=None, length=12):
    options = shared_options(SamplingOptions(steadiness=0.0))
    if guidance is not None:
        options["guidance"] = np.float32(guidance)
    return np.asarray(decoder.decode(state, options, length=length)[1])


def test_guidance_of_1_is_generation_with_wishes_and_of_0_without(decoder):
    guided, wishes = GuidedDecoder(decoder), [WISHED, Wishes(register=45.0)]
    plain = decoded(decoder, start(decoder, wishes))
    np.testing.assert_array_equal(decoded(guided, start(guided, wishes), 1.0), plain)
    without = decoded(decoder, start(decoder, [Wishes()] * 2))
    np.testing.assert_array_equal(decoded(guided, start(guided, wishes), 0.0), without)
    assert not np.array_equal(plain, without)


def test_guidance_moves_the_logits_away_from_those_without_wishes(fast_decoder):
    """A token that is likeliest of its type, by the mixed logits."""
    guided, guidance, moved = GuidedDecoder(fast_decoder), 3.0, []
    options = shared_options(SamplingOptions(temperature=0.0, steadiness=0.0)) | {"guidance": np.float32(guidance)}
    possible = playable(TOKENS[:LENGTH])
    for wishes in (WISHED, Wishes(register=45.0), Wishes(loudness=90.0), Wishes(era="Romantic")):
        with_wishes, without = logits_after(fast_decoder, [wishes, Wishes()])[:, 0]
        mixed = without + guidance * (with_wishes - without)
        token = int(np.asarray(guided.decode(start(guided, [wishes]), options, length=1)[1])[0, 0])
        kind = np.searchsorted(vocabulary.TYPE_STARTS, np.arange(len(mixed)), side="right")
        rivals = possible & (kind == kind[token])  # at temperature 0, one token of each type is left
        assert token == np.where(rivals, mixed, -np.inf).argmax()
        moved.append(token != np.where(rivals, with_wishes, -np.inf).argmax())
    assert any(moved)  # or this test says nothing


def playable(tokens):
    return np.asarray(grammar.playable_tokens(grammar.scan(tokens)))


def test_guided_rows_are_replaced_and_chosen_in_pairs(fast_decoder):
    guided = GuidedDecoder(fast_decoder)
    state = start(guided, [WISHED, Wishes(register=45.0)])
    chosen = decoded(guided, state.rows([1, 0]), 2.0)
    np.testing.assert_array_equal(chosen, decoded(guided, start(guided, [WISHED, Wishes(register=45.0)]), 2.0)[::-1])
    new = start(guided, [Wishes(loudness=90.0)])
    both = start(guided, [WISHED, WISHED]).replaced(1, new)
    np.testing.assert_array_equal(decoded(guided, both, 2.0)[1], decoded(guided, new, 2.0)[0])


# With early exits and gaps.

TOLERANCE = 1.0  # leaving is expected to cost this model now more, now less


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory):
    """A pretrained model that takes wishes, has exits and fills gaps."""
    path = tmp_path_factory.mktemp("model") / "whole"
    changes: dict[str, Any] = {"layers": 4, "exits": (1, 3), "vocabulary_size": vocabulary.INFILL_VOCABULARY_SIZE}
    model = noisy_model(dataclasses.replace(CONFIG, context=512, **changes))
    save_pretrained(model, path)
    return path


@pytest.fixture(scope="module", params=["native", "jax"])
def whole_decoder(request, whole_folder):
    if request.param == "jax":
        return Decoder(load_pretrained(whole_folder), Backend())
    if not backend.native():
        pytest.skip("the native engine was not compiled")
    return load_decoder(whole_folder)


@pytest.fixture(scope="module")
def fast_whole_decoder(whole_folder):
    return load_decoder(whole_folder)


def test_both_rows_of_a_piece_leave_early_or_neither(whole_decoder):
    wishes, guided = [WISHED, Wishes(loudness=90.0), Wishes(register=45.0)], GuidedDecoder(whole_decoder)
    place: dict[str, Any] = {"latents": 16, "limit_steps": 2**30, "tolerance": TOLERANCE, "seeds": range(3)}
    state = guided.start([TOKENS[:LENGTH]] * 3, wishes=wishes, **place)
    options = shared_options(SamplingOptions(steadiness=0.0)) | {"guidance": np.float32(2.0)}
    state, _ = guided.decode(state, options, length=40)
    layers_run = np.asarray(state.pairs.layers_run_B).reshape(3, 2)
    np.testing.assert_array_equal(layers_run[:, 0], layers_run[:, 1])
    assert (layers_run > 40).all()  # as many as tokens, if all of them had left at once
    assert (layers_run < 160).all()


def test_a_gap_is_filled_with_wishes_and_guidance(fast_whole_decoder):
    before, after = make_performance(1, 10), make_performance(2, 10)
    generator = Generator(fast_whole_decoder)
    options: dict[str, Any] = {"seconds": 1.5, "seed": 3, "latents": 16}
    plain = generator.infill(before, after, **options)
    made = [generator.infill(before, after, composer="Liszt", guidance=guidance, **options) for guidance in (1.0, 2.0)]
    for piece in made:
        last = piece.select(piece.onset_s >= before.duration_s + 1.5 - 1e-6)
        np.testing.assert_array_equal(last.pitch, after.pitch)
    assert len({str(notes_of(piece)) for piece in (plain, *made)}) == 3


def test_a_batch_has_guided_pieces_of_fewer_layers(fast_whole_decoder):
    generator, options = Generator(fast_whole_decoder), {"seconds": 3.0, "latents": 8, "seed": 3, "steadiness": 0.0}
    asked = [{}, {"layers": 3}, {"layers": 3, "guidance": 2.0}, {"tolerance": TOLERANCE, "guidance": 2.0}]
    requests = [Request.of(None, era="Romantic", **options, **each) for each in asked]
    alone = [notes_of(generator.generate(request)) for request in requests]
    assert len({str(each) for each in alone}) == len(asked)
    if fast_whole_decoder.path != "jax":
        pieces = list(generator.generate_many(requests, batch_size=2))
        assert sorted(map(str, (notes_of(piece.performance) for piece in pieces))) == sorted(map(str, alone))


# The generator.


def notes_of(piece):
    return piece.pitch.tolist(), piece.onset_s.tolist()


def test_generation_follows_wishes_alone_and_in_a_batch(fast_decoder):
    generator = Generator(fast_decoder)
    options = {"seconds": 4.0, "latents": 8, "seed": 3, "steadiness": 0.0}
    asked = [{}, {"composer": "Chopin"}, {"composer": "Chopin", "guidance": 2.5}, {"density": 2.0, "guidance": 2.5}]
    alone = [notes_of(generator.generate(**options, **each)) for each in asked]
    assert len({str(each) for each in alone}) == len(asked)
    if fast_decoder.path != "jax":  # in JAX the size of a batch moves the last bits
        requests = [Request.of(None, **options, **each) for each in asked]
        found = {str(piece.request.wishes): notes_of(piece.performance) for piece in generator.generate_many(requests)}
        assert [found[str(request.wishes)] for request in requests] == alone


def test_a_generator_refuses_what_its_model_has_not_heard(fast_decoder):
    generator = Generator(fast_decoder)
    with pytest.raises(GenerationError, match="from 1 to 12 notes a second"):
        generator.generate(density=50.0)
    with pytest.raises(GenerationError, match="did you mean Franz Liszt"):
        list(generator.generate_many([None], composer="List"))


def test_a_model_without_wishes_says_so(tiny_checkpoint):
    generator = Generator.from_pretrained(tiny_checkpoint)
    assert generator.wish_controls() == []
    with pytest.raises(GenerationError, match="takes no wishes, got density, era; leave them out"):
        generator.generate(density=3.0, era="Romantic")


def test_controls_default_to_the_prompts_own_values(fast_decoder, midi_file):
    controls = {each.name: each.default for each in Generator(fast_decoder).wish_controls(midi_file)}
    assert controls["register"] == pytest.approx(measure(encode(make_performance(0))).register, abs=0.1)


# Training.


class WishfulBatches(CountingBatches):
    """Every window has the first bucket of density, or nothing."""

    def __next__(self):
        batch = super().__next__()
        ids = np.zeros((len(batch["tokens"]), 8), np.int32)
        ids[::2, 0] = 1
        return batch | {"wishes": ids[:, None]}


@pytest.mark.slow
def test_training_moves_the_vectors_of_the_wishes_that_were_given(tmp_path):
    model = PerceiverAR(dataclasses.replace(tiny_training.CONFIG, wishes=TABLE), rngs=nnx.Rngs(0))
    fitted = Trainer(model, tiny_training.EXACT, WishfulBatches(), output=tmp_path).fit()
    moved = np.abs(np.asarray(fitted.model.wishes.kernel[...])).max(axis=1)
    assert np.flatnonzero(moved).tolist() == [0]


def test_the_numbers_are_those_that_can_be_measured():
    assert Measured._fields == NUMBERS
