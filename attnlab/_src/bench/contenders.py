"""Contenders: computations of the same attention, compiled to be checked and timed."""

import importlib.util
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from attnlab import attention, explain
from attnlab._src.bench.cases import Case
from attnlab._src.bench.machine import free_memory
from attnlab._src.implementations import IMPLEMENTATIONS
from attnlab._src.masks.base import Mask
from attnlab._src.types import Array, ArrayLike, PyTree, Score


class Prepared(NamedTuple):
    """A computation that is ready to be called.

    Attributes:
        call: function without arguments; returns a value for ``results``.
        results: maps a returned value to arrays by name: ``output`` and, if gradients
            were asked for, ``d_query``, ``d_key``, ``d_value`` and the score's.
        compile_seconds: time of compilation; None if nothing is compiled ahead of time.
        temporary_bytes: peak memory besides inputs and outputs; None if unknown.
    """

    call: Callable[[], PyTree]
    results: Callable[[PyTree], Mapping[str, ArrayLike]]
    compile_seconds: float | None
    temporary_bytes: int | None


class Contender(Protocol):
    """A method to compute the attention of a case."""

    @property
    def name(self) -> str:
        """The name in tables."""
        ...

    def refusal(self, case: Case) -> str | None:
        """Why it cannot compute this case; None if it can."""
        ...

    def prepare(self, case: Case, backward: bool) -> Prepared:
        """Compiles the forward pass, or forward and backward together.

        Raises:
            NotImplementedError: if it has the forward pass only.
        """
        ...


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def refused_on_cpus(case: Case, *packages: str) -> str | None:
    """Why a library that is compared on CPUs cannot compute a case; None if it can.

    Args:
        case: the case.
        *packages: what must be installed.
    """
    for package in packages:
        if not installed(package):
            return f"{package} is not installed"
    if jax.default_backend() != "cpu":
        return "it is compared on CPUs only"
    return refused_score(case)


def refused_score(case: Case) -> str | None:
    """Why a library without other scores cannot compute a case; None if it can."""
    if case.spec.score != "scaled_dot":
        return f"it has no {case.spec.score} score"
    return None


def too_large(case: Case) -> str | None:
    """Why a computation that stores all logits exceeds memory; None if it does not."""
    needed, free = case.spec.dense_bytes, free_memory()
    if needed <= free / 2:
        return None
    return (
        f"needs about {needed / 2**30:.1f} GiB, more than half of the "
        f"{free / 2**30:.1f} GiB that are free"
    )


def named(result: PyTree, backward: bool) -> dict[str, Array]:
    """Arrays by name, of ``output`` or ``(output, (d_query, ..., d_score))``."""
    if not backward:
        return {"output": result}
    output, (d_query, d_key, d_value, d_score) = result
    arrays = {"output": output, "d_query": d_query, "d_key": d_key, "d_value": d_value}
    for path, leaf in jax.tree_util.tree_leaves_with_path(d_score):
        arrays[f"d_score{jax.tree_util.keystr(path)}"] = leaf
    return arrays


def differentiated(function: Callable[..., Array]) -> Callable[..., PyTree]:
    """Makes a function that also returns all gradients but the mask's.

    ``function`` takes query, key, value, score and mask. The result takes the output's
    cotangent as a further, last argument; :func:`named` reads what it returns.
    """

    def both(
        query: Array,
        key: Array,
        value: Array,
        score: PyTree,
        mask: Mask | Array | None,
        above: Array,
    ) -> PyTree:
        def output(query: Array, key: Array, value: Array, score: PyTree) -> Array:
            return function(query, key, value, score, mask)

        result, pull = jax.vjp(output, query, key, value, score)
        return result, pull(above)

    return both


def compile_call(
    function: Callable[..., Array],
    arguments: tuple[PyTree, ...],
    cotangent: Array | None,
) -> Prepared:
    """Compiles ``function(query, key, value, score, mask)`` ahead of time.

    Args:
        function: returns the output.
        arguments: its arguments; none is closed over, so none is a constant.
        cotangent: cotangent of the output, for all gradients but the mask's; None:
            forward only.
    """
    backward = cotangent is not None
    if backward:
        function, arguments = differentiated(function), (*arguments, cotangent)
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return Prepared(
        lambda: compiled(*arguments),
        lambda result: named(result, backward),
        seconds,
        None if memory is None else int(memory.temp_size_in_bytes),
    )


def attending(implementation: str) -> Callable[..., Array]:
    """``attention`` as a function of query, key, value, score and mask."""

    def function(
        query: Array, key: Array, value: Array, score: Score, mask: Mask | None
    ) -> Array:
        return attention(
            query,
            key,
            value,
            score=score,
            mask=mask,
            implementation=implementation,
        )

    return function


class Implementation:
    """An implementation of attnlab, by its name."""

    def __init__(self, name: str):
        self.name = name

    def refusal(self, case: Case) -> str | None:
        """See :class:`Contender`."""
        if self.name not in IMPLEMENTATIONS:
            return "attnlab has no implementation of that name here"
        try:
            explain(
                case.query,
                case.key,
                case.value,
                score=case.score,
                mask=case.mask,
                implementation=self.name,
            )
        except NotImplementedError as error:
            return str(error).partition("cannot take these inputs: ")[2] or str(error)
        return too_large(case) if self.name in {"jax_nn", "reference"} else None

    def prepare(self, case: Case, backward: bool) -> Prepared:
        """See :class:`Contender`."""
        arguments = (case.query, case.key, case.value, case.score, case.mask)
        cotangent = case.cotangent if backward else None
        return compile_call(attending(self.name), arguments, cotangent)


def widened(case: Case) -> Case:
    """The case with its floating-point arrays in a wider type.

    float32 becomes float64 (inside ``jax.enable_x64`` only), other types float32.
    """
    wide = jnp.float64 if case.spec.dtype == "float32" else jnp.float32

    def widen(x: jax.typing.ArrayLike) -> Array:
        x = jnp.asarray(x)
        return x.astype(wide) if jnp.issubdtype(x.dtype, np.floating) else x

    names = ("query", "key", "value", "cotangent", "score")
    wider = {name: jax.tree.map(widen, getattr(case, name)) for name in names}
    return Case(spec=case.spec, mask=case.mask, density=case.density, **wider)
