"""The native engine computes what the JAX step computes, whatever the instructions, threads and batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import make_performance, noisy_model
from event_tokens import melody, token_sequences
from hypothesis import given, settings
from hypothesis import strategies as st

from music_ar.decoding import processors
from music_ar.decoding.backend import Backend
from music_ar.decoding.decoder import Decoder
from music_ar.decoding.interface import option_arrays, shared_options
from music_ar.decoding.native import library
from music_ar.decoding.native.decoder import NativeDecoder, set_threads
from music_ar.decoding.sampling import SamplingOptions
from music_ar.decoding.step import advance
from music_ar.model.config import PRESETS
from music_ar.model.pretrained import load_pretrained, save_pretrained
from music_ar.tokens import vocabulary
from music_ar.tokens.codec import encode
from music_ar.tokens.gaps import split
from music_ar.tokens.vocabulary import END, END_OF_GAP, INFILL_VOCABULARY_SIZE, PAD, START, VOCABULARY_SIZE

pytestmark = pytest.mark.skipif(library.load() is None, reason="the engine was not built: there is no C++ compiler")

CONTEXT, LATENTS = 48, 16
TINY = dataclasses.replace(PRESETS["tiny"], context=CONTEXT)
CONFIG = dataclasses.replace(TINY, onsets=3, retrieval_notes=24, time_heads=1)
CONFIGS = {
    "all features": CONFIG,
    "tokens only": dataclasses.replace(TINY, conv_width=1),
    "onsets only, many query heads": dataclasses.replace(TINY, onsets=2, heads=12, layers=1),
    "retrieval only, one query head a key": dataclasses.replace(TINY, retrieval_notes=12, kv_heads=4, conv_width=8),
    "gaps": dataclasses.replace(CONFIG, vocabulary_size=INFILL_VOCABULARY_SIZE),
    "odd sizes": dataclasses.replace(CONFIG, width=36, heads=6, head_size=80, hidden=70, rotary_fraction=0.3),
}
FOREVER = 2**30
# Longer than the context, and than all caches; it returns to its beginning, so that there is something to retrieve.
_PASSAGE = np.random.default_rng(0).integers(0, vocabulary.EVENT_CLASSES, 65)
PIECE = np.concatenate([[START], _PASSAGE, _PASSAGE[:40], _PASSAGE[15:40]]).astype(np.int32)
ALL = len(PIECE) - 1
OPTIONS = shared_options(SamplingOptions())
PATHS = ["vnni", "avx2", "portable"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Saves a noisy model of some sizes; returns it as loaded, with int8 matrices made float, and its tensors."""

    def of(config):
        folder = tmp_path_factory.mktemp("model")
        save_pretrained(noisy_model(config), folder)
        return load_pretrained(folder), safetensors.numpy.load_file(folder / "model.safetensors")

    return of


@pytest.fixture(scope="module")
def model(pretrained):
    return pretrained(CONFIG)


@pytest.fixture(scope="module")
def native(model):
    return NativeDecoder(CONFIG, model[1])


@pytest.fixture(scope="module")
def reference(model):
    return Decoder(model[0], Backend())


def start(decoder, prompts, *, seeds=None, latents=LATENTS, limit_steps=FOREVER):
    seeds = range(len(prompts)) if seeds is None else seeds
    return decoder.start(prompts, latents=latents, seeds=seeds, limit_steps=limit_steps)


def logits_after(decoder, prompt_length, tokens=10, latents=LATENTS):
    """Logits of so many tokens after a prompt."""
    state = start(decoder, [PIECE[:prompt_length]], latents=latents)
    return np.asarray(decoder.teacher_force(state, PIECE[None, prompt_length : prompt_length + tokens])[1][0])


