"""Cached decoding equals the uncached model, whatever is prefilled, batched, or already out of reach."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy_model
from event_tokens import SECOND, off, on, shift, tokens_of, velocity
from flax import nnx

from music_ar.decoding import history_bias
from music_ar.decoding.backend import Backend
from music_ar.decoding.decoder import Decoder
from music_ar.decoding.interface import option_arrays, shared_options
from music_ar.decoding.sampling import SamplingOptions
from music_ar.decoding.windows import NEVER, WINDOWS, window_starts
from music_ar.model.config import PRESETS
from music_ar.tokens import codec, grammar, vocabulary
from music_ar.tokens.vocabulary import PAD, START

CONTEXT, LATENTS = 48, 16
CONFIG = dataclasses.replace(PRESETS["tiny"], context=CONTEXT, onsets=3, retrieval_notes=24, time_heads=1)
FOREVER = 2**30
OPTIONS = shared_options(SamplingOptions())
CHUNK = 12  # tokens decoded at once; a number for all tests is a compilation for all
# It returns to its beginning, so that there is something to retrieve, within the context and from before it.
_PASSAGE = np.random.default_rng(0).integers(0, vocabulary.EVENT_CLASSES, 65)
PIECE = np.concatenate([[START], _PASSAGE, _PASSAGE[:40], _PASSAGE[15:40]]).astype(np.int32)
START_ONLY = tokens_of(START)

in_both_modes = pytest.mark.parametrize("mode", list(WINDOWS))


@pytest.fixture(scope="module")
def model():
    return noisy_model(CONFIG)


@pytest.fixture(scope="module")
def decoder(model):
    return Decoder(model, Backend())


def start(decoder, prompts, *, seeds=None, latents=LATENTS, limit_steps=FOREVER, mode="sliding"):
    seeds = range(len(prompts)) if seeds is None else seeds
    return decoder.start(prompts, latents=latents, seeds=seeds, limit_steps=limit_steps, mode=mode)


def decoded(decoder, state, *, tokens, options=OPTIONS):
    """The state after so many tokens, the tokens, and their NLL."""
    assert tokens % CHUNK == 0
    drawn, nats = [], []
    for _ in range(tokens // CHUNK):
        state, tokens_BxT, nats_BxT = decoder.decode_scored(state, options, length=CHUNK)
        drawn.append(np.asarray(tokens_BxT))
        nats.append(np.asarray(nats_BxT))
    return state, np.concatenate(drawn, axis=1), np.concatenate(nats, axis=1)


@pytest.fixture(scope="module")
def stepped(decoder):
    """Logits after each token of PIECE, token by token from `START`, by mode."""
    return {
        mode: np.asarray(decoder.teacher_force(start(decoder, [PIECE[:1]], mode=mode), PIECE[None, 1:])[1][0])
        for mode in WINDOWS
    }


def window_start(time):
    """Where the window that predicts at `time` began, by definition: staggered windows of LATENTS latents."""
    half = LATENTS // 2
    return max(time // half - 1, 0) * half


@pytest.fixture(scope="module")
def uncached(model):
    """Logits after the last of some tokens, by dense masked attention over the whole piece: without any cache.

    Each latent reads the CONTEXT inputs up to its own. Latents before `first` do not exist; by default that is where
    the predicting window starts. A latent reads at most the `seen` latest latents.
    """
    graph, params = nnx.split(model)
    ages = jnp.arange(len(PIECE))[None]
    behind = ages[0][:, None] - ages
    no_dropout = nnx.Dropout(0.0, deterministic=True)

    @jax.jit
    def logits(params, tokens, first, seen):
        model = nnx.merge(graph, params)
        conditioning = model.conditioning(tokens[None], len(PIECE))
        positions = jnp.stack([ages, conditioning.keyboard.time], axis=-1)
        embedded = model.condition(model.embed(tokens[None]), conditioning)

        def attend(block, x, keys_values, mask):
            attended = jax.nn.dot_product_attention(block.queries(x, positions), *keys_values, mask=mask)
            return block.add(x, attended, no_dropout)

        in_context = ((behind >= 0) & (behind < CONTEXT))[None, None]
        # A latent before the window sees itself, so that its softmax has a key; no latent in the window sees it.
        in_window = ((behind >= 0) & (behind < seen) & (ages >= first) | (behind == 0))[None, None]
        context = model.cross.keys_values(model.context_norm(embedded), positions)
        x = attend(model.cross, model.latent(embedded), context, in_context)
        for block in model.blocks:
            x = attend(block, x, block.keys_values(block.attention_norm(x), positions), in_window)
        return model.logits(x)[0]

    def after_last(tokens, first=None, seen=FOREVER):
        padded = np.pad(tokens, (0, len(PIECE) - len(tokens)))  # later tokens are never seen
        first = window_start(len(tokens) - 1) if first is None else first
        return np.asarray(logits(params, padded, first, seen)[len(tokens) - 1])

    return after_last


# First tokens; around the first window's half and end; around the end of the context; several contexts later.
TIMES = [0, 1, 7, 8, 9, 15, 16, 17, 23, 24, 31, 46, 47, 48, 49, 64, 97, 129]


@pytest.mark.parametrize("time", TIMES)
def test_cached_equals_uncached(uncached, stepped, time):
    np.testing.assert_allclose(stepped["exact"][time], uncached(PIECE[: time + 1]), atol=2e-5)


@pytest.mark.parametrize("time", TIMES)
def test_a_sliding_window_is_a_band_of_attention(uncached, stepped, time):
    expected = uncached(PIECE[: time + 1], first=0, seen=LATENTS)
    np.testing.assert_allclose(stepped["sliding"][time], expected, atol=2e-5)
    if time < LATENTS // 2:  # nothing has slid or begun anew yet
        np.testing.assert_allclose(stepped["sliding"][time], stepped["exact"][time], atol=2e-5)
    if time >= LATENTS:
        assert np.abs(stepped["sliding"][time] - stepped["exact"][time]).max() > 1e-3


def test_latents_may_be_fewer_than_their_cache_holds(decoder, uncached):
    logits = decoder.teacher_force(start(decoder, [PIECE[:1]], latents=11), PIECE[None, 1:])[1][0]
    for time in (9, 10, 11, 12, 40, 129):
        expected = uncached(PIECE[: time + 1], first=0, seen=11)
        np.testing.assert_allclose(logits[time], expected, atol=2e-5)


@pytest.mark.parametrize("time", [15, 47])
def test_cached_equals_the_model_as_trained(model, stepped, time):
    forward = nnx.jit(lambda model, tokens: model(tokens, latents=time + 1 - window_start(time)))
    expected = forward(model, jnp.asarray(PIECE)[None, : time + 1])[0, -1]
    np.testing.assert_allclose(stepped["exact"][time], expected, atol=2e-5)


def test_the_uncached_reference_forgets_what_left_the_context(uncached):
    """And depends on what is in it; otherwise the tests above could not fail."""

    def with_third(token, length):
        """Of tokens that no feature keeps, as the keyboard would for ever."""
        return np.concatenate([PIECE[:3], [token], PIECE[4:length]]).astype(np.int32)

    near, far = ([uncached(with_third(token, length)) for token in (vocabulary.END, START)] for length in (50, 120))
    assert np.abs(near[0] - near[1]).max() > 1e-3
    np.testing.assert_array_equal(*far)


# Prefill.

PROMPT_LENGTHS = [2, 8, 9, 16, 17, 48, 49, 130]


@pytest.mark.parametrize("length", PROMPT_LENGTHS)
def test_prefill_equals_stepping(decoder, stepped, length):
    after = PIECE[None, length : length + 11]  # and stays equal over the next handover
    _, logits = decoder.teacher_force(start(decoder, [PIECE[:length]], mode="exact"), after)
    np.testing.assert_allclose(logits[0], stepped["exact"][length - 1 :][: after.shape[1]], atol=2e-5)


@pytest.mark.parametrize("length", PROMPT_LENGTHS)
def test_prefill_of_a_sliding_window_is_the_model_as_trained(decoder, uncached, length):
    """The last n latents are those of a window that begins with them; from there it slides."""
    first = max(length - 1 - LATENTS, 0)  # the last token is pending: it comes after them
    after = PIECE[None, length : length + 11]
    _, logits = decoder.teacher_force(start(decoder, [PIECE[:length]]), after)
    for ahead, row in enumerate(logits[0]):
        np.testing.assert_allclose(row, uncached(PIECE[: length + ahead], first=first, seen=LATENTS), atol=2e-5)


def test_prefill_of_many_latents():
    """As many as are not computed at once."""
    model = noisy_model(dataclasses.replace(PRESETS["tiny"], context=1024, latents=1024))
    piece = np.resize(PIECE, 1000)
    decoder = Decoder(model, Backend())
    _, logits = decoder.teacher_force(start(decoder, [piece[:-1]], latents=1024), piece[None, -1:])
    np.testing.assert_allclose(logits[0, 0], model(jnp.asarray(piece[None, :-1]), latents=999)[0, -1], atol=2e-5)


def test_equal_prompts_are_prefilled_once(decoder, compilations):
    def prefilled(prompts):
        with compilations() as programs:
            state = start(decoder, prompts, latents=6)  # of a cache of another size than in the other tests
        return state, sum("prefill" in name for name in programs)

    alone, first = prefilled([PIECE[:35]])
    several, again = prefilled([PIECE[:35]] * 5)
    assert (first, again) == (1, 0)  # one row again, since five would have another shape
    alone = alone._replace(rng_B=jax.random.key_data(alone.rng_B))
    for row in range(5):
        found = several.rows([row])._replace(rng_B=alone.rng_B)
        jax.tree.map(np.testing.assert_array_equal, found, alone)


# Batches.


@in_both_modes
def test_a_batch_of_different_lengths_equals_one_by_one(decoder, mode):
    prompts, seeds = [PIECE[:1], PIECE[:5], PIECE[:100], PIECE[:5]], [3, 1, 1, 4]
    together = decoded(decoder, start(decoder, prompts, seeds=seeds, mode=mode), tokens=24)[1]
    for row, prompt, seed in zip(together, prompts, seeds, strict=True):
        alone = decoded(decoder, start(decoder, [prompt], seeds=[seed], mode=mode), tokens=24)[1]
        np.testing.assert_array_equal(alone[0], row)
    assert not np.array_equal(together[1], together[2])  # one seed, two prompts
    assert not np.array_equal(together[1], together[3])  # one prompt, two seeds


def test_rows_of_a_model_without_features():
    decoder = Decoder(noisy_model(PRESETS["tiny"]), Backend())
    _, tokens, _ = decoded(decoder, start(decoder, [PIECE[:5]] * 2), tokens=CHUNK)
    assert not np.array_equal(tokens[0], tokens[1])


def test_chosen_rows_continue_as_they_would_have(decoder):
    prompts = [PIECE[:5], PIECE[:60], PIECE[:9], PIECE[:12]]
    state, *_ = decoded(decoder, start(decoder, prompts), tokens=24)
    chosen = state.rows([2, 1, 2, 0])
    _, all_tokens, _ = decoded(decoder, state, tokens=24)
    _, tokens, _ = decoded(decoder, chosen, tokens=24)
    np.testing.assert_array_equal(tokens, all_tokens[[2, 1, 2, 0]])


@in_both_modes
@pytest.mark.parametrize("before", [CHUNK, 6 * CHUNK])
def test_a_piece_enters_a_running_batch(decoder, mode, before):
    """It continues as it would alone, and the other rows as if nothing had happened, bit for bit."""
    rows = [PIECE[:3], PIECE[:100], PIECE[:9], PIECE[:20]]

    def running():
        return decoded(decoder, start(decoder, rows, mode=mode), tokens=before)[0]

    _, undisturbed, _ = decoded(decoder, running(), tokens=60)
    for newcomer in (PIECE[:1], PIECE[:12], PIECE[:70], PIECE):  # shorter and longer than the context
        alone = start(decoder, [newcomer], seeds=[7], mode=mode)
        state = running().replaced(0, alone).replaced(3, alone)  # the newcomer's state can be used again
        _, tokens, nats = decoded(decoder, state, tokens=60)
        np.testing.assert_array_equal(tokens[1:3], undisturbed[1:3])
        np.testing.assert_array_equal(tokens[0], decoded(decoder, alone, tokens=60)[1][0])
        np.testing.assert_array_equal(tokens[0], tokens[3])
        np.testing.assert_array_equal(nats[0], nats[3])  # to the last bit, in whichever row


def test_rows_are_sharded_over_all_devices(decoder):
    assert jax.device_count() == int(os.environ["JAX_NUM_CPU_DEVICES"])
    state, tokens, _ = decoded(decoder, start(decoder, [PIECE[:9]] * 4), tokens=24)
    assert len(state.caches.self_k[0].sharding.device_set) == min(4, jax.device_count())
    alone = decoded(decoder, start(decoder, [PIECE[:9]], seeds=[3]), tokens=24)[1]
    np.testing.assert_array_equal(tokens[3], alone[0])


@pytest.mark.slow
def test_two_devices_decode_as_one_does():
    """Tests of batches once more, with rows sharded over two devices."""
    chosen = f"sharded or stops or (running_batch and {CHUNK}-sliding) or forced_rows"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", "-k", chosen, __file__],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "2"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    assert "4 passed" in result.stdout


def test_forced_rows_are_alone(decoder):
    tokens = np.stack([PIECE[9:20], PIECE[60:71]])
    _, together = decoder.teacher_force(start(decoder, [PIECE[:9], PIECE[:60]]), tokens)
    for row, prompt in enumerate((PIECE[:9], PIECE[:60])):
        _, alone = decoder.teacher_force(start(decoder, [prompt]), tokens[row : row + 1])
        np.testing.assert_allclose(together[row], alone[0], atol=2e-5)


def test_a_batch_stops_when_every_row_has_enough(decoder):
    prompts = [START_ONLY] * 4

    def made(*limits):
        state = start(decoder, prompts)._replace(limit_B=jnp.array(limits, jnp.int32))
        return decoded(decoder, state, tokens=96)[:2]

    def enough(row, limit):
        """How many tokens it takes to generate so much music."""
        return int(np.argmax(np.append(codec.event_steps(row)[1:], codec.length_steps(row)) >= limit)) + 1

    _, free = made(*[FOREVER] * 4)
    limits = (100, 50, 200, 150)
    state, limited = made(*limits)
    stops = np.array([enough(row, limit) for row, limit in zip(free, limits, strict=True)])
    assert stops.max() < 96
    # A row that has enough waits for the others.
    assert np.asarray(state.done_B).all()
    # With a higher limit it continues as if nothing had been.
    _, more, _ = decoded(decoder, state.with_limit(FOREVER), tokens=CHUNK)
    for row, stop in enumerate(stops):
        np.testing.assert_array_equal(limited[row, :stop], free[row, :stop])
        assert (limited[row, stop:] == PAD).all()
        np.testing.assert_array_equal(more[row], free[row, stop : stop + CHUNK])


def test_a_piece_that_ended_is_followed_by_padding_and_leaves_the_others(decoder):
    prompts = [PIECE[:9], PIECE[:5]] * 2
    _, free, _ = decoded(decoder, start(decoder, prompts), tokens=24)
    ended = start(decoder, prompts)._replace(ended_B=jnp.array([True, False, False, False]))
    _, tokens, _ = decoded(decoder, ended, tokens=24)
    assert (tokens[0] == PAD).all()
    np.testing.assert_array_equal(tokens[1:], free[1:])


def test_tokens_outside_of_the_vocabulary_are_refused(decoder):
    for token in (-1, 391, 2**30):
        with pytest.raises(ValueError, match=r"tokens must be in 0\.\.390"):
            start(decoder, [PIECE[:2], np.append(PIECE[:3], token)])


def test_a_seed_for_each_prompt(decoder):
    with pytest.raises(ValueError, match="a seed for each prompt, got 2 prompts and 1 seeds"):
        start(decoder, [PIECE[:2], PIECE[:3]], seeds=[0])


# Sampling.


def test_each_row_has_its_own_options(decoder):
    each = [
        SamplingOptions(temperature=0.0),
        SamplingOptions(),
        SamplingOptions(top_k=2, steadiness=0.0),
        SamplingOptions(min_p=0.3),
    ]
    prompts = [PIECE[:9]] * 4
    _, tokens, _ = decoded(decoder, start(decoder, prompts), tokens=36, options=option_arrays(each))
    for row, options in enumerate(each):
        _, alike, _ = decoded(decoder, start(decoder, prompts), tokens=36, options=shared_options(options))
        np.testing.assert_array_equal(tokens[row], alike[row])


def test_the_nll_of_each_token_is_that_of_the_model(decoder):
    options = shared_options(SamplingOptions(temperature=0.5, top_k=5))
    prompts = [PIECE[:9], PIECE[:60], PIECE[:5], PIECE[:1]]
    _, tokens, nats = decoded(decoder, start(decoder, prompts), tokens=24, options=options)
    _, logits = decoder.teacher_force(start(decoder, prompts), tokens)
    expected = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(nats, expected, atol=1e-4)


def test_chunks_do_not_matter(decoder):
    state = start(decoder, [PIECE[:9]])
    at_once = decoder.decode(start(decoder, [PIECE[:9]]), OPTIONS, length=4 * CHUNK)[1]
    np.testing.assert_array_equal(decoded(decoder, state, tokens=4 * CHUNK)[1], at_once)


@pytest.mark.parametrize("options", [{}, {"temperature": 3.0, "top_p": 1.0}, {"temperature": 0.0}])
def test_every_sampled_token_obeys_the_grammar(decoder, options):
    state = start(decoder, [START_ONLY] * 4, limit_steps=2000)
    _, tokens, _ = decoded(decoder, state, tokens=12 * CHUNK, options=shared_options(SamplingOptions(**options)))
    for row in tokens:
        state = grammar.scan(START_ONLY)
        for token in row[row != PAD]:
            assert grammar.playable_tokens(state)[token]
            state = grammar.step(state, token)


def test_stuck_notes_are_released_and_silence_ends(decoder):
    """All processors are applied to the state as it is after a prompt and as it changes with each token."""
    held = [START, velocity(16), on(40), on(50), shift(1), on(60), *[SECOND] * 6, on(70), SECOND, shift(99)]
    silent = [START, SECOND, velocity(16), on(40), SECOND, off(40), *[SECOND] * 3]
    prompts = [tokens_of(*prompt) for prompt in (held, silent, [START, *[SECOND] * 3], held)]
    _, tokens, _ = decoded(decoder, start(decoder, prompts), tokens=CHUNK)
    for released in (tokens[0], tokens[3]):
        assert released[0] == off(60)
        assert set(released[1:3].tolist()) == {off(40), off(50)}
    assert not vocabulary.is_shift(tokens[1:3, 0]).any()


def test_the_history_is_that_of_the_piece_and_biases_it(decoder):
    """Of a prompt in C alone; what follows at a high steadiness is mostly C."""
    prompt = np.concatenate([[START, velocity(16)], np.tile([on(60), shift(21), off(60)], 400)]).astype(np.int32)
    in_c = {}
    for steadiness in (0.0, 1.0):
        options = shared_options(SamplingOptions(top_p=1.0, steadiness=steadiness))
        state, tokens, _ = decoded(decoder, start(decoder, [prompt] * 4), tokens=60, options=options)
        whole = [history_bias.scan(np.concatenate([prompt, row])) for row in tokens]
        jax.tree.map(np.testing.assert_array_equal, state.history, jax.tree.map(lambda *rows: np.stack(rows), *whole))
        notes = tokens[vocabulary.is_note_on(tokens)]
        assert len(notes) > 20
        in_c[steadiness] = np.mean(notes % 12 == 0)
    assert in_c[1.0] > 2 * in_c[0.0]


def test_other_latents_within_a_cache_and_other_options_compile_nothing_anew(decoder, compilations):
    changes = [
        (16, SamplingOptions()),
        (14, SamplingOptions(top_k=3)),
        (10, SamplingOptions(temperature=0.5, min_p=0.1)),
    ]
    programs, found = [], []
    for latents, options in changes:
        with compilations() as compiled:
            state = start(decoder, [PIECE[:30]], latents=latents)
            found.append(decoded(decoder, state, tokens=CHUNK, options=shared_options(options))[1])
        programs.append(compiled)
    assert programs[1:] == [[], []]
    assert len({row.tobytes() for row in found}) == 3


# Windows.


def test_windows_by_hand():
    starts, active = window_starts(jnp.arange(10), jnp.full(10, 4), 2)
    np.testing.assert_array_equal(starts[:, 0], [0, 0, 0, 0, 4, 4, 4, 4, 8, 8])
    np.testing.assert_array_equal(starts[:, 1], [NEVER, NEVER, 2, 2, 2, 2, 6, 6, 6, 6])
    np.testing.assert_array_equal(active, [0, 0, 0, 0, 1, 1, 0, 0, 1, 1])
    starts, active = window_starts(jnp.arange(10), jnp.full(10, 4), 1)
    np.testing.assert_array_equal(starts[:, 0], [0, 0, 0, 0, 1, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(active, 0)
