"""The forward pass: online softmax, without running maximum for bounded logits."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attnlab._src.implementations.pallas_tpu.blocks import Blocks
from attnlab._src.implementations.pallas_tpu.call import (
    Products,
    call,
    heads_first,
)
from attnlab._src.implementations.pallas_tpu.comparison import Given, comparison
from attnlab._src.implementations.pallas_tpu.logits import Part, Rules
from attnlab._src.implementations.pallas_tpu.operands import Place
from attnlab._src.implementations.pallas_tpu.steps import Step, by_query, run_if
from attnlab._src.implementations.schedule import Tiles
from attnlab._src.implementations.sizes import fit
from attnlab._src.masks.planning import plan_of
from attnlab._src.types import Array, AttentionInputs

#: Logits of at most this absolute value need no running maximum: exp of them, and sums
#: of 2^30 such terms times values of up to 10^7, are normal float32 numbers.
SAFE = 50.0


def forward(
    inputs: AttentionInputs, blocks: Blocks, interpret: bool | pltpu.InterpretParams
) -> tuple[Array, Array]:
    """Output ``[B, T, N, D]`` and log-sum-exp ``[B, T, N]``, float32."""
    compare = comparison(inputs)
    bound = compare.bound()
    if bound is None:
        return run_kernel(inputs, blocks, interpret, False)
    # False for NaN.
    return lax.cond(
        bound <= SAFE,
        lambda inputs: run_kernel(inputs, blocks, interpret, True),
        lambda inputs: run_kernel(inputs, blocks, interpret, False),
        inputs,
    )


def run_kernel(
    inputs: AttentionInputs,
    blocks: Blocks,
    interpret: bool | pltpu.InterpretParams,
    bounded: bool,
) -> tuple[Array, Array]:
    """See :func:`forward`; ``bounded``: no logit is greater than :data:`SAFE`."""
    s = inputs.sizes
    group = s.N // s.K
    plan = fit(plan_of(inputs, blocks[:2], cols=False), blocks[:2])
    tiles = Tiles(inputs, plan)
    steps = by_query(plan)
    rows, cols = tiles.nq * blocks.q, tiles.nk * blocks.k
    product = Products.of(inputs)

    def at(*index: Any) -> tuple[Place, Step]:
        ids, words = index[: 2 + len(steps.grid)], index[2 + len(steps.grid) :]
        step = steps.at(ids, words)
        return Place(ids[0], ids[1], step.outer, step.inner), step

    def place(*index: Any) -> Place:
        return at(*index)[0]

    rules = Rules(inputs, tiles, place)
    compare = comparison(inputs)
    arrays = [
        heads_first(compare.query, rows, transposed=True),
        heads_first(inputs.key.astype(compare.dtype), cols, transposed=False),
        heads_first(inputs.value, cols, transposed=True),
    ]
    specs = [
        pl.BlockSpec(
            (None, None, s.P, blocks.q),
            lambda *i: (place(*i).example, place(*i).head, 0, place(*i).row),
        ),
        pl.BlockSpec(
            (None, None, blocks.k, s.P),
            lambda *i: (place(*i).example, place(*i).head // group, place(*i).col, 0),
        ),
        pl.BlockSpec(
            (None, None, s.D, blocks.k),
            lambda *i: (place(*i).example, place(*i).head // group, 0, place(*i).col),
        ),
    ]
    params = compare.params(place)
    readers = rules.readers.readers
    more = [*params, *readers]
    lowest = jnp.finfo(jnp.float32).min

    def kernel(*refs: Any) -> None:
        taken = iter(refs)
        counts = len(steps.words), 3, len(params), len(readers), 5
        words, (q, k, v), own, given, results = (
            [next(taken) for _ in range(count)] for count in counts
        )
        output, lse, top, total, sums = results
        room = list(taken)
        ids = tuple(map(pl.program_id, range(2 + len(steps.grid))))
        where, step = at(*ids, *words)

        def start() -> None:
            top[...] = jnp.full_like(top, 0 if bounded else lowest)
            total[...] = jnp.zeros_like(total)
            sums[...] = jnp.zeros_like(sums)

        def logits(part: Part, masked: bool) -> Array:
            scale = rules.scale(part, given)
            z = compare.logits(Given(q, k, None, own, room, product, scale), part)
            z = rules.modify(z, part, given, rules.read_modifiers(part, given))
            return rules.hide(z, part, given) if masked else z

        def add(part: Part, z: Array) -> None:
            if bounded:
                p = jnp.exp(z)
            else:
                # ``new`` stays finite, so a hidden pair gives exp(-inf) = 0 exactly.
                new = jnp.maximum(top[...], z.max(0, keepdims=True))
                p = jnp.exp(z - new)
                shrink = jnp.exp(top[...] - new)
                top[...] = new
                total[...] *= shrink
                sums[...] *= shrink
            total[...] += p.reshape(part.size // 8, 8, blocks.q).sum(0)
            keep = rules.kept(part, given)
            if keep is not None:
                p = jnp.where(keep, p, 0)
            value = v[:, part.keys]
            sums[...] += product(value, p)

        def block(masked: bool) -> None:
            parts = [
                Part(where, first, blocks.chunk)
                for first in range(0, blocks.k, blocks.chunk)
            ]
            # Logits of the next part are computed while the current one is added.
            z = logits(parts[0], masked)
            for part, following in itertools.pairwise(parts):
                after = logits(following, masked)
                add(part, z)
                z = after
            add(parts[-1], z)

        def finish() -> None:
            found = total[...].sum(0, keepdims=True)
            alive = found != 0  # True for NaN, which so reaches the output
            safe = jnp.where(alive, found, 1)
            scaled = sums[...] / (safe * (1 - inputs.dropout_rate))
            output[...] = jnp.where(alive, scaled, 0)
            lse[...] = jnp.where(alive, top[...] + jnp.log(safe), -jnp.inf)

        run_if(step.first, start)
        if isinstance(step.masked, bool):
            run_if(step.active, lambda: block(step.masked))
        else:
            run_if(step.masked, lambda: block(True))
            run_if(step.active & ~step.masked, lambda: block(False))
        run_if(step.last, finish)

    f32 = jnp.float32
    output, lse = call(
        kernel,
        steps,
        (s.B, s.N),
        [*arrays, *(r.array for r in more)],
        [*specs, *(r.spec for r in more)],
        [
            jax.ShapeDtypeStruct((s.B, s.N, s.D, rows), f32),
            jax.ShapeDtypeStruct((s.B, s.N, 1, rows), f32),
        ],
        [
            pl.BlockSpec(
                (None, None, size, blocks.q),
                lambda *i: (place(*i).example, place(*i).head, 0, place(*i).row),
            )
            for size in (s.D, 1)
        ],
        [
            pltpu.VMEM((1, blocks.q), f32),
            pltpu.VMEM((8, blocks.q), f32),
            pltpu.VMEM((s.D, blocks.q), f32),
            *compare.room(blocks, "forward"),
        ],
        name=f"attnlab_forward_{'bounded' if bounded else 'online'}",
        interpret=interpret,
    )
    output = output[..., : s.T].transpose(0, 3, 1, 2)
    return output, lse[:, :, 0, : s.T].transpose(0, 2, 1)
