"""Attention whose sequence is sharded over the devices of a mesh."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple, Unpack

import jax
from jax.sharding import AbstractMesh, Mesh

from attnlab._src import arguments, placement
from attnlab._src.masks.bound import known_bound
from attnlab._src.ops.attention import attend, bound_of
from attnlab._src.ops.explain import canonical, describe
from attnlab._src.ops.sequence.costs import (
    Pairs,
    StrategyCost,
    best_of,
    costs_of,
    pairs_at,
)
from attnlab._src.ops.sequence.needs import Lengths
from attnlab._src.ops.validate import Arguments, Options, check_names
from attnlab._src.types import Array, ArrayLike, AttentionResult


def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    sequence: placement.Axes,
    mesh: Mesh | AbstractMesh | None = None,
    batch: placement.Axes = None,
    heads: placement.Axes = None,
    strategy: str | None = None,
    **options: Unpack[Options],
) -> Array:
    """As :func:`attnlab.attention`, for sequences that are sharded along their length.

    Devices send each other the keys that the plan of the mask names:

    * "exchange": each device gets the keys next to its own (a window), keys that many
      need go to all at once (anchors), and others from device to device;
    * "all_to_all": each device gets all positions of some heads, and returns its
      results;
    * "ring": the keys of each device are passed on from device to device;
    * "all_gather": each device gets all keys.

    Masks, modifiers, dropout and positions are those of one device. Lengths that the
    devices do not divide are padded. Data of a mask (documents, lengths, random blocks)
    that are constants of a traced program give exact lists of keys. Data that are
    arguments are unknown when the program is made: what its structure alone does not
    hide is sent, so combine documents with a window as long as the longest one.

    Args:
        query: ``[*batch, T, N, H]``, arrays of the whole sequence.
        key: ``[*batch, S, K, H]``.
        value: ``[*batch, S, K, D]``.
        sequence: the axis of the mesh that shards T and S, or several.
        mesh: of the devices; None: the one of ``jax.set_mesh``.
        batch: axes that shard the examples.
        heads: axes that shard the heads.
        strategy: one of the four; None: the one with the least product of bytes and
            imbalance, as :func:`attnlab.sharding.cost` shows it.
        **options: every keyword argument of :func:`attnlab.attention`.

    Raises:
        TypeError, ValueError: as :func:`attnlab.attention` and
            :func:`attnlab.sharding.use`; or if there are fewer queries or keys than
            shards.
        NotImplementedError: if the strategy cannot take the inputs; it says why.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from attnlab import masks, sharding
        >>> automatic = (jax.sharding.AxisType.Auto,)
        >>> mesh = jax.make_mesh((1,), ("sequence",), axis_types=automatic)
        >>> x = jnp.ones((2, 64, 4, 8))
        >>> options = dict(mesh=mesh, sequence="sequence")
        >>> mask = masks.sliding_window(16, 0)
        >>> sharding.attention(x, x, x, mask=mask, **options).shape
        (2, 64, 4, 8)

    References:
        Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers", 2023; Jacobs
        et al., "DeepSpeed Ulysses", 2023 (all_to_all).
    """
    given = sequence, batch, heads, strategy
    with _placed(query, key, mesh, *given):
        return attend(query, key, value, stats=False, **_known(options)).output


def attention_with_stats(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    sequence: placement.Axes,
    mesh: Mesh | AbstractMesh | None = None,
    batch: placement.Axes = None,
    heads: placement.Axes = None,
    strategy: str | None = None,
    **options: Unpack[Options],
) -> AttentionResult:
    """As :func:`attention`, with the log-sum-exp ``[*batch, T, N]``."""
    given = sequence, batch, heads, strategy
    with _placed(query, key, mesh, *given):
        return attend(query, key, value, stats=True, **_known(options))


class SequenceCost(NamedTuple):
    """The result of :func:`cost`; ``str`` of it is readable text.

    Attributes:
        inputs: a line that describes the inputs.
        shards: into how many shards the sequence is cut.
        chosen: the strategy that the automatic choice takes.
        strategies: the cost of each strategy, by its name.
    """

    inputs: str
    shards: int
    chosen: str
    strategies: dict[str, StrategyCost]

    def __str__(self) -> str:
        lines = [self.inputs, f"sequence in {self.shards} shards: {self.chosen}"]
        lines += [f"  {name}: {cost}" for name, cost in self.strategies.items()]
        return "\n".join(lines)


def cost(
    query: Any,
    key: Any,
    value: Any,
    *,
    sequence: placement.Axes,
    mesh: Mesh | AbstractMesh | None = None,
    batch: placement.Axes = None,
    heads: placement.Axes = None,
    **options: Unpack[Options],
) -> SequenceCost:
    """What :func:`attention` would send, for each strategy, and who computes how much.

    Args:
        query: array or ``jax.ShapeDtypeStruct``, ``[*batch, T, N, H]``.
        key: ``[*batch, S, K, H]``.
        value: ``[*batch, S, K, D]``.
        sequence: as of :func:`attention`.
        mesh: as of :func:`attention`; an ``AbstractMesh`` needs no devices.
        batch: as of :func:`attention`.
        heads: as of :func:`attention`.
        **options: every keyword argument of :func:`attnlab.attention`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from attnlab import masks, sharding
        >>> mesh = jax.sharding.AbstractMesh((8,), ("sequence",))
        >>> x = jax.ShapeDtypeStruct((1, 65536, 4, 64), jnp.bfloat16)
        >>> mask = masks.sliding_window(1024, 0)
        >>> print(sharding.cost(x, x, x, mask=mask, mesh=mesh, sequence="sequence"))
        B=1, T=65536, S=65536, N=4, K=4, P=64, D=64; bfloat16; score ScaledDot; mask
        sliding_window(1024, 0)
        sequence in 8 shards: exchange
          exchange: 1,048,576 bytes forward, 1,048,576 backward; 9,216 keys at once;
          most work 1.01 x mean
          all_to_all: not possible: 4 query heads do not divide by 8 shards; 4 key heads
          do not divide by 8 shards
          ring: 8,388,608 bytes forward, 25,165,824 backward; 16,384 keys at once; most
          work 1.01 x mean
          all_gather: 58,720,256 bytes forward, 58,720,256 backward; 65,536 keys at
          once; most work 1.01 x mean
    """
    with _placed(query, key, mesh, sequence, batch, heads, None):
        args, _, inputs = canonical(query, key, value, _known(options))
        place: Any = placement.place()
        bound = bound_of(args, data_are_known=True)
        found = costs_of(inputs, place, bound, _pairs_given(args, place))
        shards = placement.shards_of(place)
        return SequenceCost(describe(args, inputs), shards, best_of(found), found)


def _pairs_given(args: Arguments, place: Any) -> Pairs | None:
    """Pairs of each shard where positions are given and known; else None."""
    query, key = map(arguments.values, (args.query_positions, args.key_positions))
    bound = known_bound(args.mask)
    if (
        query is None
        or key is None
        or query.ndim + key.ndim > 2
        or jax.tree.leaves(bound)
    ):
        return None
    shards = placement.shards_of(place)
    lengths = Lengths(shards, args.query.shape[-3], args.key.shape[-3])
    return pairs_at(bound, lengths, query, key)


def _known(options: Options) -> Options:
    check_names("sharding.attention", options)
    return options


@contextlib.contextmanager
def _placed(
    query: Any,
    key: Any,
    mesh: Mesh | AbstractMesh | None,
    sequence: placement.Axes,
    batch: placement.Axes,
    heads: placement.Axes,
    strategy: str | None,
) -> Iterator[None]:
    """:func:`placement.use`, where it must be possible to cut the sequence."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if isinstance(mesh, AbstractMesh) and mesh.empty:
        raise ValueError(
            "mesh: expected a mesh, got None outside of jax.set_mesh; make one with "
            "jax.make_mesh"
        )
    if not placement.names_of(sequence):
        raise ValueError(
            f"sequence: expected an axis of the mesh ({', '.join(mesh.axis_names)}), "
            f"got {sequence!r}"
        )
    with placement.use(
        mesh, batch=batch, heads=heads, sequence=sequence, strategy=strategy
    ):
        place: Any = placement.place()
        shards = placement.shards_of(place)
        for name, x, letter in (("query", query, "T"), ("key", key, "S")):
            if len(x.shape) > 2 and x.shape[-3] < shards:
                raise ValueError(
                    f"{name}: length {letter}={x.shape[-3]} is less than the {shards} "
                    f"shards of {sequence!r}; shard the batch or the heads instead"
                )
        yield
