"""How parameters are made of a checkpoint's tensors, and maps from ones to others."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

#: Of a tensor; None = any size.
Shape = tuple[int | None, ...]


class Recipe(NamedTuple):
    """How a parameter is made of a checkpoint's tensors.

    Attributes:
        names: of the tensors.
        shapes: from the parameter's shape, what each tensor's should be.
        make: from the parameter's shape and the tensors (NumPy), the parameter.
    """

    names: tuple[str, ...]
    shapes: Callable[[tuple[int, ...]], Sequence[Shape]]
    make: Callable[..., Any]


def tensor(name: str) -> Recipe:
    """A tensor as it is: an embedding, a norm's scale."""
    return Recipe((name,), lambda shape: [shape], lambda shape, array: array)


def flat(name: str) -> Recipe:
    """A vector for all axes of the parameter: a bias ``[N H]`` of heads ``[N, H]``."""
    return Recipe(
        (name,),
        lambda shape: [(_product(shape),)],
        lambda shape, array: array.reshape(shape),
    )


def linear(name: str, inward: int = 1) -> Recipe:
    """The weight of PyTorch's ``Linear``, ``[outputs, inputs]``.

    Args:
        name: of the tensor.
        inward: how many leading axes of the parameter are inputs: 2 of ``out.kernel
            [N, D, features]``.
    """
    return Recipe(
        (name,),
        lambda shape: [(_product(shape[inward:]), _product(shape[:inward]))],
        lambda shape, array: array.T.reshape(shape),
    )


def conv1d(name: str, inward: int = 1) -> Recipe:
    """The weight of GPT-2's ``Conv1D``, ``[inputs, outputs]``; else as ``linear``."""
    return Recipe(
        (name,),
        lambda shape: [(_product(shape[:inward]), _product(shape[inward:]))],
        lambda shape, array: array.reshape(shape),
    )


def part(recipe: Recipe, index: int, count: int, axis: int = -1) -> Recipe:
    """Of a tensor that holds several equal parts side by side (fused q, k, v), one.

    Args:
        recipe: of the one part.
        index: which.
        count: of parts.
        axis: of the tensor, along which they lie.
    """

    def shapes(shape: tuple[int, ...]) -> Sequence[Shape]:
        (one,) = recipe.shapes(shape)
        whole = list(one)
        whole[axis] = count * (one[axis] or 0)
        return [tuple(whole)]

    def make(shape: tuple[int, ...], array: np.ndarray) -> Any:
        return recipe.make(shape, np.split(array, count, axis)[index])

    return Recipe(recipe.names, shapes, make)


def stacked(recipes: Sequence[Recipe]) -> Recipe:
    """Parameters of several layers in one, as a scanned ``Stack`` holds them."""
    names = tuple(name for recipe in recipes for name in recipe.names)

    def shapes(shape: tuple[int, ...]) -> Sequence[Shape]:
        return [s for recipe in recipes for s in recipe.shapes(shape[1:])]

    def make(shape: tuple[int, ...], *arrays: np.ndarray) -> Any:
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
        recipes: for each path of a parameter; more paths than the module has are fine.
        within: tensors whose names begin so must all be used ...
        apart: ... but for these patterns (``*`` = anything): they are ignored.
        endings: other endings of names, and what they are read as.
        copies: tensors that repeat another one, and that one's name. Where both are
            there they must be equal; where one is missing the other is taken.
        prefixed: the same map for checkpoints with another prefix of their names. That
            which finds most tensors is taken; this one, if none finds more.
        elsewhere: in the map of a part, tensors of the other parts and their copies;
            None: it is the map of a whole.
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

        Tensors near those of the part must be used, too: those of the same submodule
        of the checkpoint (``encoder.layer.3.attention.self``) that no other part takes.

        Raises:
            KeyError: if the map has nothing there.
        """
        own = {
            at.removeprefix(path + "."): recipe
            for at, recipe in self.recipes.items()
            if at.startswith(path + ".")
        }
        if not own:
            raise KeyError(f"{path!r}: the map has no parameters there")
        used = {name for recipe in own.values() for name in recipe.names}
        every = {name for recipe in self.recipes.values() for name in recipe.names}
        others = every - used
        others |= {copy for copy, name in self.copies.items() if name in others} - used
        # ``x.self.query.weight``: two levels up, all else of ``x.self.``.
        near = {".".join([*name.split(".")[:-2], ""]).lstrip(".") for name in used}
        return self._replace(
            recipes=own,
            within=tuple(sorted(near)),
            prefixed=tuple(names.of(path) for names in self.prefixed),
            elsewhere=frozenset(others) | (self.elsewhere or frozenset()),
        )


def _product(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))
