"""Keys that are passed around a ring of devices, forward and backward."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from attnlab._src.ops.choice import named
from attnlab._src.ops.derivative import (
    Wanted,
    backward_pass,
    results_and_cotangents,
    run,
)
from attnlab._src.ops.primitive import Asked
from attnlab._src.ops.residuals import keep, with_inf
from attnlab._src.ops.sequence.partial import Result, merged
from attnlab._src.ops.sequence.shards import Keys, Shards
from attnlab._src.types import Array, AttentionInputs, PyTree
from attnlab._src.varying import vary_like


def ring(
    inputs: AttentionInputs, shards: Shards, hops: int, name: str | None
) -> Result:
    """Each device sees the keys of one shard after the other.

    Memory holds two shards of keys at a time. The backward pass sends keys around once
    more, with their gradients; it needs the output and the log-sum-exp of all keys, and
    no partial result.

    Args:
        inputs: the record of this device.
        shards: of the sequence.
        hops: how often keys are passed on.
        name: the implementation asked for.

    References:
        Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers", 2023,
        section 3.
    """
    if name is not None and named(name).differentiable:
        return _forward(inputs, shards, hops, name)
    asked = Asked.now(name, None)

    @jax.custom_vjp
    def attend(inputs: AttentionInputs) -> Result:
        return _forward(inputs, shards, hops, name)

    def forward(inputs: Any) -> tuple[Result, PyTree]:
        wanted = Wanted(tuple(x.perturbed for x in jax.tree.leaves(inputs)))
        inputs = jax.tree.map(lambda x: x.value, inputs)
        output, kept = keep(*_forward(inputs, shards, hops, name))
        return (output, with_inf(kept)), (wanted, inputs, output, kept)

    def backward(saved: PyTree, cotangents: Any) -> tuple[PyTree]:
        wanted, inputs, output, kept = saved
        results = results_and_cotangents(output, kept, cotangents)
        found = _backward(inputs, shards, hops, asked, wanted.flags, results)
        return (found,)

    attend.defvjp(forward, backward, symbolic_zeros=True)
    return attend(jax.tree.map(lambda x: vary_like(x, inputs), inputs))


def _piece(
    inputs: AttentionInputs, keys: Keys, shards: Shards, step: Any
) -> AttentionInputs:
    """The record with the keys that a device has after some hops."""
    lengths = shards.lengths
    source = (shards.index - step) % lengths.count
    slots = source * lengths.keys + jnp.arange(lengths.keys, dtype=jnp.int32)
    return shards.with_keys(inputs, keys, slots, in_order=True)


def _forward(
    inputs: AttentionInputs, shards: Shards, hops: int, name: str | None
) -> Result:
    def attend(keys: Keys, step: Any) -> Result:
        return run(_piece(inputs, keys, shards, step), name)

    def pass_on(carry: tuple[Keys, Result], step: Array) -> tuple[Any, None]:
        keys, results = carry
        # Sent before the keys that are here are used: both can go on at once.
        following = shards.sent(keys, 1)
        return (following, merged([results, attend(keys, step)])), None

    own = shards.keys(inputs)
    if hops == 0:
        return attend(own, 0)
    following = shards.sent(own, 1)
    carry = following, attend(own, 0)
    steps = jnp.arange(1, hops, dtype=jnp.int32)
    (keys, results), _ = lax.scan(pass_on, carry, steps)
    return merged([results, attend(keys, hops)])


def _backward(
    inputs: AttentionInputs,
    shards: Shards,
    hops: int,
    asked: Asked,
    flags: Sequence[bool],
    results: tuple[Array, Array, Array, Array | None],
) -> AttentionInputs:
    """Gradients of the wanted leaves of the record; None for the others."""
    leaves, structure = jax.tree.flatten(inputs)
    own = shards.keys(inputs)
    travels = shards.travels(inputs)
    moves = [on for on, far in zip(flags, travels, strict=True) if far]
    stays = [on and not far for on, far in zip(flags, travels, strict=True)]

    def gradients(keys: Keys, step: Any) -> tuple[list[Array], list[Array]]:
        """Of the keys that are here, and of this device's other arrays."""

        def piece(moving: list[Array], staying: list[Array]) -> Any:
            given = iter(staying)
            local = [
                next(given) if on else x for x, on in zip(leaves, stays, strict=True)
            ]
            given = iter(moving)
            sent = [next(given) if on else x for x, on in zip(keys, moves, strict=True)]
            local = jax.tree.unflatten(structure, local)
            made = _piece(local, sent, shards, step)
            pairs = zip(jax.tree.leaves(made), flags, strict=True)
            return [x for x, on in pairs if on], made

        moving = [x for x, on in zip(keys, moves, strict=True) if on]
        staying = [x for x, on in zip(leaves, stays, strict=True) if on]
        _, pull, given = jax.vjp(piece, moving, staying, has_aux=True)
        return pull(backward_pass(asked, tuple(flags), given, *results))

    def add(some: list[Array], more: list[Array]) -> list[Array]:
        return [x + y for x, y in zip(some, more, strict=True)]

    def pass_on(carry: Any, step: Array) -> tuple[Any, None]:
        keys, d_keys, d_own = carry
        following = shards.sent(keys, 1)
        d_here, d_more = gradients(keys, step)
        d_keys = shards.sent(add(d_keys, d_here), 1)
        return (following, d_keys, add(d_own, d_more)), None

    if hops == 0:
        d_keys, d_own = gradients(own, 0)
    else:
        following = shards.sent(own, 1)
        d_keys, d_own = gradients(own, 0)
        carry = following, shards.sent(d_keys, 1), d_own
        steps = jnp.arange(1, hops, dtype=jnp.int32)
        (keys, d_keys, d_own), _ = lax.scan(pass_on, carry, steps)
        d_here, d_more = gradients(keys, hops)
        # Home again: the rest of the way around the ring.
        d_keys = shards.sent(add(d_keys, d_here), -hops)
        d_own = add(d_own, d_more)
    given_keys, given_own = iter(d_keys), iter(d_own)
    found = [
        (next(given_keys) if far else next(given_own)) if on else None
        for on, far in zip(flags, travels, strict=True)
    ]
    return jax.tree.unflatten(structure, found)
