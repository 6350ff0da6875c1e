"""The optimizer: Muon for the hidden matrices, AdamW for all other parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array
from optax import contrib

from music_ar.model.attention import Matrix
from music_ar.training.config import RunConfig
from music_ar.training.mesh import parameter_spec


def build_optimizer(config: RunConfig, mesh: Mesh | None = None) -> optax.GradientTransformation:
    """Return gradient clipping, then Muon for each `Matrix` and AdamW for the rest, at peak learning rates.

    The optimizer takes states of `nnx.Variable`s, and chooses by their type. Optax's Muon gives its AdamW part Nesterov
    momentum too. The devices of a mesh share the work of Muon.
    """
    rule = contrib.muon(
        config.muon_learning_rate,
        weight_decay=config.weight_decay,
        adam_learning_rate=config.adamw_learning_rate,
        adam_b2=0.99,
        muon_weight_dimension_numbers=_muon_dimensions,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), _on_stacks(rule, mesh))


def _on_stacks(rule: optax.GradientTransformation, mesh: Mesh | None) -> optax.GradientTransformation:
    """Apply `rule` to parameters in the layout of `_stack`.

    Muon then runs as a few batched products, not as hundreds of small ones, and each device of a mesh works on its
    share of every stack.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        stacked = _stack(updates)
        new, new_state = rule.update(_shard(stacked, mesh), _shard(state, mesh), _shard(_stack(params), mesh))
        return _unstack(_unshard(new, stacked, mesh), updates), _unshard(new_state, state, mesh)

    return optax.GradientTransformation(lambda params: rule.init(_stack(params)), update)


def _stack(tree: Any) -> dict[str, dict[str, Array]]:
    """Return the parameters as {"matrices": {shape: [count, in, out]}, "rest": {path: array}}."""
    matrices: dict[str, list[Array]] = {}
    rest: dict[str, Array] = {}
    for path, variable in _variables(tree):
        if isinstance(variable, Matrix):
            matrices.setdefault(str(variable.shape), []).append(variable[...])
        else:
            rest[path] = variable[...]
    return {"matrices": {shape: jnp.stack(arrays) for shape, arrays in matrices.items()}, "rest": rest}


def _unstack(stacked: Any, like: Any) -> Any:
    """Invert `_stack`, into the structure of `like`."""
    matrices = {shape: iter(stack) for shape, stack in stacked["matrices"].items()}
    arrays = [
        next(matrices[str(variable.shape)]) if isinstance(variable, Matrix) else stacked["rest"][path]
        for path, variable in _variables(like)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), arrays)


def _variables(tree: Any) -> list[tuple[str, Any]]:
    """Return each variable of a state with its path, in the order of the state's leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return [(jax.tree_util.keystr(path), variable) for path, variable in leaves]


def _muon_dimensions(stacked: Any) -> Any:
    """Return which axes of each array of `_stack` Muon multiplies; None for those that AdamW trains."""
    return {
        "matrices": {shape: contrib.MuonDimensionNumbers(1, 2) for shape in stacked["matrices"]},
        "rest": dict.fromkeys(stacked["rest"]),
    }


def _shard(tree: Any, mesh: Mesh | None) -> Any:
    """Pad the stacks with zeros to a multiple of the devices, and give each device its share of the matrices.

    Stacks whose matrices are split over "fsdp" are first exchanged within that axis; the others then only cut.
    """
    if mesh is None or mesh.size == 1:
        return tree
    by_matrix = [PartitionSpec("fsdp"), PartitionSpec(("fsdp", "data", "sequence"))]

    def shard(array: Array) -> Array:
        if array.ndim < 3:  # not a stack
            return array
        return _constrain(jnp.pad(array, ((0, -array.shape[0] % mesh.size), (0, 0), (0, 0))), mesh, by_matrix)

    return jax.tree.map(shard, tree)


def _unshard(tree: Any, like: Any, mesh: Mesh | None) -> Any:
    """Invert `_shard`."""
    if mesh is None or mesh.size == 1:
        return tree

    def unshard(array: Array, full: Array) -> Array:
        if array.ndim < 3:
            return array
        within_matrix = parameter_spec(array.shape, mesh.shape["fsdp"])
        return _constrain(array, mesh, [PartitionSpec("fsdp"), within_matrix])[: full.shape[0]]

    return jax.tree.map(unshard, tree, like)


def _constrain(array: Array, mesh: Mesh, specs: list[PartitionSpec]) -> Array:
    """Split an array in one way after another: XLA exchanges as little as it can only if each is close to the next."""
    for spec in specs:
        array = jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec))
    return array
