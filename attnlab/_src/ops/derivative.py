"""The derivative of a pass: one rule and the same residuals for all implementations."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad
from jax.sharding import NamedSharding

from attnlab._src.implementations.deferred import apply_deferred
from attnlab._src.implementations.reference import attend as reference_attend
from attnlab._src.ops import batching as batching  # how the primitive is mapped
from attnlab._src.ops.choice import choose, symbolic_sizes
from attnlab._src.ops.primitive import Asked, attention_p, one_pass
from attnlab._src.ops.residuals import keep, with_inf
from attnlab._src.reverse import reverse_only
from attnlab._src.types import Array, AttentionInputs, PyTree, pytree, static
from attnlab._src.varying import vary_like

#: Ends the error of forward mode: "forward mode (...) of <this>".
_FORWARD_MODE = 'attention needs implementation="reference"'


@pytree
class Wanted:
    """Which leaves of the inputs need a gradient: structure, not data."""

    flags: tuple[bool, ...] = static()


def run(
    inputs: AttentionInputs, name: str | None, place: NamedSharding | None = None
) -> tuple[Array, Array]:
    """Output ``[B, T, N, D]`` and log-sum-exp ``[B, T, N]``, differentiable.

    Args:
        inputs: the canonical record.
        name: the implementation asked for; None: the automatic choice.
        place: of the query, ``[B, T, N]``; None: unknown.

    Raises:
        ValueError: if there is no implementation of that name.
        NotImplementedError: if the one asked for cannot take the inputs. On a platform
            on which it does not run, lowering raises it.
    """
    if name is not None or symbolic_sizes(inputs, "TS"):
        implementation = choose(inputs, name, None)
        if implementation.differentiable:
            output, lse = implementation.forward(apply_deferred(inputs))
            sees = ~jnp.isneginf(lse)
            return jnp.where(sees[..., None], output, 0), jnp.where(sees, lse, -jnp.inf)
    # Inside shard_map all must vary over the same axes: then JAX sums the gradients.
    inputs = jax.tree.map(
        lambda x: vary_like(x, inputs), reverse_only(inputs, _FORWARD_MODE)
    )
    output, lse = one_pass(Asked.now(name, place), None, inputs)
    return output, lse


def _differentiated(
    primals: Sequence[Array], tangents: Sequence[Any], *, asked: Asked, **static: Any
) -> tuple[Sequence[Array], Sequence[Any]]:
    """The derivative rule of the primitive: a forward pass that keeps residuals.

    They are kept here and not where attention is called, because here mapped axes are
    folded: keys that are not mapped have one gradient, not one for each example that
    JAX would have to sum.
    """
    moves = [not isinstance(x, ad.Zero) for x in tangents]

    def of_moving(*moving: Array) -> list[Array]:
        given = iter(moving)
        leaves = [
            next(given) if on else x for x, on in zip(primals, moves, strict=True)
        ]
        inputs: Any = jax.tree.unflatten(static["structure"], leaves)[0]
        return [*_with_backward(asked)(inputs)]

    moving = [x for x, on in zip(primals, moves, strict=True) if on]
    return jax.jvp(
        of_moving, moving, [x for x in tangents if not isinstance(x, ad.Zero)]
    )


ad.primitive_jvps[attention_p] = _differentiated


def _with_backward(asked: Asked) -> Callable[[AttentionInputs], tuple[Array, Array]]:
    """The forward pass with the backward pass as its derivative."""

    @jax.custom_vjp
    def attend(inputs: AttentionInputs) -> tuple[Array, Array]:
        output, lse = one_pass(asked, None, inputs)
        return output, lse

    def forward(inputs: Any) -> tuple[tuple[Array, Array], PyTree]:
        wanted = Wanted(tuple(x.perturbed for x in jax.tree.leaves(inputs)))
        inputs = jax.tree.map(lambda x: x.value, inputs)
        output, kept = keep(*one_pass(asked, None, inputs))
        return (output, with_inf(kept)), (wanted, inputs, output, kept)

    def backward(saved: PyTree, cotangents: Any) -> tuple[PyTree]:
        wanted, inputs, output, kept = saved
        results = results_and_cotangents(output, kept, cotangents)
        found = backward_pass(asked, wanted.flags, inputs, *results)
        gradients = iter(found)
        leaves = [next(gradients) if on else None for on in wanted.flags]
        return (jax.tree.unflatten(jax.tree.structure(inputs), leaves),)

    attend.defvjp(forward, backward, symbolic_zeros=True)
    return attend


def results_and_cotangents(
    output: Array, kept: Array, cotangents: Any
) -> tuple[Array, Array, Array, Array | None]:
    """What a backward pass reads beside the inputs.

    Args:
        output: of the forward pass.
        kept: its log-sum-exp, as :func:`keep` returns it.
        cotangents: of both, perhaps symbolic zeros.

    Returns:
        Output, log-sum-exp, and their cotangents; None for a symbolic zero of the
        latter.
    """
    lse, (d_output, d_lse) = with_inf(kept), cotangents
    # No gradient passes a query that sees nothing.
    sees = ~jnp.isneginf(lse)
    if isinstance(d_output, SymbolicZero):
        d_output = jnp.zeros_like(output)
    d_output = jnp.where(sees[..., None], d_output, 0)
    d_lse = None if isinstance(d_lse, SymbolicZero) else jnp.where(sees, d_lse, 0)
    return output, lse, d_output, d_lse


def backward_pass(
    asked: Asked,
    flags: tuple[bool, ...],
    inputs: AttentionInputs,
    output: Array,
    lse: Array,
    d_output: Array,
    d_lse: Array | None,
) -> list[Array]:
    """Gradients of the wanted leaves; the reference differentiates them once more."""

    @jax.custom_vjp
    def call(*arguments: Any) -> list:
        return one_pass(asked, flags, *arguments)

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
    return call(inputs, output, lse, *reverse_only((d_output, d_lse), _FORWARD_MODE))
