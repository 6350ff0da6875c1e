"""The optimizer: Muon on matrices, AdamW on the rest."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array
from optax import contrib

from music_ar.training.config import TrainingConfig


def build_optimizer(config: TrainingConfig, mesh: Mesh | None = None) -> optax.GradientTransformation:
    """Clipping, then Muon on the matrices and AdamW on the rest, or AdamW alone, at peak rates.

    Beside Muon, AdamW has Nesterov's momentum too, as Optax builds it. The devices of a mesh share Muon's matrices
    out.
    """
    if config.optimizer == "adamw":
        mesh = None  # to share a few operations an element would cost more than it saves
        decayed = {"matrices": True, "rest": False}
        rule = optax.adamw(config.learning_rate, b2=0.99, weight_decay=config.weight_decay, mask=decayed)
    else:
        rule = contrib.muon(
            config.matrix_learning_rate,
            weight_decay=config.weight_decay,
            adam_learning_rate=config.learning_rate,
            adam_b2=0.99,
            muon_weight_dimension_numbers=_muon_dimensions,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), _grouped(rule, mesh))


def _muon_dimensions(grouped: Any) -> Any:
    """Which axes of a leaf of `_grouped` Muon multiplies; None for what AdamW trains."""
    return {
        "matrices": {shape: contrib.MuonDimensionNumbers(1, 2) for shape in grouped["matrices"]},
        "rest": dict.fromkeys(grouped["rest"]),
    }


def _grouped(rule: optax.GradientTransformation, mesh: Mesh | None) -> optax.GradientTransformation:
    """Shows `rule` the parameters as {"matrices": {shape: [count, in, out]}, "rest": {path: leaf}}.

    Matrices of one shape are stacked, so that Muon's iteration runs as a few batched products, not as a
    thousand small ones, and each device of a mesh works on its share of every stack, filled up with zeros.
    Embedding and head are no matrices here: their rows are classes, not features.
    """

    def group(tree: Any) -> dict[str, dict[str, Array]]:
        matrices: dict[str, list[Array]] = {}
        rest: dict[str, Array] = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = jax.tree_util.keystr(path)
            if "kernel" in name and "head" not in name:
                matrices.setdefault(str(leaf.shape), []).append(leaf)
            else:
                rest[name] = leaf
        return {"matrices": {shape: jnp.stack(leaves) for shape, leaves in matrices.items()}, "rest": rest}

    def ungroup(grouped: Any, like: Any) -> Any:
        matrices = {shape: iter(stacked) for shape, stacked in grouped["matrices"].items()}
        leaves = [
            grouped["rest"][name]
            if (name := jax.tree_util.keystr(path)) in grouped["rest"]
            else next(matrices[str(leaf.shape)])
            for path, leaf in jax.tree_util.tree_leaves_with_path(like)
        ]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def share(tree: Any) -> Any:
        if mesh is None or mesh.size == 1:
            return tree
        devices, split = mesh.size, NamedSharding(mesh, PartitionSpec("data"))

        def shared(leaf: Array) -> Array:
            if leaf.ndim < 3:  # no stack
                return leaf
            filled = jnp.pad(leaf, ((0, -leaf.shape[0] % devices), (0, 0), (0, 0)))
            return jax.lax.with_sharding_constraint(filled, split)

        return jax.tree.map(shared, tree)

    def cut(tree: Any, like: Any) -> Any:
        return jax.tree.map(lambda leaf, full: leaf[: full.shape[0]] if full.ndim == 3 else leaf, tree, like)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        grouped = group(updates)
        new, new_state = rule.update(share(grouped), share(state), share(group(params)))
        return ungroup(cut(new, grouped), updates), cut(new_state, state)

    return optax.GradientTransformation(lambda params: rule.init(group(params)), update)
