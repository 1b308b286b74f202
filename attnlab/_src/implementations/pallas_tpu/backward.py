"""The backward pass: one kernel walks the plan's columns and sums all gradients.

Gradients of a block of keys are summed over its blocks of queries. Gradients of queries
stay in vector memory for a whole segment of queries, so each logit is computed once.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attnlab._src.implementations.pallas_tpu.blocks import Blocks
from attnlab._src.implementations.pallas_tpu.call import (
    NT,
    Products,
    call,
    heads_first,
)
from attnlab._src.implementations.pallas_tpu.comparison import Given, Sums, comparison
from attnlab._src.implementations.pallas_tpu.learned import (
    Layout,
    Window,
    like,
    of_parameter,
    window,
)
from attnlab._src.implementations.pallas_tpu.logits import Part, Rules
from attnlab._src.implementations.pallas_tpu.memory import bytes_needed, segment_of
from attnlab._src.implementations.pallas_tpu.operands import Place
from attnlab._src.implementations.pallas_tpu.steps import Step, by_key, run_if
from attnlab._src.implementations.schedule import Tiles
from attnlab._src.implementations.sizes import fit
from attnlab._src.implementations.tile import scaled
from attnlab._src.masks.planning import plan_of
from attnlab._src.types import Array, AttentionInputs, PyTree

f32 = jnp.float32

_LANES = 128


class Backward:
    """The backward pass of one call."""

    def __init__(
        self,
        inputs: AttentionInputs,
        wanted: Sequence[bool],
        blocks: Blocks,
        limit: int,
        interpret: bool | pltpu.InterpretParams,
    ):
        """Plans the pass.

        Args:
            inputs: the canonical record.
            wanted: which of its leaves need a gradient.
            blocks: block sizes.
            limit: bytes of vector memory that it may use.
            interpret: see ``pallas_call``.
        """
        self.inputs, self.wanted, self.blocks = inputs, wanted, blocks
        self.interpret = interpret
        structure = jax.tree.structure(inputs)
        self.want: AttentionInputs = jax.tree.unflatten(structure, list(wanted))
        s = inputs.sizes
        self.group = s.N // s.K
        plan = fit(plan_of(inputs, blocks[:2], cols=True), blocks[:2])
        self.tiles = Tiles(inputs, plan)
        self.segment = segment_of(inputs, blocks, limit)
        self.spare = max(limit - bytes_needed(inputs, blocks, "backward", limit), 0)
        self.segments = -(-self.tiles.nq // self.segment)
        self.steps = by_key(plan, self.group, self.segment)
        self.rows = self.segments * self.segment * blocks.q
        self.cols = self.tiles.nk * blocks.k
        self.product = Products.of(inputs)
        self.compare = comparison(inputs)
        self.rules = Rules(inputs, self.tiles, self.place)
        self.params = self.compare.params(self.place)
        self.learned, self.windows = self._windows()

    def at(self, *index: Any) -> tuple[int | Array, int | Array, Step]:
        """The example, the key head and the step at an index of the grid."""
        axes = 2 + len(self.steps.grid)
        return index[0], index[1], self.steps.at(index[:axes], index[axes:])

    def place(self, *index: Any) -> Place:
        """The blocks that are read at an index of the grid."""
        example, head, step = self.at(*index)
        head = head * self.group + step.member
        return Place(example, head, step.inner, step.outer)

    def _windows(self) -> tuple[list[int], list[Window]]:
        """Numbers of learned modifier operands, and windows for all learned gradients.

        The windows of modifier operands come first, then those of score parameters.
        """
        lanes = min(_LANES, self.blocks.q)
        self.layout = Layout(
            self.tiles, self.at, self.group, self.segments, self.segment, lanes
        )
        found = {
            number: window(leaf, self.layout)
            for leaf, on, number in zip(
                jax.tree.leaves(self.inputs.modifier_operands),
                jax.tree.leaves(self.want.modifier_operands),
                jax.tree.leaves(self.rules.modifiers),
                strict=True,
            )
            if on
        }
        shapes = self.compare.gradient_shapes(self.blocks)
        if not any(jax.tree.leaves(self.want.pair_params)):
            shapes = []
        params = [of_parameter(x, self.layout) for x in shapes]
        return list(found), [*found.values(), *params]

    def _by_query(self, length: int, across: bool) -> pl.BlockSpec:
        """Blocks of ``[B, N, queries, length]``; across: ``[.., length, queries]``."""

        def index(*index: Any) -> tuple[int | Array, ...]:
            at = self.place(*index)
            return at.example, at.head, *((0, at.row) if across else (at.row, 0))

        size = self.blocks.q
        shape = (length, size) if across else (size, length)
        return pl.BlockSpec((None, None, *shape), index)

    def _by_key(self, length: int, across: bool) -> pl.BlockSpec:
        """Blocks of ``[B, K, keys, length]``; across: ``[.., length, keys]``."""

        def index(*index: Any) -> tuple[int | Array, ...]:
            example, head, step = self.at(*index)
            end = (0, step.outer) if across else (step.outer, 0)
            return example, head, *end

        size = self.blocks.k
        shape = (length, size) if across else (size, length)
        return pl.BlockSpec((None, None, *shape), index)

    def _sides(
        self, output: Array, lse: Array, d_output: Array, d_lse: Array | None
    ) -> Iterator[tuple[Array, pl.BlockSpec]]:
        """Arrays along queries and keys, with their block specifications."""
        inputs, s = self.inputs, self.inputs.sizes
        rows, cols, across = self.rows, self.cols, self.compare.queries_across
        # For a row that sees nothing, or of padding: exp(logits - inf) = 0.
        shift = jnp.where(jnp.isneginf(lse), jnp.inf, lse)
        delta = (d_output.astype(f32) * output).sum(-1)
        if d_lse is not None:
            delta = delta - d_lse
        # Scale of dropout, applied once and not in every block.
        d_output = d_output.astype(f32) * (1 / (1 - inputs.dropout_rate))
        d_output = d_output.astype(self.product.dtype)

        def line(x: Array, fill: float) -> Array:
            """``[B, T, N] -> [B, N, 1, rows]``."""
            pad = [(0, 0), (0, rows - s.T), (0, 0)]
            x = jnp.pad(x, pad, constant_values=fill)
            return x.transpose(0, 2, 1)[:, :, None]

        key = inputs.key.astype(self.compare.dtype)
        # Padded with copies of the edge: a modifier's derivative may be infinite at 0.
        query, key_down, key_across = (
            heads_first(x, length, transposed=turned, padding="edge")
            for x, length, turned in (
                (self.compare.query, rows, across),
                (key, cols, False),
                (key, cols, True),
            )
        )
        yield query, self._by_query(s.P, across)
        yield heads_first(d_output, rows, transposed=False), self._by_query(s.D, False)
        yield line(shift, jnp.inf), self._by_query(1, True)
        yield line(delta, 0), self._by_query(1, True)
        yield key_down, self._by_key(s.P, False)
        yield key_across, self._by_key(s.P, True)
        value = heads_first(inputs.value, cols, transposed=False)
        yield value, self._by_key(s.D, False)

    def _results(self) -> Iterator[tuple[tuple[int, ...], pl.BlockSpec]]:
        """Shapes and block specifications of the gradients of query, key and value."""
        s, blocks, group = self.inputs.sizes, self.blocks, self.group
        size = self.segment * blocks.q
        lead = (s.B, s.K, self.segments)

        def segment(*index: Any) -> tuple[int | Array, ...]:
            example, head, step = self.at(*index)
            return example, head, step.segment, 0, 0, 0

        def column(*index: Any) -> tuple[int | Array, ...]:
            example, head, step = self.at(*index)
            return example, head, step.segment, step.outer, 0

        shape = (group, s.P, size)
        yield (*lead, *shape), pl.BlockSpec((None, None, None, *shape), segment)
        for length in (s.P, s.D):
            spec = pl.BlockSpec((None, None, None, blocks.k, length), column)
            yield (*lead, self.cols, length), spec

    def run(
        self, output: Array, lse: Array, d_output: Array, d_lse: Array | None
    ) -> list[Array | None]:
        """See ``Implementation.backward``."""
        s = self.inputs.sizes
        arrays, specs = zip(*self._sides(output, lse, d_output, d_lse), strict=True)
        readers = [*self.params, *self.rules.readers.readers]
        shapes, out_specs = zip(*self._results(), strict=True)
        windows = self.windows
        zeroed = [n for n, x in enumerate(windows) if x.zeroed]
        zeros = [jnp.zeros(windows[n].shape, f32) for n in zeroed]
        before = len(self.steps.words) + len(arrays) + len(readers)
        found = call(
            self._kernel,
            self.steps,
            (s.B, s.K),
            [*arrays, *(r.array for r in readers), *zeros],
            [
                *specs,
                *(r.spec for r in readers),
                *(pl.BlockSpec(memory_space=pl.ANY) for _ in zeros),
            ],
            [
                jax.ShapeDtypeStruct(x, f32)
                for x in [*shapes, *(w.shape for w in windows)]
            ],
            [*out_specs, *(w.spec for w in windows)],
            [
                pltpu.VMEM((s.P, self.blocks.q), f32),
                *(x for w in windows for x in w.scratch),
                *self.compare.room(self.blocks, "backward", self.spare),
            ],
            aliases={before + i: 3 + n for i, n in enumerate(zeroed)},
            name="attnlab_backward",
            interpret=self.interpret,
        )
        return self._finish(*found)

    def _finish(
        self, d_query: Array, d_key: Array, d_value: Array, *found: Array
    ) -> list[Array | None]:
        inputs, s = self.inputs, self.inputs.sizes
        # [B, K, segments, G, P, size] -> [B, T, N, P]
        d_query = d_query.transpose(0, 2, 5, 1, 3, 4).reshape(s.B, -1, s.N, s.P)

        def by_key(x: Array) -> Array:
            return x.sum(2)[:, :, : s.S].transpose(0, 2, 1, 3)

        finished = [w.finish(x) for w, x in zip(self.windows, found, strict=True)]
        params = finished[len(self.learned) :]
        d_modifiers = dict(zip(self.learned, finished, strict=False))

        def modifier(number: int, operand: Array) -> Array | None:
            found = d_modifiers.get(number)
            return None if found is None else like(found, operand)

        gradients: dict[str, PyTree] = {
            "query": scaled(inputs, d_query[:, : s.T], None),
            "key": by_key(d_key) * self.compare.factor,
            "value": by_key(d_value),
            "modifier_operands": jax.tree.map(
                modifier, self.rules.modifiers, inputs.modifier_operands
            ),
        }
        if params:
            made = self.compare.finish_gradients(params)
            gradients["pair_params"] = jax.tree.map(like, made, inputs.pair_params)
        each = inputs.gradients(**gradients)
        return [x if on else None for x, on in zip(each, self.wanted, strict=True)]

    def _kernel(self, *refs: Any) -> None:
        taken = iter(refs)

        def take(count: int) -> list[Any]:
            return [next(taken) for _ in range(count)]

        words = take(len(self.steps.words))
        sides, own = take(7), take(len(self.params))
        given = take(len(self.rules.readers.readers))
        take(sum(x.zeroed for x in self.windows))
        d_q, d_k, d_v = take(3)
        sums = take(len(self.windows))
        (d_block,) = take(1)
        scratch = [take(len(x.scratch)) for x in self.windows]
        axes = 2 + len(self.steps.grid)
        ids = *map(pl.program_id, range(axes)), *words
        *_, step = self.at(*ids)
        begins = step.fresh & (step.segment == 0)
        windows = list(zip(self.windows, sums, scratch, strict=True))
        block = _Block(
            self, step, self.place(*ids), sides, own, given, windows, list(taken)
        )

        def clear(*refs: Any) -> Callable[[], None]:
            def body() -> None:
                for ref in refs:
                    ref[...] = jnp.zeros_like(ref)

            return body

        run_if(step.fresh, clear(d_q))
        run_if(step.first, clear(d_k, d_v))
        for each, ref, more in windows:
            each.clear(step, begins, ref, *more)

        def add(masked: bool) -> None:
            d_block[...] = jnp.zeros_like(d_block)
            block.add(masked, d_block, d_k, d_v)
            # Added once per block, as its rows are known only at run time.
            d_q[step.member, :, self.layout.rows(step)] += d_block[...]

        if isinstance(step.masked, bool):
            run_if(step.active, lambda: add(step.masked))
        else:
            run_if(step.masked, lambda: add(True))
            run_if(step.active & ~step.masked, lambda: add(False))
        for each, ref, more in windows:
            each.close(step, ref, *more)


@dataclasses.dataclass
class _Block:
    """One block of logits inside the kernel.

    Attributes:
        backward: the pass.
        step: the step.
        place: indices of the block.
        sides: references to the arrays of ``Backward._sides``.
        own: references to the parameters of the score.
        given: references to the operands.
        windows: windows, with references to their sums and their scratch memory.
        room: references to the comparison's scratch memory.
    """

    backward: Backward
    step: Step
    place: Place
    sides: list[Any]
    own: list[Any]
    given: list[Any]
    windows: list[tuple[Window, Any, list[Any]]]
    room: list[Any]

    def add(self, masked: bool, d_q: Any, d_k: Any, d_v: Any) -> None:
        """Adds the block's part of every gradient."""
        blocks, product = self.backward.blocks, self.backward.product
        compare, rules = self.backward.compare, self.backward.rules
        q, d_o, shift, delta, k, k_across, v = self.sides
        sums = [ref for _, ref, _ in self.windows[len(self.backward.learned) :]]
        sums = [ref.at[self.step.member] for ref in sums]
        for first in range(0, blocks.k, blocks.chunk):
            part = Part(self.place, first, blocks.chunk)
            scale = rules.scale(part, self.given)
            given = Given(q, k, k_across, self.own, self.room, product, scale)
            z = compare.logits_again(given, part)
            z, pull = self._modified(part, z)
            if masked:
                z = rules.hide(z, part, self.given)
            p = jnp.exp(z - shift[...])
            d_p = product(v[part.keys, :], d_o[...], NT)
            dropped, keep = p, rules.kept(part, self.given)
            if keep is not None:
                d_p, dropped = jnp.where(keep, d_p, 0), jnp.where(keep, p, 0)
            d = pull(p * (d_p - delta[...]))
            if self.backward.want.value:
                d_v[part.keys, :] += product(dropped, d_o[...])
            compare.pull(d, given, part, Sums(d_q, d_k, sums))

    def _modified(self, part: Part, z: Array) -> tuple[Array, Callable]:
        """Modified logits, and the pullback, which also adds to the windows."""
        rules = self.backward.rules
        if not rules.inputs.modifiers:
            return z, lambda d: d
        # Operands are broadcast to the tile, so that their gradients are tiles.
        operands = jax.tree.map(
            lambda x: jnp.broadcast_to(x, z.shape),
            rules.read_modifiers(part, self.given),
        )
        z, unmodify = jax.vjp(
            lambda z, operands: rules.modify(z, part, self.given, operands), z, operands
        )

        def pull(d: Array) -> Array:
            hidden = d == 0
            d, d_operands = unmodify(d)
            numbers = jax.tree.leaves(rules.modifiers)
            # A modifier's derivative need not be finite at hidden pairs.
            d, d_operands = jax.tree.map(
                lambda x: jnp.where(hidden, 0, x), (d, d_operands)
            )
            found = dict(zip(numbers, jax.tree.leaves(d_operands), strict=True))
            learned = zip(self.backward.learned, self.windows, strict=False)
            for number, (each, ref, more) in learned:
                each.add(self.step, part, found[number], ref, *more)
            return d

        return z, pull
