"""Recipes that make a parameter from tensors of a checkpoint, and maps of recipes."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

#: Shape of a tensor; None stands for any size.
Shape = tuple[int | None, ...]


class Recipe(NamedTuple):
    """How a parameter is made from tensors of a checkpoint.

    Attributes:
        names: names of the tensors.
        shapes: maps the parameter's shape to the expected shape of each tensor.
        make: maps the parameter's shape and the tensors (NumPy) to the parameter.
    """

    names: tuple[str, ...]
    shapes: Callable[[tuple[int, ...]], Sequence[Shape]]
    make: Callable[..., np.ndarray]


def tensor(name: str) -> Recipe:
    """The tensor unchanged: for an embedding, a norm's scale."""
    return Recipe((name,), lambda shape: [shape], lambda shape, array: array)


def flat(name: str) -> Recipe:
    """A vector reshaped to the parameter: a bias ``[N H]`` to heads ``[N, H]``."""
    return Recipe(
        (name,),
        lambda shape: [(_product(shape),)],
        lambda shape, array: array.reshape(shape),
    )


def linear(name: str, inward: int = 1) -> Recipe:
    """The weight ``[outputs, inputs]`` of a PyTorch ``Linear``, transposed.

    Args:
        name: name of the tensor.
        inward: number of leading axes of the parameter that are inputs: 2 for
            ``out.kernel [N, D, features]``.
    """
    return Recipe(
        (name,),
        lambda shape: [(_product(shape[inward:]), _product(shape[:inward]))],
        lambda shape, array: array.T.reshape(shape),
    )


def conv1d(name: str, inward: int = 1) -> Recipe:
    """The weight ``[inputs, outputs]`` of GPT-2's ``Conv1D``; see :func:`linear`."""
    return Recipe(
        (name,),
        lambda shape: [(_product(shape[:inward]), _product(shape[inward:]))],
        lambda shape, array: array.reshape(shape),
    )


def part(recipe: Recipe, index: int, count: int, axis: int = -1) -> Recipe:
    """One part of a tensor that concatenates several of equal size (fused q, k, v).

    Args:
        recipe: recipe for the one part.
        index: index of the part.
        count: number of parts.
        axis: axis of the tensor along which parts are concatenated.
    """

    def shapes(shape: tuple[int, ...]) -> Sequence[Shape]:
        (one,) = recipe.shapes(shape)
        whole = list(one)
        whole[axis] = count * (one[axis] or 0)
        return [tuple(whole)]

    def make(shape: tuple[int, ...], array: np.ndarray) -> np.ndarray:
        return recipe.make(shape, np.split(array, count, axis)[index])

    return Recipe(recipe.names, shapes, make)


def stacked(recipes: Sequence[Recipe]) -> Recipe:
    """Parameters of several layers stacked in one, as for ``Stack(scan=True)``."""
    names = tuple(name for recipe in recipes for name in recipe.names)

    def shapes(shape: tuple[int, ...]) -> Sequence[Shape]:
        return [s for recipe in recipes for s in recipe.shapes(shape[1:])]

    def make(shape: tuple[int, ...], *arrays: np.ndarray) -> np.ndarray:
        rest = iter(arrays)
        each = ([next(rest) for _ in recipe.names] for recipe in recipes)
        return np.stack([
            recipe.make(shape[1:], *own)
            for recipe, own in zip(recipes, each, strict=True)
        ])

    return Recipe(names, shapes, make)


class Names(NamedTuple):
    """A map from the parameters of a module to the tensors of a checkpoint.

    Attributes:
        recipes: recipe for each parameter's path; paths that the module lacks are
            ignored.
        within: prefixes of names; all tensors with one of them must be used ...
        apart: ... except those that match these patterns (``*`` is a wildcard), which
            are ignored.
        endings: endings of names to replace, as pairs of old and new.
        copies: names of tensors that repeat another one (tied weights), with its name.
            If the checkpoint has both they must be equal; if only the copy, it is used.
        prefixed: the same map for checkpoints whose names have another prefix. The map
            that finds most tensors is used; this one, if others find as many.
        elsewhere: in the map of a part, the tensors of other parts and their copies;
            None in the map of a whole model.
    """

    recipes: Mapping[str, Recipe]
    within: tuple[str, ...] = ("",)
    apart: tuple[str, ...] = ()
    endings: tuple[tuple[str, str], ...] = ()
    copies: Mapping[str, str] = MappingProxyType({})
    prefixed: tuple["Names", ...] = ()
    elsewhere: frozenset[str] | None = None

    def of(self, path: str) -> "Names":
        """The map of a part of the module: ``bert(12).of("stack.blocks.3.attention")``.

        Tensors in the same submodules of the checkpoint as those of the part (such as
        ``encoder.layer.3.attention.self``) must all be used, except by other parts.

        Raises:
            KeyError: if the map has no parameter under this path.
        """
        own = {
            at.removeprefix(path + "."): recipe
            for at, recipe in self.recipes.items()
            if at.startswith(path + ".")
        }
        if not own:
            raise KeyError(f"{path!r}: the map has no parameters under this path")
        used = {name for recipe in own.values() for name in recipe.names}
        every = {name for recipe in self.recipes.values() for name in recipe.names}
        others = every - used
        others |= {copy for copy, name in self.copies.items() if name in others} - used
        # Two levels up: for ``x.self.query.weight`` everything in ``x.self.``.
        near = {".".join([*name.split(".")[:-2], ""]).lstrip(".") for name in used}
        return self._replace(
            recipes=own,
            within=tuple(sorted(near)),
            prefixed=tuple(names.of(path) for names in self.prefixed),
            elsewhere=frozenset(others) | (self.elsewhere or frozenset()),
        )


def _product(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))
