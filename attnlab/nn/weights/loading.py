"""Puts what a map says into the parameters of a module."""

import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab.nn.weights.checkpoint import Source, Tensor, tensors_of
from attnlab.nn.weights.recipes import Names, Shape

#: Problems that an error lists.
_LISTED = 8


def load(module: nnx.Module, source: Source, names: Names) -> None:
    """Puts a checkpoint's weights into a module.

    Everything is checked and read before anything changes. Parameters keep their own
    type and sharding; a module of ``nnx.eval_shape``, whose parameters do not exist
    yet, gets them.

    Args:
        module: an attention layer, a block, a whole model.
        source: a ``.safetensors`` file; a folder with ``model.safetensors``, or with
            shards and ``model.safetensors.index.json``; or arrays by name.
        names: the map: :func:`bert`, :func:`gpt2`, :func:`mistral`, :func:`marian`,
            :func:`t5`, or one of your own.

    Raises:
        ValueError: if a tensor is missing, has another shape, or is left over; if the
            map lacks a parameter; or if the file is a pickle.
        FileNotFoundError: if there is no such file.
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
    with tensors_of(source) as held:
        found = {_renamed(name, names.endings): t for name, t in held.items()}
        shapes = {at: tuple(v.get_value().shape) for at, (_, v) in params.items()}
        problems = [*_unmade(shapes, found, names), *_unused(shapes, found, names)]
        if problems:
            more = len(problems) - _LISTED
            listed = problems[:_LISTED] + ([f"... and {more} more"] if more > 0 else [])
            raise ValueError("weights do not fit:\n  " + "\n  ".join(listed))
        loaded = []
        for at, (path, variable) in params.items():
            value, recipe = variable.get_value(), names.recipes[at]
            arrays = [
                np.asarray(found[name].read()).astype(value.dtype, copy=False)
                for name in recipe.names
            ]
            made = _placed(recipe.make(shapes[at], *arrays), value)
            loaded.append((path, variable.replace(made)))
    nnx.update(module, nnx.from_flat_state(loaded))


def _unmade(
    shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor], names: Names
) -> list[str]:
    """Parameters that cannot be made, and why."""
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
) -> list[str]:
    """Tensors that belong nowhere."""
    used = {n for at in shapes if at in names.recipes for n in names.recipes[at].names}
    problems = []
    for name in sorted(found.keys() - used):
        if not name.startswith(names.within):
            continue
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in names.apart):
            continue
        for_whom = [at for at, recipe in names.recipes.items() if name in recipe.names]
        why = f", and the module has no {for_whom[0]}" if for_whom else ""
        shape = _shown(found[name].shape)
        problems.append(f"tensor {name!r} {shape}: no parameter takes it{why}")
    return problems


def _similar(name: str, found: Mapping[str, Tensor]) -> str:
    """A hint; mostly the prefix is another."""
    longer = [other for other in found if other.endswith("." + name)]
    close = longer or difflib.get_close_matches(name, found, 1)
    return f" (is it {close[0]!r}?)" if close else ""


def _placed(array: np.ndarray, old: Any) -> jax.Array:
    """Where the old array was put, if it was put somewhere."""
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