def assert_close(found, expected):
    """Equal but for rounding: of activations to 15 bits and of caches to float16, in a model much noisier than real."""
    error = np.abs(found - expected)
    assert error.mean() < 5e-4
    assert error.max() < 2e-2


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_jax_step(pretrained, name):
    model, tensors = pretrained(CONFIGS[name])
    native = NativeDecoder(CONFIGS[name], tensors)
    assert_close(logits_after(native, 1, ALL), logits_after(Decoder(model, Backend()), 1, ALL))


@pytest.mark.parametrize("path", PATHS)
def test_every_instruction_set_computes_the_same(model, reference, monkeypatch, path):
    monkeypatch.setenv("MUSIC_AR_CPU", path)
    native = NativeDecoder(CONFIG, model[1])
    if native.path != path:
        pytest.skip(f"this CPU does not have what {path} needs")
    assert_close(logits_after(native, 1, ALL), logits_after(reference, 1, ALL))
    assert_close(logits_after(native, 100), logits_after(reference, 100))


@pytest.mark.parametrize("latents", [2, 11])
@pytest.mark.parametrize("length", [3, 30, 120])
def test_prefill_is_that_of_jax(native, reference, length, latents):
    assert_close(logits_after(native, length, latents=latents), logits_after(reference, length, latents=latents))


@pytest.mark.parametrize("length", [2, LATENTS, LATENTS + 1])
def test_prefill_equals_steps_to_the_byte_while_no_window_slides(native, length):
    stepped, _ = native.teacher_force(start(native, [PIECE[:1]]), PIECE[None, 1:length])
    prefilled = start(native, [PIECE[:length]])
    for name, one, other in zip(stepped._fields, stepped, prefilled, strict=True):
        if name not in ("prompt_end_B", "layers_run_B"):  # of the tokens after the prompt
            np.testing.assert_array_equal(one, other, err_msg=name)


def test_float_weights_are_rounded_to_int8(model, native):
    tensors = {
        name: array.astype(np.float32) * model[1][f"{name}.scale"] if array.dtype == np.int8 else array
        for name, array in model[1].items()
    }
    found = logits_after(NativeDecoder(CONFIG, tensors), 1)
    np.testing.assert_allclose(found, logits_after(native, 1), atol=2e-3)


# Drawing.


@given(
    seed=st.integers(0, 2**31 - 1),
    position=st.integers(0, 2**31 - 1),
    allowed=st.sampled_from([1, 2, 20, 391]),
    draw=st.integers(0, 9),
)
@settings(max_examples=30)
def test_a_key_draws_the_same_token_as_in_jax(seed, position, allowed, draw):
    rng = np.random.default_rng(draw)
    logits = (3 * rng.normal(size=VOCABULARY_SIZE)).astype(np.float32)
    logits[rng.permutation(VOCABULARY_SIZE)[allowed:]] = -np.inf
    expected = jax.random.categorical(jax.random.fold_in(jax.random.key(seed), position), logits)
    key = np.array([0, seed], np.uint32)
    engine = library.load()
    assert engine is not None
    assert engine.draw(logits.ctypes.data, key.ctypes.data, position) == int(expected)


