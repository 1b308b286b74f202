"""The problems of ``attnlab static``: shapes and options of a call, its passes."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from attnlab._src.bench.cases import HIDDEN_SIZE, PAIRWISE, PATTERNS, SCORES, Spec
from attnlab._src.bench.expression import read_mask
from attnlab._src.implementations import IMPLEMENTATIONS
from attnlab._src.implementations.pallas_tpu import PallasTpu
from attnlab._src.implementations.pallas_tpu.blocks import Blocks, Entry
from attnlab._src.types import Array, PyTree


def problem(spec: Spec) -> tuple[tuple[jax.ShapeDtypeStruct, ...], dict[str, Any]]:
    """Shapes of query, key and value; and mask and score as options of the call.

    The pattern may also be an expression, see ``read_mask``.
    """
    sizes = [(spec.queries, spec.heads), *[(spec.length, spec.key_heads)] * 2]
    shapes = tuple(
        jax.ShapeDtypeStruct((spec.batch, *size, spec.head_size), spec.dtype)
        for size in sizes
    )
    longest = max(spec.queries, spec.length)
    documents = np.arange(longest) * 8 // longest
    ids = np.broadcast_to(documents.astype(np.int32), (spec.batch, longest))
    score = SCORES[spec.score](spec, jax.random.key(spec.seed))
    known = PATTERNS.get(spec.pattern)
    mask = read_mask(spec.pattern) if known is None else known(spec, ids)
    return shapes, {"mask": mask, "score": score}


def projected_size(spec: Spec) -> int:
    """P: size of projected query and key heads."""
    return HIDDEN_SIZE if spec.score in PAIRWISE else spec.head_size


@contextlib.contextmanager
def sized(sizes: Blocks) -> Iterator[PallasTpu]:
    """Registers an implementation with these block sizes, inside the context."""

    class Sized(PallasTpu):
        name = f"pallas_tpu_{'x'.join(map(str, sizes))}"
        table = (Entry(sizes),)

    IMPLEMENTATIONS[Sized.name] = made = Sized()
    try:
        yield made
    finally:
        del IMPLEMENTATIONS[Sized.name]


def the_pass(attend: Callable[..., Array], of: str) -> Callable[..., PyTree]:
    """The forward pass, or the gradients of query, key and value."""
    if of == "forward":
        return attend

    def loss(*arrays: Array) -> Array:
        return attend(*arrays).astype(np.float32).sum()

    return jax.grad(loss, (0, 1, 2))
