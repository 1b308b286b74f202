"""The one ``custom_vjp`` around all implementations: derivatives and mapped axes."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from attnlab.implementations.reference import attend as reference_attend
from attnlab.ops.dispatch import Asked, choose, one_pass
from attnlab.types import Array, AttentionInputs, PyTree, pytree, static, vary_like


@pytree
class _Wanted:
    """Which leaves of the inputs need a gradient: structure, not data."""

    flags: tuple[bool, ...] = static()


def run(inputs: AttentionInputs, name: str | None) -> tuple[Array, Array]:
    """Output ``[B, T, N, D]`` and log-sum-exp ``[B, T, N]``, differentiable.

    Args:
        inputs: the canonical record.
        name: the implementation asked for; None: the automatic choice.

    Raises:
        ValueError: if there is no implementation of that name.
        NotImplementedError: if the one asked for cannot take the inputs. On a platform
            on which it does not run, lowering raises it.
    """
    if name is not None:
        implementation, _ = choose(inputs, name, None)
        if implementation.differentiable:
            return implementation.forward(inputs)
    # Inside shard_map every input must vary alike: then JAX, not we, sums gradients.
    inputs = jax.tree.map(lambda x: vary_like(x, inputs), inputs)
    asked = Asked.now(name)

    @jax.custom_vjp
    def attend(inputs: AttentionInputs) -> tuple[Array, Array]:
        return _forward(asked, inputs)

    def forward(inputs: Any) -> tuple[tuple[Array, Array], PyTree]:
        wanted = _Wanted(tuple(x.perturbed for x in jax.tree.leaves(inputs)))
        inputs = jax.tree.map(lambda x: x.value, inputs)
        output, lse = attend(inputs)
        output = checkpoint_name(output, "attnlab_output")
        lse = checkpoint_name(lse, "attnlab_lse")
        return (output, lse), (wanted, inputs, output, lse)

    def backward(saved: PyTree, cotangents: Any) -> tuple[PyTree]:
        wanted, inputs, output, lse = saved
        d_output, d_lse = cotangents
        if isinstance(d_output, SymbolicZero):
            d_output = jnp.zeros_like(output)
        if isinstance(d_lse, SymbolicZero):
            d_lse = None
        found = _backward(asked, wanted.flags, inputs, output, lse, d_output, d_lse)
        gradients = iter(found)
        leaves = [next(gradients) if on else None for on in wanted.flags]
        return (jax.tree.unflatten(jax.tree.structure(inputs), leaves),)

    attend.defvjp(forward, backward, symbolic_zeros=True)
    return attend(inputs)


def _forward(asked: Asked, inputs: AttentionInputs) -> tuple[Array, Array]:
    """The forward pass; a mapped axis folds into the batch."""

    @custom_vmap
    def call(inputs: AttentionInputs) -> tuple[Array, Array]:
        output, lse = one_pass(asked, None, inputs)
        return output, lse

    @call.def_vmap
    def fold(axis_size: int, batched: Any, inputs: Any) -> tuple:
        batch = _batch_size(inputs, batched[0])
        inputs = _fold_inputs(axis_size, batch, batched[0], inputs)
        result = _forward(asked, inputs)
        result = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), result)
        return result, (True, True)

    return call(inputs)


def _backward(
    asked: Asked,
    flags: tuple[bool, ...],
    inputs: AttentionInputs,
    output: Array,
    lse: Array,
    d_output: Array,
    d_lse: Array | None,
) -> list[Array]:
    """Gradients of the wanted leaves; differentiable itself, by the reference."""

    @jax.custom_vjp
    def call(*arguments: Any) -> list:
        return mapped(*arguments)

    @custom_vmap
    def mapped(*arguments: Any) -> list:
        return one_pass(asked, flags, *arguments)

    @mapped.def_vmap
    def fold(axis_size: int, batched: Any, inputs: Any, *arrays: Any) -> tuple:
        batch = _batch_size(inputs, batched[0])
        before = [x for x, on in zip(jax.tree.leaves(inputs), flags, strict=True) if on]
        marks = [
            x for x, on in zip(jax.tree.leaves(batched[0]), flags, strict=True) if on
        ]
        inputs = _fold_inputs(axis_size, batch, batched[0], inputs, flags)
        spread = [
            _fold(axis_size, batch, mark, x, True)
            for mark, x in zip(batched[1:], arrays, strict=True)
        ]
        found = _backward(asked, flags, inputs, *spread)
        result = []
        for folded, leaf, mark in zip(found, before, marks, strict=True):
            own = leaf.shape[1 if mark else 0]
            gradient = folded.reshape(axis_size, batch, *folded.shape[1:])
            result.append(gradient.sum(1, keepdims=True) if own < batch else gradient)
        return result, [True] * len(result)

    def forward(*arguments: Any) -> tuple[list, Any]:
        return call(*arguments), arguments

    def backward(saved: Any, cotangents: Any) -> tuple:
        inputs, _, _, *d_results = saved
        given = [d for d in d_results if d is not None]
        leaves, structure = jax.tree.flatten(inputs)
        floats = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]

        def with_floats(values: Sequence[Array]) -> AttentionInputs:
            merged = iter(values)
            merged = [
                next(merged) if on else x for x, on in zip(leaves, floats, strict=True)
            ]
            return jax.tree.unflatten(structure, merged)

        def gradients(values: list[Array], d_results: list[Array]) -> list[Array]:
            def results(values: list[Array]) -> list[Array]:
                output, lse, _ = reference_attend(with_floats(values))
                return [output, lse][: len(given)]

            _, pull = jax.vjp(results, values)
            (found,) = pull(d_results)
            chosen = [
                on for on, is_float in zip(flags, floats, strict=True) if is_float
            ]
            return [g for g, on in zip(found, chosen, strict=True) if on]

        values = [x for x, on in zip(leaves, floats, strict=True) if on]
        _, pull = jax.vjp(gradients, values, given)
        d_values, d_given = (iter(found) for found in pull(cotangents))
        d_inputs = [next(d_values) if on else None for on in floats]
        d_results = [None if d is None else next(d_given) for d in d_results]
        return (jax.tree.unflatten(structure, d_inputs), None, None, *d_results)

    call.defvjp(forward, backward)
    return call(inputs, output, lse, d_output, d_lse)


def _batch_size(inputs: AttentionInputs, batched: AttentionInputs) -> int:
    return inputs.query.shape[1 if batched.query else 0]


def _fold(
    axis_size: int, batch: int, batched: Any, tree: Any, spread: bool = False
) -> Any:
    """Folds a mapped leading axis into the batch axis behind it.

    Arrays that are not mapped stay shared where their batch axis is 1, unless
    ``spread`` says that they must have one entry for each folded example.
    """

    def one(mark: bool, x: Array) -> Array:
        if not mark and x.shape[0] == 1 and not spread:
            return x
        if not mark:
            x = jnp.broadcast_to(x, (axis_size, *x.shape))
        if x.shape[1] != batch:
            x = jnp.broadcast_to(x, (axis_size, batch, *x.shape[2:]))
        return x.reshape(axis_size * batch, *x.shape[2:])

    return jax.tree.map(one, batched, tree)


def _fold_inputs(
    axis_size: int,
    batch: int,
    batched: AttentionInputs,
    inputs: AttentionInputs,
    flags: tuple[bool, ...] | None = None,
) -> AttentionInputs:
    """``_fold`` for the record: arrays with a gradient, q, k and v are spread out."""
    marks, structure = jax.tree.flatten(batched)
    leaves = jax.tree.leaves(inputs)
    flags = (False,) * len(leaves) if flags is None else flags
    folded = [
        _fold(axis_size, batch, mark, leaf, on or place < 3)
        for place, (mark, leaf, on) in enumerate(zip(marks, leaves, flags, strict=True))
    ]
    return jax.tree.unflatten(structure, folded)