SAMPLING = st.builds(
    SamplingOptions,
    temperature=st.sampled_from([0.0, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5, 200]),
    top_p=st.sampled_from([0.05, 0.5, 0.97, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
    steadiness=st.sampled_from([0.0, 0.25, 1.0]),
    lowest_pitch=st.sampled_from([0, 54]),
    highest_pitch=st.sampled_from([72, 127]),
)


@pytest.fixture(scope="module")
def chain():
    """The JAX processors, one after another, compiled."""

    @jax.jit
    def process(logits, state, options):
        for processor in processors.PROCESSORS:
            logits = processor(logits, state, options)
        return logits

    return process


def after(decoder, tokens):
    """The state after some tokens that may not be a prompt."""
    return decoder.teacher_force(start(decoder, [np.array([START])]), tokens[None])[0]


@given(tokens=token_sequences(min_size=1, max_size=60), sampling=SAMPLING, seed=st.integers(0, 9))
@settings(max_examples=40)
def test_processors_are_those_of_jax(native, reference, chain, tokens, sampling, seed):
    tokens = np.resize(tokens[tokens != END], 60) if (tokens != END).any() else np.full(60, START, np.int32)
    logits = (3 * np.random.default_rng(seed).normal(size=(1, VOCABULARY_SIZE))).astype(np.float32)
    options = option_arrays([sampling])
    expected = np.asarray(chain(logits, after(reference, tokens), options))
    np.testing.assert_allclose(native.processed(after(native, tokens), options, logits), expected, rtol=1e-4, atol=1e-4)


def test_stuck_notes_and_long_silences_are_ruled_out_as_in_jax(native, reference, chain):
    second = vocabulary.TIME_SHIFT + 99
    held = [vocabulary.VELOCITY + 9, 60, 64, *[second] * 6, 67, *[second] * 3]
    silent = [*held, *(vocabulary.NOTE_OFF + pitch for pitch in (60, 64, 67)), *[second] * 4]
    for tokens in (held[:8], held, silent):
        tokens = np.array(tokens, np.int32)
        logits = np.random.default_rng(0).normal(size=(1, VOCABULARY_SIZE)).astype(np.float32)
        options = option_arrays([SamplingOptions()])
        expected = np.asarray(chain(logits, after(reference, tokens), options))
        np.testing.assert_allclose(native.processed(after(native, tokens), options, logits), expected, atol=1e-4)


def assert_draws_as_jax(native, reference, prompt, sampling, length):
    """Every token is the one that JAX draws from the engine's own logits; returns them."""
    options = option_arrays([sampling])
    _, tokens_BxT, nats_BxT = native.decode_scored(start(native, [prompt], seeds=[5]), options, length=length)
    _, logits = native.teacher_force(start(native, [prompt], seeds=[5]), tokens_BxT)

    @jax.jit
    def one(rng, logits, state, options, token):
        return processors.draw(rng, logits, state, options), advance(state, token)

    state = start(reference, [prompt], seeds=[5])
    for index, token in enumerate(tokens_BxT[0]):
        if token == PAD:
            break
        state = state._replace(clock_B=state.clock_B + 1)
        rng = jax.vmap(jax.random.fold_in)(state.rng_B, state.age_B)
        drawn, state = one(rng, jnp.asarray(logits[:, index]), state, options, jnp.asarray([token]))
        assert int(drawn[0]) == token
        expected = jax.nn.logsumexp(logits[0, index]) - logits[0, index, token]
        np.testing.assert_allclose(nats_BxT[0, index], expected, atol=1e-4)
    return tokens_BxT[0]


def test_decoding_is_step_draw_and_advance_as_in_jax(native, reference):
    assert_draws_as_jax(native, reference, melody([60, 64, 67, 72]), SamplingOptions(), 40)


# Gaps.

GAPS = CONFIGS["gaps"]


@pytest.fixture(scope="module")
def gap_decoders(pretrained):
    """The native engine and JAX, with a model that fills gaps."""
    model, tensors = pretrained(GAPS)
    return NativeDecoder(GAPS, tensors), Decoder(model, Backend())


def gap_sequence(seed, notes=12, begin=100, end=150):
    return split(np.append(np.int32(START), encode(make_performance(seed, notes))), begin, end)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_middle_of_a_gap_is_that_of_jax(gap_decoders, seed):
    """With what comes after it in the context, and partly out of it."""
    parts = gap_sequence(seed)
    middle = parts.middle[None, : parts.middle.size - 1]  # without `END`
    logits = [
        np.asarray(decoder.teacher_force(start(decoder, [parts.prompt()]), middle)[1][0]) for decoder in gap_decoders
    ]
    assert_close(*logits)


@given(tokens=token_sequences(min_size=1, max_size=60, gaps=True), sampling=SAMPLING, seed=st.integers(0, 9))
@settings(max_examples=25)
def test_processors_in_gaps_are_those_of_jax(gap_decoders, chain, tokens, sampling, seed):
    native, reference = gap_decoders
    tokens = np.resize(tokens[tokens != END], 60) if (tokens != END).any() else np.full(60, START, np.int32)
    logits = (3 * np.random.default_rng(seed).normal(size=(1, INFILL_VOCABULARY_SIZE))).astype(np.float32)
    options = option_arrays([sampling])
    expected = np.asarray(chain(logits, after(reference, tokens), options))
    np.testing.assert_allclose(native.processed(after(native, tokens), options, logits), expected, rtol=1e-4, atol=1e-4)


def test_a_gap_is_filled_by_step_draw_and_advance_as_in_jax(gap_decoders):
    sampling = SamplingOptions(lowest_pitch=54, highest_pitch=72)
    native, reference = gap_decoders
    tokens = assert_draws_as_jax(native, reference, gap_sequence(3).prompt(), sampling, 300)
    assert tokens[tokens != PAD][-1] == END
    assert (tokens == END_OF_GAP).sum() == 1


# Rows.

PROMPTS = [melody([60, 64, 67]), PIECE[:1], melody([50, 53, 57, 60] * 12), PIECE[:1], melody([70] * 30)]


def decoded(decoder, prompts, seeds, lengths=(40,), **options):
    """The tokens and NLLs of some pieces."""
    state = start(decoder, prompts, seeds=seeds)
    arrays = option_arrays([SamplingOptions(**options)] * len(prompts))
    tokens, nats = [], []
    for length in lengths:
        state, *found = decoder.decode_scored(state, arrays, length=length)
        tokens.append(found[0])
        nats.append(found[1])
    return np.concatenate(tokens, axis=1), np.concatenate(nats, axis=1)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_depends_on_nothing_but_itself(native, threads):
    alone = [decoded(native, [prompt], [seed]) for seed, prompt in enumerate(PROMPTS)]
    set_threads(threads)
    try:
        together = decoded(native, PROMPTS, range(len(PROMPTS)), lengths=(1, 16, 23))
    finally:
        set_threads(2)
    for row, (tokens, nats) in enumerate(alone):
        np.testing.assert_array_equal(together[0][row], tokens[0])
        np.testing.assert_array_equal(together[1][row], nats[0])


def test_a_batch_may_be_larger_than_a_pass(native):
    tokens, nats = decoded(native, [PIECE[:3]] * 70, range(70), lengths=(6,))
    alone = decoded(native, [PIECE[:3]], [69], lengths=(6,))
    np.testing.assert_array_equal(tokens[69], alone[0][0])
    np.testing.assert_array_equal(nats[69], alone[1][0])


def test_a_replaced_row_decodes_as_if_alone_and_leaves_the_others(native):
    options = option_arrays([SamplingOptions()] * 2)
    state = start(native, PROMPTS[:2], seeds=[0, 1])
    state, first = native.decode(state, options, length=20)
    newcomer = start(native, PROMPTS[2:3], seeds=[0])
    state = state.replaced(0, newcomer.with_seeds([2]))
    state, second = native.decode(state, options, length=20)
    np.testing.assert_array_equal(second[0], decoded(native, PROMPTS[2:3], [2], lengths=(20,))[0][0])
    np.testing.assert_array_equal(np.append(first[1], second[1]), decoded(native, PROMPTS[1:2], [1])[0][0])


def test_rows_are_copies(native):
    state, _ = native.decode(start(native, PROMPTS[:3]), option_arrays([SamplingOptions()] * 3), length=8)
    copy = state.rows([2, 0, 2])
    expected = decoded(native, PROMPTS[:3], range(3), lengths=(8, 8))[0][:, 8:]
    _, tokens = native.decode(copy, option_arrays([SamplingOptions()] * 3), length=8)
    np.testing.assert_array_equal(tokens, expected[[2, 0, 2]])
    _, tokens = native.decode(state, option_arrays([SamplingOptions()] * 3), length=8)
    np.testing.assert_array_equal(tokens, expected)


def test_rows_that_are_done_wait(native):
    state = start(native, PROMPTS[:2], limit_steps=1)
    options = option_arrays([SamplingOptions()] * 2)
    state, tokens = native.decode(state, options, length=60)
    assert state.done_B.all()
    assert (tokens[:, -1] == PAD).all()
    generated = [row[row != PAD] for row in tokens]
    state, more = native.decode(state.with_limit(FOREVER), options, length=30)
    whole = decoded(native, PROMPTS[:2], range(2), lengths=(90,))[0]
    for row in range(2):
        continued = np.concatenate([generated[row], more[row]])
        np.testing.assert_array_equal(continued, whole[row, : len(continued)])
    idle = start(native, PROMPTS[:2]).with_ended(np.array([True, False]))
    assert (native.decode(idle, options, length=4)[1][0] == PAD).all()


def test_an_end_ends_the_row(native):
    prompts = np.array([[START, 360, 60, 256, 188], [START, 360, 61, 256, 189]], np.int32)
    state, _ = native.teacher_force(start(native, list(prompts)), np.array([[END], [300]]))
    assert state.done_B.tolist() == [True, False]
    _, tokens, nats = native.decode_scored(state, option_arrays([SamplingOptions()] * 2), length=5)
    assert (tokens[0] == PAD).all()
    assert (nats[0] == 0).all()
    assert (tokens[1] != PAD).any()


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [np.array([START, 391])], "seeds": [0]}, "tokens must be in"),
        ({"prompts": [np.array([-1])], "seeds": [0]}, "tokens must be in"),
        ({"prompts": [np.zeros(0, np.int32)], "seeds": [0]}, "at least one"),
        ({"prompts": [PIECE[:1]], "seeds": [0, 1]}, "a seed for each prompt"),
        ({"prompts": [PIECE[:1]], "seeds": [0], "latents": CONTEXT + 1}, "latents must be"),
        ({"prompts": [PIECE[:1]], "seeds": [0], "latents": 0}, "latents must be"),
        ({"prompts": [PIECE[:1]], "seeds": [0], "mode": "exact"}, "sliding windows"),
    ],
)
def test_what_cannot_be_started_is_refused(native, arguments, message):
    with pytest.raises(ValueError, match=message):
        native.start(**{"latents": LATENTS, "limit_steps": 1, **arguments})


