"""Rules of masks as JavaScript, so that a page can decide about any pair by itself.

A rule is traced for a tile of one query and one key. Each number of the trace becomes
a variable of a JavaScript function; arrays of a mask become typed arrays that the
function reads. Integers of 32 bits wrap around as in XLA. What XLA may round in another
way than a browser (``exp``, ``sin``, products of floats, ...) is not translated.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnlab._src.masks.rule import Rule, checked_visible
from attnlab._src.operands import tile_shape
from attnlab._src.types import PyTree, Tile, skeleton
from attnlab._src.view.operations import (
    ARITHMETIC,
    COMPARED,
    REDUCED,
    UNARY,
    NotTranslated,
    checked,
    converted,
    is_float,
    number,
    outside,
    wrapped,
)

#: Most statements of a function: a list of thousands of blocks is unrolled.
_MOST = 20_000


class Function(NamedTuple):
    """A rule as JavaScript.

    Attributes:
        body: of a function of ``(t, s, head, example, data)``: the two positions, the
            numbers of the head and of the example, and a list of typed arrays.
        arrays: the arrays in that list, each ``[B, N, T, S, *payload]``; the first four
            axes are full or 1.
    """

    body: str
    arrays: tuple[np.ndarray, ...]


class _Entry(str):
    """``array[array_at + place]``, where booleans are stored as 0 and 1."""

    array: str
    place: int
    end: str

    def __new__(cls, array: str, place: int, dtype: Any) -> "_Entry":
        end = " === 1)" if str(dtype) == "bool" else ")"
        made = super().__new__(cls, f"({array}[{array}_at + {place}]{end}")
        made.array, made.place, made.end = array, place, end
        return made


def function_of(mask: Rule, operands: PyTree) -> Function:
    """Translates ``mask.visible``.

    Args:
        mask: the mask, or a part of it.
        operands: its operands, normalised: ``[B, N, T, S, *payload]``.

    Raises:
        NotTranslated: if it contains a step that has no exact translation.
    """
    leaves, structure = jax.tree.flatten(operands)

    def visible(t: jax.Array, s: jax.Array, head: jax.Array, *leaves: Any) -> Any:
        own = jax.tree.unflatten(structure, leaves)
        return checked_visible(skeleton(mask), Tile(t, s, head), own)

    pair = [jax.ShapeDtypeStruct(n, jnp.int32) for n in ((1, 1), (1, 1), ())]
    tiles = [tile_shape(x, (1, 1)) for x in leaves]
    traced = jax.make_jaxpr(visible)(*pair, *tiles)
    writer = _Writer()
    inputs = [_filled((1, 1), "t"), _filled((1, 1), "s"), _filled((), "head")]
    kept = []
    used = {id(x) for step in traced.jaxpr.eqns for x in step.invars}
    used |= {id(x) for x in traced.jaxpr.outvars}
    for variable, leaf, tile in zip(
        traced.jaxpr.invars[3:], leaves, tiles, strict=True
    ):
        if id(variable) not in used:
            inputs.append(_filled(tile.shape, "0"))
            continue
        name = f"data{len(kept)}"
        writer.lines.append(_address(name, len(kept), leaf.shape))
        dtype = variable.aval.dtype
        checked(dtype)
        kept.append(np.asarray(leaf, dtype))
        places = np.arange(int(np.prod(tile.shape))).reshape(tile.shape)
        entry = lambda place, name=name, dtype=dtype: _Entry(name, place, dtype)
        inputs.append(_each(entry, places))
    (result,) = writer.run(traced.jaxpr, traced.consts, inputs)
    writer.lines.append(f"return {result.reshape(-1)[0]};")
    return Function("\n".join(writer.lines), tuple(kept))


def _address(name: str, place: int, shape: Sequence[int]) -> str:
    """Statements that find where the entries of a pair begin in an array."""
    size = int(np.prod(shape[4:]))
    terms = []
    for axis, index in ((3, "s"), (2, "t"), (1, "head"), (0, "example")):
        if shape[axis] > 1:
            terms.append(f"{index} * {size}")
        size *= shape[axis]
    at = " + ".join(terms) or "0"
    return f"const {name} = data[{place}], {name}_at = {at};"


def _filled(shape: tuple[int, ...], text: str) -> np.ndarray:
    made = np.empty(shape, object)
    made[...] = text
    return made


def _each(function: Callable[..., str], *arrays: Any) -> np.ndarray:
    """Applies a function entry by entry."""
    arrays = np.broadcast_arrays(*arrays)
    made = np.empty(arrays[0].shape, object)
    for index in np.ndindex(*made.shape):
        made[index] = function(*(x[index] for x in arrays))
    return made


#: Programs within a program, by the parameter that holds them.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "remat": "jaxpr",
    "checkpoint": "jaxpr",
}


class _Writer:
    """Writes the statements of a traced program."""

    def __init__(self):
        self.lines: list[str] = []
        self.numbers = itertools.count()

    def keep(self, text: str) -> str:
        """The name of a new variable that holds an expression."""
        if len(self.lines) > _MOST:
            raise NotTranslated(f"more than {_MOST:,} steps")
        name = f"v{next(self.numbers)}"
        self.lines.append(f"const {name} = {text};")
        return name

    def run(
        self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """The results of a program, entry by entry names or numbers."""
        known = dict(zip(jaxpr.invars, inputs, strict=True))
        for variable, value in zip(jaxpr.constvars, consts, strict=True):
            known[variable] = _each(number, np.asarray(value))

        def read(x: Any) -> np.ndarray:
            if hasattr(x, "val"):  # a number that the program contains
                return _each(number, np.asarray(x.val))
            return known[x]

        for step in jaxpr.eqns:
            found = self.step(step, [read(x) for x in step.invars])
            known.update(zip(step.outvars, found, strict=True))
        return [read(x) for x in jaxpr.outvars]

    def step(self, step: Any, given: list[np.ndarray]) -> list[np.ndarray]:
        """The results of one step."""
        name, params = step.primitive.name, step.params
        for each in (*step.invars, *step.outvars):
            checked(each.aval.dtype)
        if name in _CALLS:
            inner = params[_CALLS[name]]
            consts = getattr(inner, "consts", ())
            return self.run(getattr(inner, "jaxpr", inner), consts, given)
        if name == "cond":
            which, *rest = given
            each = [self.run(b.jaxpr, b.consts, rest) for b in params["branches"]]
            return [self.chosen(which, cases) for cases in zip(*each, strict=True)]
        result = step.outvars[0].aval
        if (moved := _moved(name, params, given, result)) is not None:
            return [moved]
        dtype = result.dtype
        if name in ARITHMETIC:
            write = lambda a, b: self.keep(
                wrapped(ARITHMETIC[name](a, b, dtype), dtype)
            )
            return [_each(write, *given)]
        if name in COMPARED:
            write = lambda a, b: self.keep(f"{a} {COMPARED[name]} {b}")
            return [_each(write, *given)]
        if name in UNARY:
            write = lambda a: self.keep(wrapped(UNARY[name](a, dtype), dtype))
            return [_each(write, *given)]
        if name in REDUCED:
            return [self.reduced(REDUCED[name], given[0], params["axes"], dtype)]
        if name == "select_n":
            return [self.chosen(given[0], given[1:])]
        if name == "clamp":
            write = lambda lo, x, hi: self.keep(f"Math.min(Math.max({x}, {lo}), {hi})")
            return [_each(write, *given)]
        if name == "convert_element_type":
            before = step.invars[0].aval.dtype
            return [_each(lambda a: self.keep(converted(a, before, dtype)), *given)]
        if name == "gather":
            return [self.gathered(step, *given)]
        raise NotTranslated(f"the operation {name}")

    def chosen(self, which: np.ndarray, cases: Sequence[np.ndarray]) -> np.ndarray:
        """One of several cases; a number beyond them counts as the last."""

        def write(which: str, *cases: str) -> str:
            *others, text = cases
            for i, case in reversed([*enumerate(others)]):
                text = f"(Number({which}) <= {i} ? {case} : {text})"
            return self.keep(text)

        return _each(write, which, *cases)

    def reduced(
        self, name: str, values: np.ndarray, axes: Sequence[int], dtype: Any
    ) -> np.ndarray:
        """Sums and their like, in the order of the entries."""
        kept = [i for i in range(values.ndim) if i not in axes]
        shape = tuple(values.shape[i] for i in kept)
        rows = values.transpose(*kept, *axes).reshape(*shape, -1)
        if rows.shape[-1] == 0 or (name == "add" and is_float(dtype)):
            raise NotTranslated("sums of floats, or a reduction of nothing")
        made = np.empty(shape, object)
        for index in np.ndindex(*shape):
            text, *others = rows[index]
            for other in others:
                text = self.keep(wrapped(ARITHMETIC[name](text, other, dtype), dtype))
            made[index] = text
        return made

    def gathered(self, step: Any, table: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Rows of a table by number; the table lies in memory, or is short."""
        how, sizes = step.params["dimension_numbers"], step.params["slice_sizes"]
        rows = table.shape[0] if table.ndim else 0
        plain = (
            tuple(how.start_index_map) == (0,)
            and tuple(how.collapsed_slice_dims) == (0,)
            and not how.operand_batching_dims
            and tuple(sizes) == (1, *table.shape[1:])
            and index.size == 1
        )
        if not plain:
            raise NotTranslated("a gather of this kind")
        given = index.reshape(-1)[0]
        row = self.keep(f"Math.min(Math.max({given}, 0), {rows - 1})")
        table = table.reshape(rows, -1)
        width, entries = table.shape[1], table.reshape(-1)
        if array := _in_memory(entries):
            start = f"{array}_at + {entries[0].place} + {row} * {width}"
            end = entries[0].end
            found = [self.keep(f"({array}[{start} + {i}]{end}") for i in range(width)]
        elif rows <= 64:
            found = [*self.chosen(_filled((width,), row), [*table])]
        else:
            raise NotTranslated("a gather from a table that is computed")
        if "FILL" in str(step.params["mode"]).upper():
            if step.params["fill_value"] is not None:
                raise NotTranslated("a gather with a value for what lies outside")
            beyond = outside(step.outvars[0].aval.dtype)
            inside = self.keep(f"{given} === {row}")
            found = [self.keep(f"{inside} ? {x} : {beyond}") for x in found]
        made = np.empty(len(found), object)
        made[:] = found
        return made.reshape(step.outvars[0].aval.shape)


