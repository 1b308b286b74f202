"""Attention whose sequence is sharded over the devices of a mesh."""

import contextlib
from collections.abc import Iterator
from typing import Any, Required, Unpack

import jax
from jax.sharding import AbstractMesh, Mesh

from attnlab._src import placement
from attnlab._src.ops.attention import attend
from attnlab._src.ops.explain import canonical
from attnlab._src.ops.mesh_cost import MeshCost, mesh_cost
from attnlab._src.ops.validate import Options, check_names
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
    with _placed(query, key, mesh, sequence, batch, heads, strategy):
        return attend(
            query, key, value, stats=False, **_known("attention", options)
        ).output


#: Arguments of :func:`attention` that are none of :func:`attnlab.attention`.
_NAMES = "mesh", "sequence", "batch", "heads", "strategy"


class Sharded(Options, total=False):
    """The keyword arguments of :func:`attention`, described there."""

    sequence: Required[placement.Axes]
    mesh: Mesh | AbstractMesh | None
    batch: placement.Axes
    heads: placement.Axes
    strategy: str | None


def attention_with_stats(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, **options: Unpack[Sharded]
) -> AttentionResult:
    """As :func:`attention`, with the log-sum-exp ``[*batch, T, N]``.

    Args:
        query: ``[*batch, T, N, H]``.
        key: ``[*batch, S, K, H]``.
        value: ``[*batch, S, K, D]``.
        **options: every keyword argument of :func:`attention`.
    """
    rest: Any = dict(options)
    given = [rest.pop(name, None) for name in _NAMES]
    with _placed(query, key, *given):
        return attend(
            query, key, value, stats=True, **_known("attention_with_stats", rest)
        )


def cost(
    query: ArrayLike | jax.ShapeDtypeStruct,
    key: ArrayLike | jax.ShapeDtypeStruct,
    value: ArrayLike | jax.ShapeDtypeStruct,
    *,
    sequence: placement.Axes = None,
    mesh: Mesh | AbstractMesh | None = None,
    batch: placement.Axes = None,
    heads: placement.Axes = None,
    **options: Unpack[Options],
) -> MeshCost:
    """What devices would send each other, for each strategy, and who computes what.

    ``print(attnlab.explain(...))`` shows it, too, within :func:`attnlab.sharding.use`.

    Args:
        query: array or ``jax.ShapeDtypeStruct``, ``[*batch, T, N, H]``.
        key: ``[*batch, S, K, H]``.
        value: ``[*batch, S, K, D]``.
        sequence: as of :func:`attention`; None: the sequence is not sharded.
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
        8 devices divide B by 1, T by 8, N by 1, K by 1
        keys reach queries by exchange
          exchange: 1,048,576 bytes forward, 1,048,576 backward; 9,216 keys at once;
          most work 1.01 x mean
          all_to_all: not possible: 4 query heads do not divide by 8 shards; 4 key heads
          do not divide by 8 shards
          ring: 8,388,608 bytes forward, 25,165,824 backward; 16,384 keys at once; most
          work 1.01 x mean
          all_gather: 58,720,256 bytes forward, 58,720,256 backward; 65,536 keys at
          once; most work 1.01 x mean
    """
    with _placed(query, key, mesh, sequence, batch, heads, None, needed=False):
        args, _, inputs = canonical(query, key, value, _known("cost", options))
        place: Any = placement.place()
        return mesh_cost(args, inputs, place)


def _known(caller: str, options: Options) -> Options:
    check_names(f"sharding.{caller}", options)
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
    needed: bool = True,
) -> Iterator[None]:
    """:func:`placement.use`, where it must be possible to cut the sequence."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if isinstance(mesh, AbstractMesh) and mesh.empty:
        raise ValueError(
            "mesh: expected a mesh, got None outside of jax.set_mesh; make one with "
            "jax.make_mesh"
        )
    if needed and not placement.names_of(sequence):
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
