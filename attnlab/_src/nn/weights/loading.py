"""Loads the tensors of a checkpoint into the parameters of a module."""

import difflib
import fnmatch
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab._src.nn.weights.checkpoint import Source, Tensor, tensors_of
from attnlab._src.nn.weights.recipes import Names, Shape
from attnlab._src.types import PyTree

M = TypeVar("M", bound=nnx.Module)

#: Greatest number of problems that an error lists.
_LISTED = 8


def load(module: nnx.Module, source: Source, names: Names) -> None:
    """Loads the weights of a checkpoint into a module.

    All weights are checked and read before the module changes. Parameters keep their
    type and sharding. The module may have been made by :func:`empty`, without values of
    parameters; or by ``nnx.eval_shape``, if its masks and modifiers hold no arrays,
    because that drops their values, too.

    One warning names all tensors that are ignored: those that checkpoints of this
    family contain but no module uses, and task heads.

    Args:
        module: an attention layer, a block, or a whole model.
        source: a ``.safetensors`` file; a folder with ``model.safetensors``, or with
            shards and ``model.safetensors.index.json``; or a dict of arrays (NumPy,
            JAX or PyTorch) by name, such as ``model.state_dict()``.
        names: the map from parameters to tensors: :func:`bert`, :func:`gpt2`,
            :func:`mistral`, :func:`marian`, :func:`t5`, or one of your own.

    Raises:
        ValueError: if a tensor is missing, has another shape, is not used, or should be
            equal to another but differs; if the map lacks a parameter; if arrays of the
            module other than parameters have no values; if a file is damaged or not in
            safetensors format (a pickle, for example); or if the index names a file
            outside the folder. The message names the file or folder.
        FileNotFoundError: if there is no such file.
        TypeError: if the source is neither a path nor a mapping.
        ImportError: if safetensors is not installed.

    Example:
        >>> from attnlab import nn
        >>> from attnlab.nn.weights import linear
        >>> layer = nn.MultiHeadAttention(8, 2, use_bias=False, rngs=nnx.Rngs(0))
        >>> tensors = {f"{x}_proj.weight": np.eye(8) for x in "qkvo"}
        >>> names = Names({
        ...     "query.kernel": linear("q_proj.weight"),
        ...     "key.kernel": linear("k_proj.weight"),
        ...     "value.kernel": linear("v_proj.weight"),
        ...     "out.kernel": linear("o_proj.weight", inward=2),
        ... })
        >>> load(layer, tensors, names)
        >>> layer.query.kernel[...].reshape(8, 8).trace()
        Array(8., dtype=float32)
    """
    variables = nnx.to_flat_state(nnx.state(module, nnx.Param))
    params = {".".join(map(str, path)): (path, v) for path, v in variables}
    shapes = {at: tuple(v.get_value().shape) for at, (_, v) in params.items()}
    with tensors_of(source) as held:
        found = {_renamed(name, names.endings): t for name, t in held.items()}
        names = max(
            (names, *names.prefixed), key=lambda n: len(_needed(shapes, n) & {*found})
        )
        needed = _needed(shapes, names)
        for copy, name in names.copies.items():
            if name in needed and copy in found and copy not in needed:
                found.setdefault(name, found[copy])
        unused, ignored = _unused(shapes, found, names)
        problems = [*_without_values(module), *_unmade(shapes, found, names), *unused]
        # Tensors are read only after all shapes are known to be right.
        _refuse(problems or _different(needed, found, names), source)
        loaded = []
        for at, (path, variable) in params.items():
            value, recipe = variable.get_value(), names.recipes[at]
            arrays = [
                np.asarray(found[name].read()).astype(value.dtype, copy=False)
                for name in recipe.names
            ]
            made = _placed(recipe.make(shapes[at], *arrays), value)
            loaded.append((path, variable.replace(made)))
    if ignored:
        warnings.warn(
            f"ignored, as no parameter takes them: {', '.join(ignored)}", stacklevel=2
        )
    nnx.update(module, nnx.from_flat_state(loaded))


def empty(make: Callable[[], M]) -> M:
    """A module whose parameters have shapes but no values, for :func:`load` to fill.

    All else in the module has its values: masks, modifiers, random streams. (After
    ``nnx.eval_shape`` these would be shapes, too.)

    Args:
        make: function that returns the module; it is traced.

    Example:
        >>> from attnlab import nn
        >>> layer = empty(lambda: nn.MultiHeadAttention(8, 2, rngs=nnx.Rngs(0)))
        >>> layer.query.kernel.get_value()
        ShapeDtypeStruct(shape=(8, 2, 4), dtype=float32)
    """
    graphs = []

    def constants() -> PyTree:
        graph, _, rest = nnx.split(make(), nnx.Param, ...)
        graphs.append(graph)
        return rest

    rest = jax.jit(constants)()  # what is not returned is not computed
    return nnx.merge(graphs[0], nnx.state(nnx.eval_shape(make), nnx.Param), rest)


