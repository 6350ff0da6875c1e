"""A linear layer of few rows with all that surrounds it in a block as one kernel, for NVIDIA GPUs (Pallas, Triton).

With one row to decode, a product with a matrix takes no longer than the small operations before and after it: the
normalisation of its input, squared ReLU, the sum with the stream. Here they are one with the product. RMSNorm divides
a row by one number, so the product can be taken first and divided afterwards, when all of the row has been seen.

Dimension key: X rows, I inputs, O outputs, C inputs and L outputs of a block.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

MOST_ROWS = 16
"""More rows are what ordinary products are for; Triton multiplies no fewer."""
_OUTPUTS, _MOST_INPUTS = 16, 256  # with more inputs at a time, registers are spilled
EPSILON = 1e-6  # of nnx.RMSNorm


def suits(kernel_IxO: Float[Array, "I O"]) -> bool:
    """Whether the sizes of a matrix are multiples of the least block."""
    return kernel_IxO.shape[0] % 16 == 0 and kernel_IxO.shape[1] % _OUTPUTS == 0


def linear(
    x_XxI: Float[Array, "X I"],
    kernel_IxO: Float[Array, "I O"],
    *,
    norm_scale_I: Float[Array, " I"] | None = None,
    squared_relu: bool = False,
    stream_XxO: Float[Array, "X O"] | None = None,
    interpret: bool | None = None,
) -> Float[Array, "X O"]:
    """The product of at most `MOST_ROWS` rows with a matrix, in the type of `x`; sums in float32.

    Args:
        x_XxI: rows.
        kernel_IxO: the matrix.
        norm_scale_I: the rows go through RMSNorm with these scales first.
        squared_relu: the outputs go through squared ReLU.
        stream_XxO: what the outputs are added to.
        interpret: whether to run as ordinary operations, for tests. Default: where there is no GPU.
    """
    inputs, outputs = kernel_IxO.shape
    block = min(_MOST_INPUTS, inputs & -inputs)
    optional = [None if norm_scale_I is None else norm_scale_I[None], stream_XxO]
    return pl.pallas_call(
        functools.partial(
            _kernel, block=block, squared_relu=squared_relu, given=[each is not None for each in optional]
        ),
        out_shape=jax.ShapeDtypeStruct((x_XxI.shape[0], outputs), x_XxI.dtype),
        grid=(outputs // _OUTPUTS,),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpreted() if interpret is None else interpret,
        name="decode_linear",
    )(x_XxI, kernel_IxO, *(each for each in optional if each is not None))


def _kernel(x_ref: Any, kernel_ref: Any, *refs: Any, block: int, squared_relu: bool, given: list[bool]) -> None:
    """The program of some outputs. Rows beyond the last are the last once more."""
    *optional, y_ref = refs
    scale_ref = optional.pop(0) if given[0] else None
    stream_ref = optional.pop(0) if given[1] else None
    rows, inputs = x_ref.shape
    row_Xx1 = jnp.minimum(numbers(MOST_ROWS), rows - 1)[:, None]
    first_output = pl.program_id(0) * _OUTPUTS
    output_1xL = first_output + numbers(_OUTPUTS)[None]

    def add_block(index: Array | int, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        y_XxL, squares_X = sums
        input_1xC = index * block + numbers(block)[None]
        x_XxC = x_ref[row_Xx1, input_1xC].astype(jnp.float32)
        squares_X += jnp.sum(x_XxC * x_XxC, axis=1)
        if scale_ref is not None:
            x_XxC *= scale_ref[jnp.zeros_like(input_1xC), input_1xC].astype(jnp.float32)
        kernel_CxL = kernel_ref[pl.ds(index * block, block), pl.ds(first_output, _OUTPUTS)]
        y_XxL += jax.lax.dot_general(
            x_XxC.astype(kernel_ref.dtype),
            kernel_CxL,
            (((1,), (0,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        return y_XxL, squares_X

    sums = (jnp.zeros((MOST_ROWS, _OUTPUTS), jnp.float32), jnp.zeros(MOST_ROWS, jnp.float32))
    y_XxL, squares_X = add_block(0, sums) if block == inputs else jax.lax.fori_loop(0, inputs // block, add_block, sums)
    if scale_ref is not None:
        y_XxL *= jax.lax.rsqrt(squares_X / inputs + EPSILON)[:, None]
    if squared_relu:
        y_XxL = jnp.square(jnp.maximum(y_XxL, 0.0))
    if stream_ref is not None:
        y_XxL += stream_ref[row_Xx1, output_1xL].astype(jnp.float32)
    y_ref[row_Xx1, output_1xL] = y_XxL.astype(y_ref.dtype)


def interpreted() -> bool:
    """Whether kernels run as ordinary operations, for want of a GPU."""
    return jax.default_backend() != "gpu"


def numbers(count: int) -> Array:
    """0, 1, ... `count` - 1, inside a kernel."""
    return jax.lax.iota(jnp.int32, count)
