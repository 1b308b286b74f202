"""Which implementation runs, and the one ``custom_vjp`` around all of them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from attnlab.implementations import IMPLEMENTATIONS
from attnlab.implementations.reference import attend as reference_attend
from attnlab.types import (
    Array,
    AttentionInputs,
    Implementation,
    Plan,
    PyTree,
    pytree,
    static,
    vary_like,
)

#: What the automatic choice may take, in order. ``jax_nn`` holds ``[T, S]`` and
#: ``reference`` too: they run only when asked for by name.
AUTOMATIC = ("tiled",)


def choose(
    inputs: AttentionInputs, name: str | None
) -> tuple[Implementation, dict[str, tuple[str, ...]]]:
    """The implementation to run, and why each other one was passed over.

    Raises:
        ValueError: if there is no implementation of that name.
        NotImplementedError: if the one asked for cannot take the inputs; it names
            every reason.
    """
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation: expected one of {', '.join(IMPLEMENTATIONS)} or None, "
            f"got {name!r}"
        )
    reasons = {n: i.unsupported(inputs) for n, i in IMPLEMENTATIONS.items()}
    if name is not None and reasons[name]:
        raise NotImplementedError(
            f"implementation={name!r} cannot take these inputs: "
            + "; ".join(reasons[name])
        )
    chosen = name
    if chosen is None:
        chosen = next((n for n in AUTOMATIC if not reasons[n]), "reference")
    passed = {}
    for other in IMPLEMENTATIONS:
        if other == chosen:
            continue
        if name is not None:
            why = (f"{name!r} was asked for",)
        elif other in AUTOMATIC:
            why = (f"{chosen!r} comes first",)
        else:
            why = ("it holds [T, S] in memory; it runs only when asked for",)
        passed[other] = reasons[other] or why
    return IMPLEMENTATIONS[chosen], passed


@pytree
class _Wanted:
    """Which leaves of the inputs need a gradient: structure, not data."""

    flags: tuple[bool, ...] = static()


def run(
    implementation: Implementation, inputs: AttentionInputs, plan: Plan
) -> tuple[Array, Array]:
    """Output ``[B, T, N, D]`` and log-sum-exp ``[B, T, N]``, differentiable."""
    if implementation.differentiable:
        return implementation.forward(inputs, plan)
    # Inside shard_map every input must vary alike: then JAX, not we, sums gradients.
    inputs, plan = jax.tree.map(
        lambda x: vary_like(x, inputs) if isinstance(x, jax.Array) else x,
        (inputs, plan),
    )
    fixed = plan if plan.is_static else None
    data = None if plan.is_static else plan

    @jax.custom_vjp
    def attend(inputs: AttentionInputs, data: Plan | None) -> tuple[Array, Array]:
        return _forward(implementation, fixed, inputs, data)

    def forward(inputs: Any, data: Any) -> tuple[tuple[Array, Array], PyTree]:
        wanted = _Wanted(tuple(x.perturbed for x in jax.tree.leaves(inputs)))
        inputs, data = jax.tree.map(lambda x: x.value, (inputs, data))
        output, lse = attend(inputs, data)
        output = checkpoint_name(output, "attnlab_output")
        lse = checkpoint_name(lse, "attnlab_lse")
        return (output, lse), (wanted, inputs, data, output, lse)

    def backward(saved: PyTree, cotangents: Any) -> tuple[PyTree, None]:
        wanted, inputs, data, output, lse = saved
        d_output, d_lse = cotangents
        if isinstance(d_output, SymbolicZero):
            d_output = jnp.zeros_like(output)
        if isinstance(d_lse, SymbolicZero):
            d_lse = None
        gradients = iter(
            _backward(
                implementation,
                fixed,
                wanted.flags,
                inputs,
                data,
                output,
                lse,
                d_output,
                d_lse,
            )
        )
        leaves, structure = jax.tree.flatten(inputs)
        leaves = [
            next(gradients) if on else None
            for on, _ in zip(wanted.flags, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, leaves), None

    attend.defvjp(forward, backward, symbolic_zeros=True)
    return attend(inputs, data)


def _forward(
    implementation: Implementation,
    fixed: Plan | None,
    inputs: AttentionInputs,
    data: Plan | None,
) -> tuple[Array, Array]:
    """The forward pass; a mapped axis folds into the batch."""

    @custom_vmap
    def call(inputs: AttentionInputs, data: Plan | None) -> tuple[Array, Array]:
        plan = fixed if data is None else data
        assert plan is not None
        return implementation.forward(inputs, plan)

    @call.def_vmap
    def fold(axis_size: int, batched: Any, inputs: Any, data: Any) -> tuple:
        batch = _batch_size(inputs, batched[0])
        inputs = _fold_inputs(axis_size, batch, batched[0], inputs)
        # Arrays of a plan belong together: all are spread out if one is.
        spread = any(jax.tree.leaves(batched[1]))
        data = _fold(axis_size, batch, batched[1], data, spread)
        result = _forward(implementation, fixed, inputs, data)
        result = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), result)
        return result, (True, True)

    return call(inputs, data)


def _backward(
    implementation: Implementation,
    fixed: Plan | None,
    flags: tuple[bool, ...],
    inputs: AttentionInputs,
    data: Plan | None,
    output: Array,
    lse: Array,
    d_output: Array,
    d_lse: Array | None,
) -> list[Array]:
    """Gradients of the wanted leaves; differentiable itself, by the reference."""

    @jax.custom_vjp
    def call(inputs: Any, data: Any, output: Any, lse: Any, *d_results: Any) -> list:
        return mapped(inputs, data, output, lse, *d_results)

    @custom_vmap
    def mapped(inputs: Any, data: Any, output: Any, lse: Any, *d_results: Any) -> list:
        plan: Any = fixed if data is None else data
        d_lse = d_results[1] if len(d_results) == 2 else None
        gradients = implementation.backward(
            inputs, plan, output, lse, d_results[0], d_lse, flags
        )
        return [g for g, on in zip(gradients, flags, strict=True) if on]

    @mapped.def_vmap
    def fold(
        axis_size: int,
        batched: Any,
        inputs: Any,
        data: Any,
        output: Any,
        lse: Any,
        *d_results: Any,
    ) -> tuple:
        batch = _batch_size(inputs, batched[0])
        before = [x for x, on in zip(jax.tree.leaves(inputs), flags, strict=True) if on]
        marks = [
            x for x, on in zip(jax.tree.leaves(batched[0]), flags, strict=True) if on
        ]
        inputs = _fold_inputs(axis_size, batch, batched[0], inputs, flags)
        # Arrays of a plan belong together: all are spread out if one is.
        spread = any(jax.tree.leaves(batched[1]))
        data = _fold(axis_size, batch, batched[1], data, spread)
        output, lse, d_output, *d_lse = (
            _fold(axis_size, batch, mark, x, True)
            for mark, x in zip(batched[2:], (output, lse, *d_results), strict=True)
        )
        found = _backward(
            implementation,
            fixed,
            flags,
            inputs,
            data,
            output,
            lse,
            d_output,
            d_lse[0] if d_lse else None,
        )
        result = []
        for folded, leaf, mark in zip(found, before, marks, strict=True):
            own = leaf.shape[1 if mark else 0]
            gradient = folded.reshape(axis_size, batch, *folded.shape[1:])
            result.append(gradient.sum(1, keepdims=True) if own < batch else gradient)
        return result, [True] * len(result)

    def forward(*args: Any) -> tuple[list, Any]:
        return call(*args), args

    def backward(saved: Any, cotangents: Any) -> tuple:
        inputs, data, output, lse, *d_results = saved
        leaves, structure = jax.tree.flatten(inputs)
        floats = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]

        def with_floats(values: Sequence[Array]) -> AttentionInputs:
            given = iter(values)
            merged = [
                next(given) if on else x for x, on in zip(leaves, floats, strict=True)
            ]
            return jax.tree.unflatten(structure, merged)

        def gradients(values: list[Array], d_results: list[Array]) -> list[Array]:
            def results(values: list[Array]) -> list[Array]:
                output, lse, _ = reference_attend(with_floats(values))
                return [output, lse][: len(d_results)]

            _, pull = jax.vjp(results, values)
            (found,) = pull(d_results)
            chosen = [
                on for on, is_float in zip(flags, floats, strict=True) if is_float
            ]
            return [g for g, on in zip(found, chosen, strict=True) if on]

        values = [x for x, on in zip(leaves, floats, strict=True) if on]
        _, pull = jax.vjp(gradients, values, list(d_results))
        d_values, d_d_results = pull(cotangents)
        given = iter(d_values)
        d_inputs = [next(given) if on else None for on in floats]
        return (jax.tree.unflatten(structure, d_inputs), None, None, None, *d_d_results)

    call.defvjp(forward, backward)
    d_results = (d_output,) if d_lse is None else (d_output, d_lse)
    return call(inputs, data, output, lse, *d_results)


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
