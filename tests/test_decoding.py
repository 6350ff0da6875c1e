"""Cached decoding equals the uncached model, whatever is prefilled, batched, or already out of reach."""

import dataclasses
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy_model
from flax import nnx

from music_ar.decoding import decoder as decoding
from music_ar.decoding import history_bias
from music_ar.decoding.decoder import Decoder
from music_ar.decoding.sampling import SamplingOptions
from music_ar.model.config import PRESETS
from music_ar.tokens import codec, grammar, vocabulary

CONTEXT, BUDGET = 48, 16
CONFIG = dataclasses.replace(
    PRESETS["tiny"], context=CONTEXT, latents=32, onsets=3, recall=24, time_heads=1, cross_depths=(1,)
)
FOREVER = 2**30
FILTERS = SamplingOptions().filters()
# It returns to its beginning, so that there is something to recall, within the context and from before it.
_PASSAGE = np.random.default_rng(0).integers(0, vocabulary.EVENT_CLASSES, 65)
PIECE = np.concatenate([[vocabulary.START], _PASSAGE, _PASSAGE[:40], _PASSAGE[15:40]]).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    return noisy_model(CONFIG)


@pytest.fixture(scope="module")
def decoder(model):
    return Decoder(model, int8=False)


def start(decoder, prompts, *, seeds=None, latents=BUDGET, limit_steps=FOREVER, mode="exact"):
    seeds = [0] * len(prompts) if seeds is None else seeds
    return decoder.start(prompts, latents=latents, seeds=seeds, limit_steps=limit_steps, mode=mode)


@pytest.fixture(scope="module")
def stepped(decoder):
    """Logits after each token of PIECE, token by token from nothing, by mode."""
    return {
        mode: np.asarray(decoder.force(start(decoder, [PIECE[:1]], mode=mode), PIECE[None, 1:])[1][0])
        for mode in decoding.WINDOW_MODES
    }