def _in_memory(entries: np.ndarray) -> str | None:
    """The array whose successive entries these are; None: they are something else."""
    if not entries.size or not all(isinstance(x, _Entry) for x in entries):
        return None
    name, first = entries[0].array, entries[0].place
    places = [(x.array, x.place) for x in entries]
    return name if places == [(name, first + i) for i in range(len(places))] else None


def _moved(name: str, params: Any, given: list[np.ndarray], result: Any) -> Any:
    """The result of a step that only arranges entries; None: it is another step."""
    if name in {"reshape", "squeeze", "expand_dims"}:
        return given[0].reshape(result.shape)
    if name == "broadcast_in_dim":
        axes = params["broadcast_dimensions"]
        shape = [1] * len(result.shape)
        for axis, size in zip(axes, given[0].shape, strict=True):
            shape[axis] = size
        return np.broadcast_to(given[0].reshape(shape), result.shape)
    if name == "transpose":
        return given[0].transpose(params["permutation"])
    if name == "rev":
        return np.flip(given[0], params["dimensions"])
    if name == "concatenate":
        return np.concatenate(given, params["dimension"])
    if name == "slice":
        steps = params["strides"] or [1] * given[0].ndim
        starts, stops = params["start_indices"], params["limit_indices"]
        return given[0][tuple(map(slice, starts, stops, steps))]
    if name == "iota":
        axis = params["dimension"]
        shape = [1] * len(result.shape)
        shape[axis] = -1
        counted = np.arange(result.shape[axis]).reshape(shape)
        return _each(number, np.broadcast_to(counted, result.shape))
    return None
