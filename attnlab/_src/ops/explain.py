"""Which implementation the automatic choice takes, and why it passed over the rest."""

import itertools
import math
from typing import NamedTuple, Unpack

import jax
import numpy as np

from attnlab._src import placement
from attnlab._src.exact import exactly
from attnlab._src.implementations.measured import measured
from attnlab._src.masks.base import Full, Mask, full
from attnlab._src.ops.choice import as_platform, choose, passed_over
from attnlab._src.ops.mesh_cost import MeshCost, mesh_cost
from attnlab._src.ops.prepare import prepare
from attnlab._src.ops.validate import Arguments, Options, Settings, check, check_names
from attnlab._src.types import ArrayLike, AttentionInputs, Implementation


class Explanation(NamedTuple):
    """The result of :func:`explain`; ``str`` of it is readable text.

    Attributes:
        inputs: a line that describes the inputs.
        platform: the platform that attention would run on.
        implementation: the name of the implementation that would run.
        block_sizes: (queries, keys) in a block of its plan, forward.
        candidates: the block sizes that it chose from, with their costs for this plan,
            in any unit; empty where a rule gives the sizes.
        passed_over: for each other implementation, every reason why it does not run.
        crossover: the share of full attention's time that the mask takes, from which
            length on it is faster, and the machine of the measurements; None if nothing
            comparable was measured.
        mesh: what each device has and what devices send, within
            :func:`attnlab.sharding.use`; else None.
        keys_listed: keys in the list of a query, where each query is computed alone,
            without a plan; else None.
    """

    inputs: str
    platform: str
    implementation: str
    block_sizes: tuple[int, int]
    candidates: dict[tuple[int, int], float]
    passed_over: dict[str, tuple[str, ...]]
    crossover: str | None = None
    mesh: MeshCost | None = None
    keys_listed: int | None = None

    def __str__(self) -> str:
        how = f"blocks of {self.block_sizes[0]} queries x {self.block_sizes[1]} keys"
        if self.keys_listed is not None:
            how = f"each query alone, with the {self.keys_listed} keys of its list"
        lines = [self.inputs, f"on {self.platform}: {self.implementation}, {how}"]
        chosen = self.candidates.get(self.block_sizes)
        others = [
            f"{q} x {k} ({cost / chosen:.2f}x)"
            for (q, k), cost in self.candidates.items()
            if chosen and (q, k) != self.block_sizes
        ]
        if others and self.keys_listed is None:
            lines.append(f"  costs of other blocks: {', '.join(others)}")
        if self.crossover is not None:
            lines.append(self.crossover)
        if self.mesh is not None:
            lines.append(str(self.mesh))
        for name, reasons in self.passed_over.items():
            lines.append(f"  not {name}: {'; '.join(reasons)}")
        return "\n".join(lines)


def canonical(
    query: ArrayLike | jax.ShapeDtypeStruct,
    key: ArrayLike | jax.ShapeDtypeStruct,
    value: ArrayLike | jax.ShapeDtypeStruct,
    options: Options,
) -> tuple[Arguments, Settings, AttentionInputs]:
    """What ``check`` returns, and the inputs of an implementation, as shapes."""
    args, settings = check(query, key, value, **options)
    return args, settings, jax.eval_shape(lambda a: prepare(a, settings), args)


def describe(args: Arguments, inputs: AttentionInputs) -> str:
    """One line that says what the inputs are."""
    s = inputs.sizes
    letters = ", ".join(f"{k}={v}" for k, v in s._asdict().items())
    score = type(args.score).__name__
    modifiers = [type(m).__name__ for m in args.modifiers]
    parts = [f"{letters}; {inputs.query.dtype}; score {score}; mask {args.mask!r}"]
    if modifiers:
        parts.append(f"modifiers {', '.join(modifiers)}")
    if args.sinks is not None:
        parts.append("sinks")
    if inputs.dropout_rate > 0:
        parts.append(f"dropout {inputs.dropout_rate:g}")
    if not inputs.index_positions:
        parts.append("positions given")
    return "; ".join(parts)


