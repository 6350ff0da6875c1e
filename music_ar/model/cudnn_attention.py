"""cuDNN's fused attention, with the log-sum-exp of a larger whole in its gradient.

`jax.nn.dot_product_attention` offers cuDNN's kernels, but its gradient is that of the attention alone. The rules behind
it take the output and the log-sum-exp as residuals, so they can be given those of the whole (see `context_attention`).
They are private to JAX: this is the only module that uses them. Their arguments differ between versions and are passed
by name. Measured with JAX 0.11.2 (docs/results/long-context.md).
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jaxtyping import Array

from music_ar.model.context_attention import Gradients

_FORWARD: Callable[..., Any] = vars(cudnn)["_dot_product_attention_fwd_rule"]
_BACKWARD: Callable[..., Any] = vars(cudnn)["_dot_product_attention_bwd_rule"]


class CudnnAttention:
    """`AttentionKernel` by cuDNN; bfloat16 on NVIDIA GPUs."""

    def forward(self, q: Array, k: Array, v: Array, lengths_B: Array | None) -> tuple[Array, Array]:
        """See `AttentionKernel.forward`."""
        arguments = _inputs(q, k, v, lengths_B) | _options(q, lengths_B)
        (out, lse_BxHxN), _ = _by_name(_FORWARD, arguments)
        return out, lse_BxHxN

    def backward(
        self, q: Array, k: Array, v: Array, lengths_B: Array | None, whole: tuple[Array, Array], gradient: Array
    ) -> Gradients:
        """See `AttentionKernel.backward`."""
        out, lse_BxHxN = whole
        inputs = _inputs(q, k, v, lengths_B)
        taken = [inputs[name] for name in inspect.signature(_FORWARD).parameters if name in inputs]
        residuals = {"res": (*taken, lse_BxHxN, out), "grad_output": (gradient,)}
        q_gradient, k_gradient, v_gradient, *_ = _by_name(_BACKWARD, residuals | _options(q, lengths_B))
        return q_gradient, k_gradient, v_gradient


def _by_name(rule: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Call a rule with those arguments that it takes."""
    return rule(*(arguments[name] for name in inspect.signature(rule).parameters))


def _inputs(q: Array, k: Array, v: Array, lengths_B: Array | None) -> dict[str, Any]:
    """The arrays that the rules take; an empty one stands for none."""
    none = jnp.zeros(0, q.dtype)
    queries_B = none if lengths_B is None else jnp.full(q.shape[:1], q.shape[1], jnp.int32)
    return {
        "query": q,
        "key": k,
        "value": v,
        "bias": none,
        "q_seqlen": queries_B,
        "kv_seqlen": none if lengths_B is None else lengths_B.astype(jnp.int32),
        "q_offsets": none,
        "kv_offsets": none,
        "page_table_k": none,
        "page_table_v": none,
        "score_mod_args": (),
    }


def _options(q: Array, lengths_B: Array | None) -> dict[str, Any]:
    """The rules' other arguments."""
    return {
        "scale": q.shape[-1] ** -0.5,
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),
        "mask_type": cudnn.MaskType.CAUSAL if lengths_B is None else cudnn.MaskType.PADDING,
        "layout": cudnn.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
        "score_mod": None,
        "cudnn_version": cudnn.check_cudnn_version(),
        "return_residual": True,
        "is_training": True,
    }
