"""How queries are sharded, where the program itself does not say it soon enough."""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

#: How keys reach queries that are sharded along their length; of those that cost the
#: same, the first is taken.
STRATEGIES = ("exchange", "all_to_all", "ring", "all_gather")
#: The strategy that costs least, known when arrays are.
AUTOMATIC = "automatic"


class Place(NamedTuple):
    """What :func:`use` tells.

    Attributes:
        sharding: of queries, ``[B, T, N]``.
        strategy: one of :data:`STRATEGIES` or :data:`AUTOMATIC`.
    """

    sharding: NamedSharding
    strategy: str


_PLACE: contextvars.ContextVar[Place | None] = contextvars.ContextVar(
    "attnlab_place", default=None
)
#: A name of an axis of a mesh, or several, the major one first.
Axes = str | Sequence[str] | None


@contextlib.contextmanager
def use(
    mesh: Mesh | AbstractMesh,
    *,
    batch: Axes = None,
    heads: Axes = None,
    sequence: Axes = None,
    strategy: str | None = None,
) -> Iterator[None]:
    """Within this, calls know along which axes of a mesh their arrays are sharded.

    Three kinds of programs need it:

    * those whose sequences are sharded: with ``sequence=``, devices send each other the
      keys that the plan of the mask names (see :func:`attnlab.sharding.attention`),
      and no others; without it, XLA gathers all keys;
    * those for several TPUs, on meshes with automatic axes: there XLA partitions a
      program after its kernels are made;
    * those inside ``jax.shard_map``: a device must know which examples and heads it
      has. Then weights are dropped as on one device (without it, every device drops the
      same weights of its shard), and sinks, arrays of modifiers and masks, and
      parameters of ``compare`` may have all heads: a device takes its own.

    Enter it where the function is traced, for instance inside of what you give to
    ``jax.jit``: a program that was traced before does not change.

    Args:
        mesh: of the devices.
        batch: axes that shard the examples: the first axis of query, key and value.
        heads: axes that shard the query heads, and the key heads if they divide them.
        sequence: axes that shard queries and keys along their length. Calls with fewer
            queries or keys than shards (a step of decoding) are computed as without.
        strategy: how keys reach the queries: "exchange", "all_to_all", "ring" or
            "all_gather"; None: the one that costs least.

    Raises:
        TypeError: if ``mesh`` is no mesh, or axes are not names.
        ValueError: if an axis is not one of the mesh's, or is named twice; or if there
            is no such strategy.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from attnlab import attention, sharding
        >>> automatic = (jax.sharding.AxisType.Auto,)
        >>> mesh = jax.make_mesh((1,), ("data",), axis_types=automatic)
        >>> @jax.jit
        ... def attend(x):
        ...     with sharding.use(mesh, batch="data"):
        ...         return attention(x, x, x)
        >>> attend(jnp.ones((2, 4, 1, 8))).shape
        (2, 4, 1, 8)
    """
    if not isinstance(mesh, (Mesh, AbstractMesh)):
        raise TypeError(
            f"mesh: expected a jax.sharding.Mesh, got {type(mesh).__name__}"
        )
    given = {"batch": batch, "sequence": sequence, "heads": heads}
    for name, axes in given.items():
        if not (axes is None or isinstance(axes, (str, Sequence))):
            raise TypeError(
                f"{name}: expected the name of an axis of the mesh, or several, got "
                f"{axes!r}"
            )
    names = {name: names_of(axes) for name, axes in given.items()}
    seen: set[str] = set()
    for name, axes in names.items():
        for axis in axes:
            if axis not in mesh.axis_names:
                known = ", ".join(map(str, mesh.axis_names))
                raise ValueError(
                    f"{name}: expected axes of the mesh ({known}), got {axis!r}"
                )
            if axis in seen:
                raise ValueError(f"{name}: axis {axis!r} is named twice")
            seen.add(axis)
    if strategy is not None and strategy not in STRATEGIES:
        raise ValueError(
            f"strategy: expected one of {', '.join(STRATEGIES)} or None, got "
            f"{strategy!r}"
        )
    spec = PartitionSpec(*(axes or None for axes in names.values()))
    token = _PLACE.set(Place(NamedSharding(mesh, spec), strategy or AUTOMATIC))
    try:
        yield
    finally:
        _PLACE.reset(token)


def names_of(axes: Axes) -> tuple[str, ...]:
    """The axes that an entry of a ``PartitionSpec`` names: none, one or several."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def _axes_here(kind: str) -> tuple[str, ...]:
    """The axes that divide "batch" or "heads", inside a ``shard_map`` over them."""
    known = _PLACE.get()
    if known is None:
        return ()
    axes = names_of(known.sharding.spec[{"batch": 0, "heads": 2}[kind]])
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return axes if {*axes} <= {*manual} else ()


def first_of_shard(kind: str, size: int) -> int | Array:
    """The number of the first example or head of this device inside a ``shard_map``.

    Args:
        kind: "batch" or "heads".
        size: how many of them the device has.

    Returns:
        0 outside, and where :func:`use` does not tell the axes.
    """
    axes = _axes_here(kind)
    return lax.axis_index(axes) * size if axes else 0


def of_own_heads(x: Any, heads: int, axis: int) -> Any:
    """Of an array of all heads the part of this device, inside a ``shard_map``.

    Args:
        x: any array; one without all heads along the axis is returned as it is.
        heads: how many the device has.
        axis: of the heads.
    """
    whole = all_heads(heads)
    if whole == heads or x.shape[axis] != whole:
        return x
    first = first_of_shard("heads", heads)
    return lax.dynamic_slice_in_dim(jnp.asarray(x), first, heads, axis)


def all_heads(heads: int) -> int:
    """How many heads all devices have, if each has ``heads``."""
    if not (axes := _axes_here("heads")):
        return heads
    mesh = jax.sharding.get_abstract_mesh()
    return heads * math.prod(mesh.shape[name] for name in axes)


def place() -> NamedSharding | None:
    """The sharding of queries ``[B, T, N]`` that :func:`use` tells; None: unknown."""
    known = _PLACE.get()
    return None if known is None else known.sharding


def strategy() -> str | None:
    """The strategy that :func:`use` tells; None: no sequence is sharded.

    Inside a ``shard_map`` the arrays are one device's, and it is None.
    """
    known = _PLACE.get()
    if known is None or jax.sharding.get_abstract_mesh().manual_axes:
        return None
    return known.strategy if shards_of(known.sharding) > 1 else None


def shards_of(sharding: NamedSharding) -> int:
    """Into how many shards ``[B, T, N]`` is cut along T."""
    shape = sharding.mesh.shape
    return math.prod(shape[axis] for axis in names_of(sharding.spec[1]))
