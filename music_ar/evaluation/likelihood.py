"""How well a model predicts real music: negative log-likelihood (NLL) in nats per token, note and second."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.multihost_utils import process_allgather
from jaxtyping import Array, Float, Int32, Integer

from music_ar.decoding.interface import AnyDecoder
from music_ar.decoding.windows import WindowMode
from music_ar.evaluation.memory import windows_at_once
from music_ar.evaluation.windows import Window, batch_windows, check_pieces, cut_windows
from music_ar.model.config import ModelConfig
from music_ar.model.perceiver_ar import PerceiverAR
from music_ar.tokens import codec, vocabulary
from music_ar.training.losses import token_nll

TOKEN_TYPES = ("note-on", "note-off", "time shift", "velocity", "end")
TYPE_OF_TOKEN = np.searchsorted(vocabulary.TYPE_STARTS, np.arange(vocabulary.INFILL_VOCABULARY_SIZE), side="right")
"""Index into `TOKEN_TYPES` of each token of the largest vocabulary; "end" is all control tokens."""

_FORCED_LENGTH = 256  # tokens per compiled call of `score_decoding`; pieces are padded to a multiple of it
_BATCHES_AHEAD = 2  # batches that the device works on while earlier results are fetched


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """Negative log-likelihood of pieces, each predicted independently from its start.

    Attributes:
        nll: total, in nats.
        tokens: number of targets: the events and the end of each piece, each scored once.
        notes: number of note-ons among them.
        seconds: length of the music.
        mean_layers: self-attention layers that a token ran through on average; None if it was not counted.
    """

    nll: float
    tokens: int
    notes: int
    seconds: float
    mean_layers: float | None = None

    @classmethod
    def of(cls, nll: float, pieces: Sequence[Integer[np.ndarray, " _"]]) -> "Score":
        """Return the score of whole pieces, each scored from its first token, whose total NLL is `nll`."""
        return cls(
            nll=nll,
            tokens=sum(len(piece) - 1 for piece in pieces),
            notes=sum(int((piece < vocabulary.NOTE_OFF).sum()) for piece in pieces),
            seconds=sum(float(codec.event_steps(piece)[-1]) for piece in pieces) / vocabulary.STEPS_PER_SECOND,
        )

    @property
    def nats_per_token(self) -> float:
        """The number that papers report; it depends on the vocabulary."""
        return self.nll / self.tokens

    def metrics(self) -> dict[str, float | int]:
        """Return the metrics of `metrics.json`."""
        return {
            "nats_per_token": self.nats_per_token,
            "nats_per_note": self.nll / max(self.notes, 1),
            "nats_per_second": self.nll / max(self.seconds, 1e-9),
            "tokens": self.tokens,
            "notes": self.notes,
            "seconds": self.seconds,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """Sizes of the windows in which pieces are scored.

    A window of `context` inputs ends every `stride` targets, and of its `latents` predictions the last `stride` are
    scored. So each target has at least context - stride inputs before it (as far as the piece has them), and latents -
    stride latents.

    Attributes:
        context: inputs per window, M; default: `ModelConfig.window`. Memory is the only limit; a model with retrieval
            attends to the last `ModelConfig.context` of them.
        latents: latents per window, N; default: those that the model was trained with. At least `stride`.
        stride: targets between the ends of windows; a smaller stride is slower and gives each target more context.
        batch_size: windows per forward pass; fewer if they do not fit in memory.
    """

    context: int | None = None
    latents: int | None = None
    stride: int = 512
    batch_size: int = 32

    def sizes(self, model: ModelConfig) -> tuple[int, int]:
        """Return (M, N) for a model.

        Raises:
            ValueError: the sizes do not fit together.
        """
        context = model.window if self.context is None else self.context
        attended = model.attended(context)
        latents = min(model.latents, attended) if self.latents is None else self.latents
        if not 1 <= self.stride <= latents <= attended:
            raise ValueError(
                "expected 1 <= stride <= latents <= inputs that attention reads, with a context of "
                f"{context}; got {self.stride}, {latents}, {attended}"
            )
        return context, latents


class WindowScorer:
    """A model that scores batches of windows, one after another.

    Args:
        model: the model.
    """

    def __init__(self, model: PerceiverAR):
        self._graph, self._params = nnx.split(model)

    def __call__(self, batch: "WindowBatch") -> Array:
        """The NLL of the last S targets of each window, at each temperature, [C, B, S]; it may not be computed yet."""
        temperatures_C = np.asarray(batch.temperatures, np.float32)
        return _window_nll(self._graph, self._params, batch.tokens, temperatures_C, batch.latents, batch.stride)

    def map(self, batches: "Iterable[WindowBatch]") -> "Iterator[tuple[WindowBatch, Float[np.ndarray, 'C B S']]]":
        """Each batch with its result."""
        return _computed_ahead((batch, self(batch)) for batch in batches)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class WindowBatch:
    """Windows to score in one forward pass.

    Attributes:
        windows: where they are.
        tokens: [B, M + 1], as `batch_windows` yields them.
        temperatures: as for `score_tokens`.
        latents: latents per window, N.
        stride: number of last targets, S, whose NLL is wanted.
    """

    windows: Sequence[Window]
    tokens: Int32[np.ndarray, "B _"]
    temperatures: tuple[float, ...]
    latents: int
    stride: int


@runtime_checkable
class ScoresWindows(Protocol):
    """A model somewhere else, such as on the workers of a cluster, that scores batches of windows."""

    config: ModelConfig

    def map(self, batches: Iterable[WindowBatch]) -> "Iterator[tuple[WindowBatch, Float[np.ndarray, 'C B S']]]":
        """Each batch with its result, in any order."""
        ...


def score(
    model: PerceiverAR | ScoresWindows,
    pieces: Sequence[Integer[np.ndarray, " _"]],
    config: ScoringConfig | None = None,
    *,
    on_progress: Callable[[float], None] | None = None,
) -> Score:
    """Score every token of every piece once; arguments and errors as in `score_tokens`.

    Raises:
        ValueError: also if the model is not one of music; `score_tokens` takes all.
    """
    if not model.config.is_music:
        raise ValueError("a score has notes and seconds of music; for another vocabulary, use `score_tokens`")
    nll = score_tokens(model, pieces, config, on_progress=on_progress)
    return Score.of(math.fsum(float(of_piece.sum(dtype=np.float64)) for of_piece in nll), pieces)


def quick_nll(model: PerceiverAR, pieces: Sequence[Integer[np.ndarray, " T"]]) -> float:
    """Return a quick NLL in nats per token, to monitor a run; of many processes, each scores its share of the pieces.

    Every token counts once, but windows do not overlap, so some tokens have few latents before them: `music-ar
    evaluate` reports a lower NLL.
    """
    config = ScoringConfig(stride=model.config.latents)
    if jax.process_count() == 1:
        return score(model, pieces, config).nats_per_token
    share = pieces[jax.process_index() :: jax.process_count()]
    found = score(model, share, config) if share else None
    sums = np.array([found.nll, found.tokens] if found else [0.0, 0.0])
    nll, tokens = np.asarray(process_allgather(sums), np.float64).sum(axis=0)
    return float(nll / tokens)


def score_tokens(
    model: PerceiverAR | ScoresWindows,
    pieces: Sequence[Integer[np.ndarray, " _"]],
    config: ScoringConfig | None = None,
    *,
    last: Sequence[int] | None = None,
    temperatures: Sequence[float] = (1.0,),
    on_progress: Callable[[float], None] | None = None,
) -> list[Float[np.ndarray, "C _"]]:
    """Return the NLL of each token of each piece, in nats.

    Args:
        model: the model, here or elsewhere.
        pieces: token arrays, each from `vocabulary.START` to `vocabulary.END`; any sequences for a model with a
            vocabulary of its own.
        config: sizes of the windows; default: `ScoringConfig()`.
        last: for each piece, how many of its last tokens to score; default: all but the first.
        temperatures: C numbers above 0; the logits are divided by each in turn.
        on_progress: called with the fraction that is done.

    Returns:
        For each piece one row per temperature and one column per scored token.

    Raises:
        ValueError: the sizes do not fit together, there are no pieces, or one is shorter than a start and an end.
        ScoringError: a window does not fit in memory.
    """
    config = config or ScoringConfig()
    context, latents = config.sizes(model.config)
    check_pieces(pieces, model.config)
    counts = [len(piece) - 1 for piece in pieces] if last is None else last
    nll = [np.zeros((len(temperatures), count), np.float32) for count in counts]
    windows = cut_windows(pieces, counts, config.stride)
    batch_size = min(config.batch_size, len(windows))
    if isinstance(model, PerceiverAR):
        batch_size = windows_at_once(model.config, model.compute, context, latents, batch_size)
    batches = (
        WindowBatch(
            windows=batch, tokens=tokens, temperatures=tuple(temperatures), latents=latents, stride=config.stride
        )
        for batch, tokens in batch_windows(pieces, windows, context, batch_size, model.config.pad)
    )
    scorer, done = WindowScorer(model) if isinstance(model, PerceiverAR) else model, 0
    for batch, nll_CxBxS in scorer.map(batches):
        for number, window in enumerate(batch.windows):
            stop = window.end - (len(pieces[window.piece]) - 1) + counts[window.piece]
            found_CxS = nll_CxBxS[:, number, config.stride - window.targets :]
            nll[window.piece][:, stop - window.targets : stop] = found_CxS
        done += len(batch.windows)
        if on_progress is not None:
            on_progress(done / len(windows))
    return nll


def _computed_ahead(
    results: Iterator[tuple[WindowBatch, Array]],
) -> Iterator[tuple[WindowBatch, Float[np.ndarray, "C B S"]]]:
    """Fetch results from the device while it computes the next ones."""
    waiting: collections.deque[tuple[WindowBatch, Array]] = collections.deque()
    for result in results:
        waiting.append(result)
        if len(waiting) > _BATCHES_AHEAD:
            batch, nll = waiting.popleft()
            yield batch, np.asarray(nll)
    for batch, nll in waiting:
        yield batch, np.asarray(nll)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _window_nll(
    graph: nnx.GraphDef[PerceiverAR], params: nnx.State, tokens_BxM1: Array, temperatures_C: Array, N: int, S: int
) -> Float[Array, "C B S"]:
    """Return the NLL of the last S targets of each window, at each temperature."""
    logits_BxSxV = nnx.merge(graph, params)(tokens_BxM1[:, :-1], latents=N)[:, -S:]
    return jax.lax.map(
        lambda temperature: token_nll(logits_BxSxV / temperature.reshape(1, 1, 1), tokens_BxM1[:, -S:]), temperatures_C
    )


def score_by_type(
    nll: Sequence[Float[np.ndarray, " _"]], pieces: Sequence[Integer[np.ndarray, " _"]]
) -> dict[str, dict[str, float | int]]:
    """Return, for each token type that occurs, its number of tokens, NLL in nats per token, and share of the total NLL.

    Args:
        nll: of every token of each piece but its first, as `score_tokens` returns it for one temperature.
        pieces: token arrays.
    """
    type_of_target = TYPE_OF_TOKEN[np.concatenate([piece[1:] for piece in pieces])]
    nats = np.concatenate(nll).astype(np.float64)
    return {
        name: {
            "tokens": int(chosen.sum()),
            "nats_per_token": float(nats[chosen].mean()),
            "share": float(nats[chosen].sum() / nats.sum()),
        }
        for number, name in enumerate(TOKEN_TYPES)
        if (chosen := type_of_target == number).any()
    }


def score_decoding(
    decoder: AnyDecoder,
    pieces: Sequence[Integer[np.ndarray, " _"]],
    *,
    latents: int,
    layers: int | None = None,
    tolerance: float = 0.0,
    mode: WindowMode = "sliding",
    batch_size: int = 8,
) -> Score:
    """Score pieces through the caches that generation uses, token by token from each piece's start.

    This measures decoding with few latents and a rolling context, as `score` measures the model.

    Args:
        decoder: the model, ready to decode.
        pieces: token arrays, each beginning with `vocabulary.START`; they may be truncated.
        latents: number of latents.
        layers, tolerance: how many layers run, and when tokens leave early; see `AnyDecoder.start`.
        mode: how decoding continues once the window of latents is full; see `AnyDecoder.start`.
        batch_size: pieces at once.
    """
    nll, layers_run, steps = 0.0, 0, 0
    for first in range(0, len(pieces), batch_size):
        batch = pieces[first : first + batch_size]
        scored_B = np.array([len(piece) - 1 for piece in batch])
        longest = -(-scored_B.max() // _FORCED_LENGTH) * _FORCED_LENGTH
        targets_BxT = np.full((len(batch), longest), vocabulary.PAD, np.int32)
        for row, piece in zip(targets_BxT, batch, strict=True):
            row[: len(piece) - 1] = piece[1:]
            row[len(piece) - 1 : len(piece)] = vocabulary.END  # where a truncated piece is over, its row is, too
        starts = [piece[:1].astype(np.int32) for piece in batch]
        depth = {"layers": layers, "tolerance": tolerance}
        state = decoder.start(starts, latents=latents, seeds=[0] * len(batch), limit_steps=2**30, mode=mode, **depth)
        is_scored_BxT = np.arange(longest) < scored_B[:, None]
        for begin in range(0, longest, _FORCED_LENGTH):
            targets_BxF, is_scored_BxF = (x[:, begin : begin + _FORCED_LENGTH] for x in (targets_BxT, is_scored_BxT))
            state, logits_BxFxV = decoder.teacher_force(state, targets_BxF)
            nll_BxF = np.asarray(token_nll(jnp.asarray(logits_BxFxV), jnp.asarray(targets_BxF)))
            nll += float(nll_BxF[is_scored_BxF].sum())
        if state.layers_run_B is not None:
            layers_run += int(np.sum(state.layers_run_B))
            ended_B = np.argmax(targets_BxT == vocabulary.END, axis=1)
            steps += int(np.where((targets_BxT == vocabulary.END).any(axis=1), ended_B + 1, longest).sum())
    score = Score.of(nll, pieces)
    return dataclasses.replace(score, mean_layers=layers_run / steps if steps else None)