def crossover(
    mask: Mask, inputs: AttentionInputs, chosen: Implementation
) -> str | None:
    """How much time the mask saves, by measured times of the implementation.

    Returns:
        A line of text; None where the mask is full, where its arrays are traced, or
        where nothing like the inputs was measured: inner products in float32, without
        modifiers, T = S, positions that are slot numbers.
    """
    s, fits = inputs.sizes, measured().fits.get(chosen.name, {})
    known = all(
        isinstance(x, (np.ndarray, jax.Array)) and not isinstance(x, jax.core.Tracer)
        for x in jax.tree.leaves(mask)
    )
    alike = (
        inputs.score.is_inner_product
        and not inputs.modifiers
        and inputs.query.dtype == np.float32
        and inputs.index_positions
        and s.T == s.S > 0
        and chosen.keys_listed(inputs) is None
    )
    if not fits or exactly(mask, Full) or not known or not alike:
        return None
    blocks = chosen.block_sizes(inputs)

    def work(mask: Mask, length: int) -> tuple[float, float, float]:
        """How many queries, executed pairs (scaled to head size 64) and live blocks."""
        plan = mask.plan(length, block_size=blocks)
        live = np.asarray(chosen.blocks_executed(plan))
        count = float(live.sum()) * (s.B * s.N // math.prod(live.shape[:2]))
        size = (s.P + s.D) / 128 * plan.block_q * plan.block_k
        return float(s.B * s.N * length), count * size, count

    def shares(length: int) -> dict[str, float]:
        """The share of full attention's time, for each direction."""
        sparse, dense = work(mask, length), work(full(), length)
        return {d: f.seconds(*sparse) / f.seconds(*dense) for d, f in fits.items()}

    text = "share of full attention's time: about " + ", ".join(
        f"{share:.0%} {direction}" for direction, share in shares(s.T).items()
    )
    # The mask's arrays at another length are unknown.
    if not jax.tree.leaves(mask):
        shorter = [2**n for n in range(5, s.T.bit_length()) if 2**n < s.T]
        pays = list(
            itertools.takewhile(
                lambda length: max(shares(length).values()) < 0.95,
                (s.T, *reversed(shorter)),
            )
        )
        if pays:
            text += f"; faster from T = {pays[-1]:,} on"
    return f"{text} (fitted: {measured().where})"


def explain(
    query: ArrayLike | jax.ShapeDtypeStruct,
    key: ArrayLike | jax.ShapeDtypeStruct,
    value: ArrayLike | jax.ShapeDtypeStruct,
    *,
    platform: str | None = None,
    **options: Unpack[Options],
) -> Explanation:
    """Which implementation :func:`attnlab.attention` would run, and why.

    Args:
        query: array or ``jax.ShapeDtypeStruct``, ``[*batch, T, N, H]``.
        key: ``[*batch, S, K, H]``.
        value: ``[*batch, S, K, D]``.
        platform: "cpu", "cuda", "rocm", "gpu" (either of these) or "tpu"; the default
            backend's if not given.
        **options: every keyword argument of :func:`attnlab.attention`.

    Raises:
        NotImplementedError: as :func:`attnlab.attention` would.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from attnlab import explain, masks
        >>> x = jax.ShapeDtypeStruct((1, 4096, 8, 64), jnp.float32)
        >>> mask = masks.sliding_window(256, 256)
        >>> print(explain(x, x, x, mask=mask, platform="cuda"))  # doctest: +ELLIPSIS
        B=1, T=4096, S=4096, N=8, K=8, P=64, D=64; float32; score ScaledDot; mask
        sliding_window(256, 256)
        on cuda: batched, blocks of 128 queries x 128 keys
          not native: it runs on cpu, not on cuda...
          not tiled: 'batched' comes first...
          not jax_nn: it holds [T, S] in memory; it runs only when asked for
          not reference: it holds [T, S] in memory; it runs only when asked for
    """
    check_names("explain", options)
    args, settings, inputs = canonical(query, key, value, options)
    platform = as_platform(platform)
    name = settings.implementation
    chosen = choose(inputs, name, platform)
    place = placement.place()
    return Explanation(
        describe(args, inputs),
        platform,
        chosen.name,
        chosen.block_sizes(inputs),
        chosen.candidates(inputs),
        passed_over(inputs, name, platform),
        crossover(args.mask, inputs, chosen),
        None if place is None else mesh_cost(args, inputs, place),
        chosen.keys_listed(inputs),
    )