def window_start(time):
    """Where the window that predicts at `time` began, from its definition: staggered windows of BUDGET latents."""
    half = BUDGET // 2
    return max(time // half - 1, 0) * half


@pytest.fixture(scope="module")
def uncached(model):
    """Logits after the last of some tokens, by dense masked attention over the whole piece: no cache, no ring.

    Each latent sees the CONTEXT inputs up to its own. Latents before `first` do not exist; by default that is where the
    predicting window starts. A latent sees no more than the `seen` latest latents.
    """
    graph, params = nnx.split(model)
    ages = jnp.arange(len(PIECE))[None]
    behind = ages[0][:, None] - ages
    off = nnx.Dropout(0.0, deterministic=True)

    @jax.jit
    def logits(params, tokens, first, seen):
        model = nnx.merge(graph, params)
        told = model.told(tokens[None], len(PIECE))
        places = jnp.stack([ages, told.keyboard.step], axis=-1)
        embedded = model.tell(model.embed(tokens[None]), told)
        context = model.cross.keys_values(model.context_norm(embedded), places)

        def attend(block, x, keys_values, mask):
            return block.add(x, jax.nn.dot_product_attention(block.queries(x, places), *keys_values, mask=mask), off)

        in_context = ((behind >= 0) & (behind < CONTEXT))[None, None]
        # A latent before the window sees itself, so that its softmax has a key; no latent in the window sees it.
        in_window = ((behind >= 0) & (behind < seen) & (ages >= first) | (behind == 0))[None, None]
        x = attend(model.cross, model.latent(embedded), context, in_context)
        for depth, block in enumerate(model.blocks):
            if depth in CONFIG.cross_depths:
                x = attend(model.further_crosses[CONFIG.cross_depths.index(depth)], x, context, in_context)
            x = attend(block, x, block.keys_values(block.attention_norm(x), places), in_window)
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
def test_a_sliding_window_equals_a_band_of_attention(uncached, stepped, time):
    expected = uncached(PIECE[: time + 1], first=0, seen=BUDGET)
    np.testing.assert_allclose(stepped["sliding"][time], expected, atol=2e-5)
    if time < BUDGET // 2:  # nothing has slid or begun anew yet
        np.testing.assert_allclose(stepped["sliding"][time], stepped["exact"][time], atol=2e-5)
    if time >= BUDGET:
        assert np.abs(stepped["sliding"][time] - stepped["exact"][time]).max() > 1e-3


@pytest.mark.parametrize("time", [15, 47])
def test_cached_equals_the_model_as_trained(model, stepped, time):
    expected = model(jnp.asarray(PIECE)[None, : time + 1], latents=time + 1 - window_start(time))[0, -1]
    np.testing.assert_allclose(stepped["exact"][time], expected, atol=2e-5)


def test_the_reference_is_not_blind(uncached):
    """Context and window both matter at the sizes tested; otherwise the tests above could not fail."""

    def with_third(token, length):
        """Tokens that the keyboard takes no notice of, which would remember it for ever."""
        return np.concatenate([PIECE[:3], [token], PIECE[4:length]]).astype(np.int32)

    assert np.abs(uncached(with_third(vocabulary.END, 50)) - uncached(with_third(vocabulary.START, 50))).max() > 1e-3
    np.testing.assert_array_equal(
        uncached(with_third(vocabulary.END, 120)), uncached(with_third(vocabulary.START, 120))
    )


PROMPT_LENGTHS = [2, 8, 9, 16, 17, 48, 49, 130]


@pytest.mark.parametrize("length", PROMPT_LENGTHS)
def test_prefill_equals_stepping(decoder, stepped, length):
    after = PIECE[None, length : length + 11]  # and stays equal over the next hand-over
    _, logits = decoder.force(start(decoder, [PIECE[:length]]), after)
    np.testing.assert_allclose(logits[0], stepped["exact"][length - 1 :][: after.shape[1]], atol=2e-5)


@pytest.mark.parametrize("length", PROMPT_LENGTHS)
def test_prefill_of_a_sliding_window_is_the_model_as_trained(decoder, uncached, length):
    """The last n latents in a window that begins with them; from there it slides."""
    first = max(length - 1 - BUDGET, 0)  # the last token is pending: it comes after them
    after = PIECE[None, length : length + 11]
    _, logits = decoder.force(start(decoder, [PIECE[:length]], mode="sliding"), after)
    for ahead, row in enumerate(logits[0]):
        np.testing.assert_allclose(row, uncached(PIECE[: length + ahead], first=first, seen=BUDGET), atol=2e-5)


@pytest.mark.parametrize("mode", decoding.WINDOW_MODES)
def test_a_batch_of_different_lengths_equals_one_by_one(decoder, mode):
    prompts = [PIECE[:1], PIECE[:5], PIECE[:100], PIECE[:5]]

    def tokens(prompts, seeds):
        return np.asarray(decoder.decode(start(decoder, prompts, seeds=seeds, mode=mode), FILTERS, length=24)[1])

    seeds = [3, 1, 1, 4]
    together = tokens(prompts, seeds)
    for row, prompt, seed in zip(together, prompts, seeds, strict=True):
        np.testing.assert_array_equal(tokens([prompt], [seed])[0], row)
    assert not np.array_equal(together[1], together[2])  # one seed, two prompts
    assert not np.array_equal(together[1], together[3])  # one prompt, two seeds


def test_equal_prompts_are_prefilled_once(decoder):
    compiled: Any = decoding._prefill
    start(decoder, [PIECE[:20]])
    before = compiled._cache_size()
    state = start(decoder, [PIECE[:20]] * 5, seeds=range(5))
    assert compiled._cache_size() == before  # the shape of one prompt
    assert state.ended_B.shape == (5,)


def test_rows_of_a_model_that_is_not_told_of_the_keyboard():
    decoder = Decoder(noisy_model(PRESETS["tiny"]), int8=False)
    _, tokens = decoder.decode(start(decoder, [PIECE[:5]] * 2, seeds=[0, 1]), FILTERS, length=4)
    assert not np.array_equal(tokens[0], tokens[1])


def test_rows_go_on_as_they_would_have(decoder):
    state = start(decoder, [PIECE[:5], PIECE[:60], PIECE[:9]], seeds=[0, 1, 2])
    state, _ = decoder.decode(state, FILTERS, length=24)
    chosen = state.rows([2, 1, 2])
    _, all_tokens = decoder.decode(state, FILTERS, length=24)
    _, tokens = decoder.decode(chosen, FILTERS, length=24)
    np.testing.assert_array_equal(tokens, np.asarray(all_tokens)[[2, 1, 2]])


@pytest.mark.parametrize("mode", decoding.WINDOW_MODES)
@pytest.mark.parametrize("before", [1, 24, 71])
def test_a_piece_enters_a_running_batch(decoder, mode, before):
    """It makes what it makes alone, and its batch-mates go on as if nothing had been, bit for bit."""
    seeds, rows = [0, 1, 2, 3], [PIECE[:3], PIECE[:100], PIECE[:9], PIECE[:20]]
    for newcomer in (PIECE[:1], PIECE[:12], PIECE[:70], PIECE):  # shorter and longer than the context

        def running():
            state = start(decoder, rows, seeds=seeds, mode=mode)
            return decoder.decode(state, FILTERS, length=before)[0]

        _, undisturbed, _ = decoder.decode_scored(running(), FILTERS, length=60)
        alone = start(decoder, [newcomer], seeds=[7], mode=mode)
        state = running().replaced(0, alone).replaced(2, alone)  # the newcomer's state can be used again
        _, tokens, nats = decoder.decode_scored(state, FILTERS, length=60)
        np.testing.assert_array_equal(tokens[1::2], undisturbed[1::2])
        np.testing.assert_array_equal(tokens[0], decoder.decode(alone, FILTERS, length=60)[1][0])
        np.testing.assert_array_equal(tokens[0], tokens[2])
        np.testing.assert_array_equal(nats[0], nats[2])  # to the last bit, in whichever row


def test_rows_are_dealt_to_all_devices(decoder):
    assert jax.device_count() == int(os.environ["JAX_NUM_CPU_DEVICES"])
    state, tokens = decoder.decode(start(decoder, [PIECE[:9]] * 4, seeds=range(4)), FILTERS, length=24)
    assert len(state.caches.self_k[0].sharding.device_set) == min(4, jax.device_count())
    np.testing.assert_array_equal(
        tokens[3], decoder.decode(start(decoder, [PIECE[:9]], seeds=[3]), FILTERS, length=24)[1][0]
    )


def test_two_devices_decode_as_one_does():
    """The tests of batches once more, where rows are dealt."""
    chosen = "dealt or stops or (running_batch and 24-sliding)"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-n0", "-q", "-k", chosen, __file__],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "2"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout


def test_each_row_has_its_own_options(decoder):
    options = [
        SamplingOptions(temperature=0.0),
        SamplingOptions(),
        SamplingOptions(top_k=2),
        SamplingOptions(min_p=0.3),
    ]
    each = [option.filters() for option in options]
    prompts, seeds = [PIECE[:9]] * 4, [1, 2, 3, 4]
    by_row = jax.tree.map(lambda *rows: jnp.stack(rows), *each)
    _, tokens = decoder.decode(start(decoder, prompts, seeds=seeds), by_row, length=40)
    for row, filters in enumerate(each):
        _, alike = decoder.decode(start(decoder, prompts, seeds=seeds), filters, length=40)
        np.testing.assert_array_equal(tokens[row], alike[row])


def test_the_surprise_of_each_token_is_the_model_s_own(decoder):
    options = SamplingOptions(temperature=0.5, top_k=5).filters()
    prompts = [PIECE[:9], PIECE[:60]]
    _, tokens, nats = decoder.decode_scored(start(decoder, prompts), options, length=20)
    _, logits = decoder.force(start(decoder, prompts), np.asarray(tokens))
    expected = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(nats, expected, atol=1e-4)


def test_chunks_do_not_matter(decoder):
    def tokens(*lengths):
        state = start(decoder, [PIECE[:9]], seeds=[5])
        parts = []
        for length in lengths:
            state, part = decoder.decode(state, FILTERS, length=length)
            parts.append(np.asarray(part[0]))
        return np.concatenate(parts)

    np.testing.assert_array_equal(tokens(24, 24), tokens(48))


@pytest.mark.parametrize("options", [{}, {"temperature": 3.0, "top_p": 1.0}, {"temperature": 0.0}])
def test_every_sampled_token_obeys_the_grammar(decoder, options):
    prompts = [np.array([vocabulary.START], np.int32)] * 3
    state = start(decoder, prompts, seeds=[0, 1, 2], limit_steps=2000)
    _, tokens = decoder.decode(state, SamplingOptions(**options).filters(), length=160)
    for row in np.asarray(tokens):
        grammar = grammar.grammar_after(prompts[0])
        for token in row[row != vocabulary.PAD]:
            assert grammar.playable_events(grammar)[token]
            grammar = grammar.advance(grammar, token)


def test_a_batch_stops_when_every_row_has_enough(decoder):
    prompts = [np.array([vocabulary.START], np.int32)] * 2

    def made(*limits):
        state = start(decoder, prompts, seeds=[0, 1])._replace(limit_B=jnp.array(limits, jnp.int32))
        state, tokens = decoder.decode(state, FILTERS, length=96)
        return state, np.asarray(tokens)

    def enough(row, limit):
        """How many tokens it takes to make so much music."""
        return int(np.argmax(np.append(codec.event_steps(row)[1:], codec.length_steps(row)) >= limit)) + 1

    _, free = made(FOREVER, FOREVER)
    state, both = made(100, 200)
    stops = np.array([enough(free[0], 100), enough(free[1], 200)])
    assert stops.max() < 96
    if jax.device_count() == 1:  # a row that has enough goes on with the others
        stops[:] = stops.max()
    assert np.asarray(state.done_B).all()
    # With a higher limit it goes on as if nothing had been.
    _, more = decoder.decode(state.with_limit(FOREVER), FILTERS, length=24)
    for row, stop in enumerate(stops):
        np.testing.assert_array_equal(both[row, :stop], free[row, :stop])
        assert (both[row, stop:] == vocabulary.PAD).all()
        np.testing.assert_array_equal(more[row], free[row, stop : stop + 24])


def test_a_piece_that_ended_is_followed_by_padding_and_leaves_the_others(decoder):
    prompts = [PIECE[:9], PIECE[:5]]
    state = start(decoder, prompts, seeds=[0, 1])
    _, free = decoder.decode(start(decoder, prompts, seeds=[0, 1]), FILTERS, length=24)
    _, tokens = decoder.decode(state._replace(ended_B=jnp.array([True, False])), FILTERS, length=24)
    assert (np.asarray(tokens[0]) == vocabulary.PAD).all()
    np.testing.assert_array_equal(tokens[1], free[1])


def test_after_eight_seconds_the_pedal_is_released(decoder):
    """Two keys are down since the beginning, a third nearly so long, and a fourth for almost two seconds: it stays."""
    on, off, rest = vocabulary.NOTE_ON, vocabulary.NOTE_OFF, vocabulary.TIME_SHIFT + 99
    prompt = [
        vocabulary.START,
        vocabulary.VELOCITY + 15,
        on + 40,
        on + 50,
        vocabulary.TIME_SHIFT,
        on + 60,
        *[rest] * 6,
        on + 70,
    ]
    before, after = (np.array([*prompt, rest, vocabulary.TIME_SHIFT + last], np.int32) for last in (97, 98))
    state = start(decoder, [before, after], seeds=[0, 1])
    np.testing.assert_array_equal(decoding.drawable(state)[0], grammar.playable_events(grammar.grammar_after(before)))
    np.testing.assert_array_equal(np.flatnonzero(decoding.drawable(state)[1]), [off + 60])
    _, tokens = decoder.decode(state, FILTERS, length=3)
    released = np.asarray(tokens[1])
    assert released[0] == off + 60
    assert set(released[1:].tolist()) == {off + 40, off + 50}
    state, _ = decoder.force(start(decoder, [after], seeds=[0]), released[None])
    grammar = grammar.grammar_after(np.concatenate([after, released]))
    np.testing.assert_array_equal(decoding.drawable(state)[0], grammar.playable_events(grammar))


def test_releases_that_are_due_obey_the_grammar_and_reach_keys_that_were_struck_twice(decoder):
    on, off, rest = vocabulary.NOTE_ON, vocabulary.NOTE_OFF, vocabulary.TIME_SHIFT + 99
    held = [vocabulary.START, vocabulary.VELOCITY + 15, on + 40, on + 40, vocabulary.TIME_SHIFT, off + 40, *[rest] * 8]
    twice, ends_with_a_note = np.array(held, np.int32), np.array([*held, on + 50], np.int32)
    state = start(decoder, [twice, ends_with_a_note], seeds=[0, 1])
    np.testing.assert_array_equal(np.flatnonzero(decoding.drawable(state)[0]), [off + 40])
    grammar = grammar.grammar_after(ends_with_a_note)
    np.testing.assert_array_equal(decoding.drawable(state)[1], grammar.playable_events(grammar))
    state, _ = decoder.force(
        start(decoder, [ends_with_a_note], seeds=[0]), np.array([[vocabulary.TIME_SHIFT]], np.int32)
    )
    np.testing.assert_array_equal(np.flatnonzero(decoding.drawable(state)[0]), [off + 40])


def test_after_three_seconds_of_silence_time_goes_on_with_a_note_alone(decoder):
    on, off, rest = vocabulary.NOTE_ON, vocabulary.NOTE_OFF, vocabulary.TIME_SHIFT + 99
    played = [vocabulary.START, rest, vocabulary.VELOCITY + 15, on + 40, rest, off + 40]
    before = np.array([*played, *[rest] * 2], np.int32)
    after, held = np.array([*played, *[rest] * 3], np.int32), np.array([*played[:-1], *[rest] * 3], np.int32)
    begins = np.array([vocabulary.START, *[rest] * 3], np.int32)
    state = start(decoder, [before, after, held, begins], seeds=range(4))
    for row, prompt, paused in zip(decoding.drawable(state), (before, after, held, begins), (0, 1, 0, 1), strict=True):
        playable = grammar.playable_events(grammar.grammar_after(prompt))
        assert playable[vocabulary.TIME_SHIFT : vocabulary.VELOCITY].all()
        if paused:
            playable[vocabulary.TIME_SHIFT : vocabulary.VELOCITY] = False
        np.testing.assert_array_equal(row, playable)
        assert row[vocabulary.VELOCITY]
    _, tokens = decoder.decode(state, FILTERS, length=1)
    assert not vocabulary.is_shift(np.asarray(tokens)[[1, 3]]).any()


def test_what_was_heard_is_kept_and_a_piece_is_held_to_it(decoder):
    """Of a prompt in C alone, and of what is made after it, which at a great steadiness is mostly C."""
    a_note = [60, vocabulary.TIME_SHIFT + 20, vocabulary.NOTE_OFF + 60]
    prompt = np.array([vocabulary.START, vocabulary.VELOCITY + 15, *a_note * 400], np.int32)
    in_c = {}
    for steadiness in (0.0, 1.0):
        filters = SamplingOptions(top_p=1.0, steadiness=steadiness).filters()
        state, tokens = decoder.decode(start(decoder, [prompt] * 4, seeds=range(4)), filters, length=64)
        tokens = np.asarray(tokens)
        for row in range(4):
            whole = history_bias.after(np.concatenate([prompt, tokens[row]]))
            jax.tree.map(lambda of, all, row=row: np.testing.assert_array_equal(of, all[row]), whole, state.heard)
        notes = tokens[vocabulary.is_on(tokens)]
        assert len(notes) > 20
        in_c[steadiness] = np.mean(notes % 12 == 0)
    assert in_c[1.0] > 2 * in_c[0.0]


def test_another_budget_within_a_ring_compiles_nothing_anew(decoder):
    compiled: Any = decoding._decode
    counts = set()
    for latents, options in (
        (16, SamplingOptions()),
        (14, SamplingOptions(top_k=3)),
        (10, SamplingOptions(temperature=0.5, min_p=0.1)),
    ):
        state = start(decoder, [PIECE[:9]], latents=latents)
        _, tokens = decoder.decode(state, options.filters(), length=24)
        counts.add(compiled._cache_size())
        np.testing.assert_array_equal(np.asarray(tokens).shape, (1, 24))
    assert len(counts) == 1


def test_a_seed_for_each_prompt(decoder):
    with pytest.raises(ValueError, match="a seed for each prompt, got 2 prompts and 1 seeds"):
        start(decoder, [PIECE[:2], PIECE[:3]], seeds=[0])


def test_windows_by_hand():
    ages = jnp.arange(10)
    starts, active = decoding.window_starts(ages, jnp.full(10, 4), 2)
    never = int(decoding._NEVER)
    np.testing.assert_array_equal(starts[:, 0], [0, 0, 0, 0, 4, 4, 4, 4, 8, 8])
    np.testing.assert_array_equal(starts[:, 1], [never, never, 2, 2, 2, 2, 6, 6, 6, 6])
    np.testing.assert_array_equal(active, [0, 0, 0, 0, 1, 1, 0, 0, 1, 1])
    starts, active = decoding.window_starts(ages, jnp.full(10, 4), 1)
    np.testing.assert_array_equal(starts[:, 0], [0, 0, 0, 0, 1, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(active, 0)