def test_what_does_not_belong_to_the_state_is_refused(native, pretrained):
    state = start(native, [PIECE[:1]])
    with pytest.raises(ValueError, match="tokens must be in"):
        native.teacher_force(state, np.array([[1000]]))
    with pytest.raises(ValueError, match="rows"):
        native.teacher_force(state, np.array([[1], [2]]))
    with pytest.raises(ValueError, match="not a state of this decoder"):
        native.decode(state._replace(keys_Bx128=state.keys_Bx128.astype(np.int64)), OPTIONS, length=1)
    with pytest.raises(ValueError, match="caches"):
        state.replaced(0, start(native, [PIECE[:1]], latents=40))
    other = NativeDecoder(CONFIGS["odd sizes"], pretrained(CONFIGS["odd sizes"])[1])
    with pytest.raises(ValueError, match="not a state of this decoder"):
        other.decode(state, OPTIONS, length=1)


def test_a_model_of_other_sizes_is_refused(model):
    with pytest.raises(ValueError, match="shape"):
        NativeDecoder(dataclasses.replace(CONFIG, hidden=32), model[1])
    with pytest.raises(ValueError, match="lacks the tensor"):
        NativeDecoder(dataclasses.replace(CONFIG, layers=3), model[1])


def test_the_bare_matrices_are_timed(native):
    assert 0 < native.bare_matrices_s(1) < 1
    with pytest.raises(ValueError, match="rows"):
        native.bare_matrices_s(0)
