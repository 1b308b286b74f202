"""What the devices of a compiled program send each other, from the program's text."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

_COLLECTIVE = re.compile(
    r" = (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
    r"(-start)?\("
)
_ARRAY = re.compile(r"\b([a-z]+)(\d*)[a-z\d]*\[([\d,]*)\]")
_HEAD = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_LOOP = re.compile(r"while\(.*body=%([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CALL = re.compile(r"(?:to_apply|calls|branch_computations)=\{?(%[\w.\-%, ]+)")


class Collective(NamedTuple):
    """One operation by which devices send arrays.

    Attributes:
        kind: "all-gather", "all-reduce", "all-to-all", "collective-permute" or
            "reduce-scatter".
        bytes: of its results on each device.
        times: how often it runs.
        is_async: whether the program starts it, computes, and waits for it later.
    """

    kind: str
    bytes: int
    times: int
    is_async: bool

    def received(self, devices: int) -> float:
        """Bytes that each of ``devices`` devices receives, in all runs.

        A device has a part of some results already; a sum moves its array twice.
        """
        parts = {
            "all-gather": (devices - 1) / devices,
            "all-reduce": 2 * (devices - 1) / devices,
            "all-to-all": (devices - 1) / devices,
            "collective-permute": 1.0,
            "reduce-scatter": devices - 1.0,
        }
        return self.times * parts[self.kind] * self.bytes


def collectives(compiled: Any) -> list[Collective]:
    """The collectives of a program that is compiled for several devices.

    Args:
        compiled: what ``jax.jit(f).lower(...).compile()`` returns.

    Raises:
        TypeError: if it is no compiled program.
        ValueError: if one runs in a loop whose length the program does not say.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from attnlab.bench import collectives
        >>> collectives(jax.jit(jnp.sum).lower(jnp.ones(8)).compile())
        []
    """
    if not hasattr(compiled, "as_text"):
        raise TypeError(
            "compiled: expected what jax.jit(f).lower(...).compile() returns, got "
            f"{type(compiled).__name__}"
        )
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in compiled.as_text().splitlines():
        if head := _HEAD.match(line):
            name = head[2]
            entry = name if head[1] else entry
            bodies[name] = []
        elif name:
            bodies[name].append(line)
    return [*_of(bodies, entry, 1)]


def _of(bodies: dict[str, list[str]], name: str, times: int) -> Iterator[Collective]:
    for line in bodies.get(name, ()):
        if sent := _COLLECTIVE.search(line):
            is_async = sent[3] is not None
            yield Collective(
                sent[2], _bytes(sent[1], sent[2], is_async), times, is_async
            )
        elif loop := _LOOP.search(line):
            inner = [*_of(bodies, loop[1], 1)]
            trips = _TRIPS.search(line)
            if inner and not trips:
                raise ValueError(f"compiled: {name} sends in a loop of unknown length")
            for each in inner:
                count = times * each.times * int(trips[1] if trips else 0)
                yield each._replace(times=count)
        elif called := _CALL.search(line):
            for other in called[1].replace("%", "").split(","):
                yield from _of(bodies, other.strip(), times)


def _bytes(shapes: str, kind: str, is_async: bool) -> int:
    each = [
        (int(width or 8) // 8 if name != "pred" else 1)
        * int(np.prod([int(n) for n in sizes.split(",") if n], dtype=np.int64))
        for name, width, sizes in _ARRAY.findall(shapes)
    ]
    if is_async and kind != "all-reduce":
        # Operands, as many results, and numbers for the hardware.
        rest = 2 * (len(each) // 2) if kind != "collective-permute" else len(each) - 2
        each = each[rest // 2 : rest]
    return sum(each)
