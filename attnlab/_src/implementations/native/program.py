"""Encodes a call of the kernel as buffers and a short program of integers.

The integers are those of the enumerations in ``src/problem.h`` and ``src/mask.h``.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from attnlab._src.exact import exactly
from attnlab._src.masks.base import And, Dense, Full, Mask, Not, Or
from attnlab._src.masks.data import Documents, Lengths
from attnlab._src.masks.layouts import BlockLayout
from attnlab._src.masks.patterns import AnchorIndices
from attnlab._src.masks.per_head import PerHead
from attnlab._src.masks.selected import Selected
from attnlab._src.masks.structural import Anchor, Chunked, Window
from attnlab._src.modifiers.bias import Bias, SoftCap
from attnlab._src.modifiers.relative import Alibi, RelativeTable
from attnlab._src.scores.pairwise import Additive, Mlp
from attnlab._src.scores.projected import comparison_class, unwrapped
from attnlab._src.types import Array, Modifier, PyTree, Score

_INNER, _ADDITIVE, _MLP = range(3)
_ACTIVATIONS: dict[Callable[..., Array], int] = {
    jax.nn.relu: 0,
    jnp.tanh: 1,
    jax.nn.tanh: 1,
    jax.nn.sigmoid: 2,
    jax.nn.silu: 3,
    jax.nn.gelu: 4,
}
_SOFT_CAP, _ALIBI, _RELATIVE, _BIAS = range(4)
_MODIFIERS: dict[type, int] = {
    SoftCap: _SOFT_CAP,
    Alibi: _ALIBI,
    RelativeTable: _RELATIVE,
    Bias: _BIAS,
}
#: Masks that the kernel evaluates itself; subclasses are not included, as they may
#: differ.
_MASKS = (
    *(Full, Window, Anchor, Chunked, Lengths, Documents, Dense),
    *(BlockLayout, AnchorIndices, Selected, And, Or, Not, PerHead),
)
_FULL, _WINDOW, _ANCHOR, _CHUNKED, _FLAGS, _DOCUMENTS, _DENSE = range(7)
_BLOCKS, _ANCHOR_INDICES, _SELECTED, _BITS, _AND, _OR, _NOT, _PER_HEAD = range(7, 15)

#: Greatest number of modifiers, and of layers of an MLP score after its first: the
#: kernel's arrays have a fixed size.
MOST_MODIFIERS, MOST_LAYERS = 16, 10

#: Floating types of arrays that the kernel reads.
FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


def score_code(score: Score) -> tuple[int, int] | None:
    """The codes of score and activation; None if the kernel does not know them."""
    kind, score = comparison_class(score), unwrapped(score)
    if kind is Mlp:
        activation = _ACTIVATIONS.get(score.activation)
        known_layers = activation is not None and len(score.hidden) <= MOST_LAYERS
        return (_MLP, activation) if known_layers else None
    if kind is Additive:
        return _ADDITIVE, 0
    return (_INNER, 0) if kind is Score else None


def modifier_code(modifier: Modifier) -> int | None:
    """The code of the modifier; None if the kernel does not know it."""
    return _MODIFIERS.get(type(modifier))


class Buffers:
    """The arguments of a call, in order."""

    def __init__(self, *arrays: Array):
        self.arrays = list(arrays)

    def add(self, array: Array) -> int:
        """Adds an array; returns its index."""
        self.arrays.append(array)
        return len(self.arrays) - 1


def offset_buckets(modifier: RelativeTable, count: int) -> Array:
    """The buckets of all offsets ``s - t`` within the modifier's reach, in order."""
    before, after = modifier.reach
    return modifier.bucket(jnp.arange(-before, after + 1, dtype=jnp.int32), count)


def modifier_operand(modifier: Modifier, operand: Array) -> Array:
    """The operand of a modifier as the kernel reads it."""
    if isinstance(modifier, RelativeTable):
        operand = operand[..., offset_buckets(modifier, operand.shape[-1])]
    if isinstance(modifier, Bias) and operand.dtype in FLOATS:
        return operand
    return operand.astype(jnp.float32)