def _needed(shapes: Mapping[str, tuple[int, ...]], names: Names) -> set[str]:
    """Names of the tensors that the parameters are made from."""
    recipes = (names.recipes[at] for at in shapes if at in names.recipes)
    return {name for recipe in recipes for name in recipe.names}


def _refuse(problems: Sequence[str], source: Source) -> None:
    if problems:
        where = "" if isinstance(source, Mapping) else f"{source}: "
        more = len(problems) - _LISTED
        listed = [*problems[:_LISTED], *([f"... and {more} more"] if more > 0 else [])]
        raise ValueError(f"{where}weights do not fit:\n  " + "\n  ".join(listed))


def _without_values(module: nnx.Module) -> list[str]:
    """Problems: arrays other than parameters without values (``nnx.eval_shape``).

    Random streams do not count: they are needed for dropout only.
    """
    brought = nnx.Param | nnx.RngState
    return [
        f"{'.'.join(map(str, path))} {_shown(array.shape)}: has no values; make the "
        "module with weights.empty(...), which keeps those of masks and modifiers"
        for path, leaf in nnx.iter_graph(module)
        if not isinstance(leaf, brought)
        for array in [leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf]
        if isinstance(array, jax.ShapeDtypeStruct)
    ]


def _unmade(
    shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor], names: Names
) -> list[str]:
    """Problems: parameters that cannot be made from the tensors, and why."""
    problems = []
    for at, shape in shapes.items():
        where = f"{at} {_shown(shape)}"
        if at not in names.recipes:
            problems.append(f"{where}: the map says nothing about this parameter")
            continue
        recipe = names.recipes[at]
        for name, expected in zip(recipe.names, recipe.shapes(shape), strict=True):
            wanted = f"{where}: expected a tensor {name!r} of shape {_shown(expected)}"
            if name not in found:
                problems.append(f"{wanted}, found none{_similar(name, found)}")
            elif not _fits(found[name].shape, expected):
                problems.append(f"{wanted}, found {_shown(found[name].shape)}")
    return problems


def _unused(
    shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor], names: Names
) -> tuple[list[str], list[str]]:
    """Problems: tensors that no parameter uses. Also the names of ignored tensors."""
    problems, ignored = [], []
    whole, elsewhere = names.elsewhere is None, names.elsewhere or ()
    needed = _needed(shapes, names)
    known = {*needed, *(c for c, name in names.copies.items() if name in needed)}
    for name in sorted(found.keys() - known):
        if name in elsewhere:
            continue
        if not name.startswith(names.within):
            if whole:
                ignored.append(name)
        elif any(fnmatch.fnmatchcase(name, pattern) for pattern in names.apart):
            ignored.append(name)
        else:
            of = [at for at, recipe in names.recipes.items() if name in recipe.names]
            why = f", and the module has no {of[0]}" if of else ""
            shape = _shown(found[name].shape)
            problems.append(f"tensor {name!r} {shape}: no parameter takes it{why}")
    return problems, ignored


def _different(
    needed: Collection[str], found: Mapping[str, Tensor], names: Names
) -> list[str]:
    """Problems: tensors that should equal another one (tied weights) but differ."""
    apart = {*needed, *(names.elsewhere or ())}
    return [
        f"tensor {copy!r}: expected a copy of {name!r}, as the module has one "
        "parameter for both, got other numbers"
        for copy, name in names.copies.items()
        if name in needed and copy in found and copy not in apart
        if not np.array_equal(found[copy].read(), found[name].read())
    ]


def _similar(name: str, found: Mapping[str, Tensor]) -> str:
    """A hint with a similar name; often only the prefix differs."""
    longer = [other for other in found if other.endswith("." + name)]
    close = longer or difflib.get_close_matches(name, found, 1)
    return f" (is it {close[0]!r}?)" if close else ""


def _placed(array: np.ndarray, old: object) -> jax.Array:
    """The array on the devices of the old one, if that was placed explicitly."""
    if isinstance(old, jax.Array) and old.committed:
        return jax.device_put(array, old.sharding)
    return jnp.asarray(array)


def _renamed(name: str, endings: Sequence[tuple[str, str]]) -> str:
    for old, new in endings:
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _fits(found: tuple[int, ...], expected: Shape) -> bool:
    return len(found) == len(expected) and all(
        e in (None, f) for f, e in zip(found, expected, strict=True)
    )


def _shown(shape: Shape) -> str:
    return f"[{', '.join('any' if s is None else str(s) for s in shape)}]"
