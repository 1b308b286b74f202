"""How queries are sharded, where the program itself does not say it soon enough."""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_PLACE: contextvars.ContextVar[NamedSharding | None] = contextvars.ContextVar(
    "attnlab_place", default=None
)
#: A name of an axis of a mesh, or several, the major one first.
Axes = str | Sequence[str] | None


@contextlib.contextmanager
def use(
    mesh: Mesh, *, batch: Axes = None, heads: Axes = None, sequence: Axes = None
) -> Iterator[None]:
    """Within this, calls know along which axes of a mesh their queries are sharded.

    Two kinds of programs need it:

    * those for several TPUs, on meshes with automatic axes: there XLA partitions a
      program after its kernels are made;
    * those with dropout inside ``jax.shard_map``: a device must know which examples and
      heads it has, so that weights are dropped as on one device. Without it, every
      device drops the same weights of its shard.

    Enter it where the function is traced, for instance inside of what you give to
    ``jax.jit``: a program that was traced before does not change.

    Args:
        mesh: of the devices.
        batch: axes that shard the examples: the first axis of query, key and value.
        heads: axes that shard the query heads, and the key heads if they divide them.
        sequence: axes that shard the query positions.

    Raises:
        TypeError: if ``mesh`` is no mesh, or axes are not names.
        ValueError: if an axis is not one of the mesh's, or is named twice.

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
    if not isinstance(mesh, Mesh):
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
    spec = PartitionSpec(*(axes or None for axes in names.values()))
    token = _PLACE.set(NamedSharding(mesh, spec))
    try:
        yield
    finally:
        _PLACE.reset(token)


def names_of(axes: Axes) -> tuple[str, ...]:
    """The axes that an entry of a ``PartitionSpec`` names: none, one or several."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def first_of_shard(kind: str, size: int) -> Any:
    """The number of the first example or head of this device inside a ``shard_map``.

    Args:
        kind: "batch" or "heads".
        size: how many of them the device has.

    Returns:
        0 outside, and where :func:`use` does not tell the axes.
    """
    known = _PLACE.get()
    if known is None:
        return 0
    axes = names_of(known.spec[{"batch": 0, "heads": 2}[kind]])
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if not axes or not {*axes} <= {*manual}:
        return 0
    return lax.axis_index(axes) * size


def place() -> NamedSharding | None:
    """The sharding of queries ``[B, T, N]`` that :func:`use` tells; None: unknown."""
    return _PLACE.get()