def header(
    *,
    score: tuple[int, int] = (_INNER, 0),
    narrow: bool = False,
    kind: int = 0,
    drop_below: int = -1,
    blocks: tuple[int, int] = (1, 1),
    slices: int = 1,
    wanted: int = 0,
    params: Sequence[int] = (),
    param_gradient: int = -1,
    words: int = -1,
    d_lse: int = -1,
    head_scale: int = -1,
    lists: tuple[int, int] = (-1, -1),
    modifiers: Sequence[int] = (),
) -> list[int]:
    """A program without its mask; ``Problem`` in ``src/problem.h`` explains it.

    Args:
        score: codes of score and activation.
        narrow: whether products of bfloat16 are allowed.
        kind: of the pass.
        drop_below: dropout: a 24-bit hash below it drops an entry; -1: none.
        blocks: queries and keys in a block of the plan.
        slices: of the keys.
        wanted: flags of the gradients that are wanted.
        params: indices of the score's parameters, in a row.
        param_gradient: index of the result of the first one's gradient.
        words: index of the first of dropout's two words.
        d_lse: index of the gradient of the log-sum-exp.
        head_scale: index of the factors of heads.
        lists: index of the lists of keys, and keys in a block.
        modifiers: five numbers for each modifier.
    """
    first = params[0] if params else -1
    return [
        *(*score, int(narrow), kind, drop_below, *blocks, slices, wanted),
        *(len(params), first, param_gradient, words, d_lse, head_scale, *lists),
        *(len(modifiers) // 5, *modifiers),
    ]


def mask_program(
    mask: Mask,
    operands: PyTree,
    buffers: Buffers,
    bits: Callable[[Mask, PyTree], Array],
) -> list[int]:
    """The mask as integers, in prefix notation.

    Args:
        mask: the mask without its arrays.
        operands: its operands, normalised.
        buffers: the operands are added to these.
        bits: evaluates a mask that the kernel does not know to words of 32 queries for
            each key, ``[B or 1, N or 1, T / 32, S]``.
    """
    add = buffers.add

    def parts(masks: tuple[Mask, ...]) -> list[list[int]]:
        return [
            mask_program(m, o, buffers, bits)
            for m, o in zip(masks, operands, strict=True)
        ]

    if not exactly(mask, *_MASKS):
        return [_BITS, add(bits(mask, operands))]
    match mask:
        case And():
            return [_AND, len(mask.parts), *sum(parts(mask.parts), [])]
        case Or():
            return [_OR, len(mask.parts), *sum(parts(mask.parts), [])]
        case Not():
            return [_NOT, *mask_program(mask.part, operands, buffers, bits)]
        case PerHead():
            each = parts(mask.parts)
            programs = [each[part] for part in mask.order]
            sizes = [len(p) for p in programs]
            return [_PER_HEAD, len(programs), *sizes, *sum(programs, [])]
    return _structure(mask) or _data(mask, operands, add)


def _structure(mask: Mask) -> list[int]:
    """The program of a mask without operands; empty for other masks."""

    def limit(size: int | None) -> int:
        return -1 if size is None else size

    match mask:
        case Full():
            return [_FULL]
        case Window():
            return [_WINDOW, limit(mask.left), limit(mask.right), mask.step]
        case Anchor():
            runs = [place for run in mask.runs for place in run]
            return [_ANCHOR, int(mask.side == "key"), len(mask.runs), *runs]
        case Chunked():
            return [_CHUNKED, mask.size]
    return []


def is_structural(mask: Mask) -> bool:
    """Whether the kernel evaluates a mask from positions alone."""
    if exactly(mask, And, Or):
        return all(map(is_structural, mask.parts))
    if exactly(mask, Not):
        return is_structural(mask.part)
    return exactly(mask, Full, Window, Anchor, Chunked)


def _data(mask: Mask, operands: PyTree, add: Callable[[Array], int]) -> list[int]:
    """The program of a mask with operands."""
    match mask:
        case Lengths():
            flags = [[_FLAGS, add(x)] for x in operands if x is not None]
            return [_AND, len(flags), *sum(flags, [])]
        case Documents():
            return [_DOCUMENTS, *(add(x) for x in operands)]
        case Dense():
            return [_DENSE, add(operands)]
        case BlockLayout():
            return [_BLOCKS, add(operands[0]), mask.query_block, mask.key_block]
        case Selected():
            return [_SELECTED, add(operands[1]), mask.key_block]
        case AnchorIndices():
            return [_ANCHOR_INDICES, add(operands), int(mask.side == "key")]
    raise AssertionError(mask)


def unknown(mask: Mask) -> int:
    """Number of parts of a mask that the kernel does not know and gets as bits."""
    if not exactly(mask, *_MASKS):
        return 1
    if exactly(mask, And, Or, PerHead):
        return sum(unknown(m) for m in mask.parts)
    return unknown(mask.part) if exactly(mask, Not) else 0


def modifier_gradient(modifier: Modifier, gradient: Array, operand: Array) -> Array:
    """The gradient of a modifier's operand, from that of ``modifier_operand``."""
    if isinstance(modifier, RelativeTable):
        count = operand.shape[-1]
        zeros = jnp.zeros((*gradient.shape[:-1], count), gradient.dtype)
        return zeros.at[..., offset_buckets(modifier, count)].add(gradient)
    return gradient
