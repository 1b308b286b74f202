"""The records and protocols that all subpackages share.

Axis letters, used in every docstring: ``B`` batch, ``T`` query length, ``S`` key and
value length, ``N`` query heads, ``K`` key/value heads (``N % K == 0``), ``H`` head size
of query and key, ``P`` projected head size (what the comparison sees), ``D`` head size
of value and output.

An **operand** is an array of a score, a modifier or a mask, ``[B, N, T, S, *payload]``,
each of the first four axes full or 1, so that a kernel can cut the tile that it needs.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnlab._src.dtypes import accumulation_dtype as accumulation_dtype
from attnlab._src.dtypes import promoted as promoted
from attnlab._src.exact import inherits
from attnlab._src.picture import picture_of_plan, picture_of_weights
from attnlab._src.pytrees import pytree as pytree
from attnlab._src.pytrees import skeleton as skeleton
from attnlab._src.pytrees import static as static

Array = jax.Array
ArrayLike = jax.Array | np.ndarray
PyTree = Any


class Operand(NamedTuple):
    """An array as a score, modifier or mask gives it, before it is normalised.

    Attributes:
        array: ``[*batch, N, T, S, *payload]``; each axis before the payload full or 1,
            batch axes may be missing.
        payload: how many trailing axes are not axes of the logits.
    """

    array: Any
    payload: int = 0


class Tile(NamedTuple):
    """The positions and the head of a rectangle of logits.

    Attributes:
        query_positions: ``[q, 1]`` int32, -1 for an empty slot.
        key_positions: ``[1, k]`` int32, -1 for an empty slot.
        head: scalar int32, the query head.
    """

    query_positions: Any
    key_positions: Any
    head: Any


class Score:
    """A similarity: it projects each side token by token, then compares pairs.

    Subclass it, decorate with :func:`attnlab.extend.pytree`, and override what differs.
    Fields are arrays (parameters) unless declared ``static()``. Without ``compare`` it
    is the inner product of its projections, and runs on every kernel.

    Laws: ``project_*`` act on each token alone; ``compare`` reads nothing but its
    arguments (no closed-over arrays) and static fields: on the instance it is called
    on, every array field is None.

    Example:
        >>> @pytree
        ... class NegativeDistance(Score):
        ...     def compare(self, params, query, key):
        ...         difference = query[:, None, :] - key[None, :, :]
        ...         return -jnp.abs(difference).sum(-1)
        >>> from attnlab import attention
        >>> x = jnp.ones((1, 4, 2, 8))
        >>> attention(x, x, x, score=NegativeDistance()).shape
        (1, 4, 2, 8)
    """

    @property
    def floats_per_pair(self) -> int | None:
        """Floats that ``compare`` holds for each pair; it limits tiles. None: P."""
        return None

    def project_query(self, query: Array) -> Array:
        """``[B, T, N, H] -> [B, T, N, P]``."""
        return query

    def project_key(self, key: Array) -> Array:
        """``[B, S, K, H] -> [B, S, K, P]``."""
        return key

    def pair_params(self) -> PyTree:
        """Arrays that ``compare`` needs; the first axis of each leaf is N or 1."""
        return ()

    def compare(self, params: PyTree, query: Array, key: Array) -> Array:
        """``[q, P], [k, P] -> [q, k]``; ``params`` of one head, without its axis."""
        raise NotImplementedError("an inner-product score has no compare of its own")

    @property
    def is_inner_product(self) -> bool:
        """Whether the logits are plain inner products of the projections."""
        return inherits(self, Score, "compare")

    def without_scale(self, head_size: int) -> tuple["Score", float | Array]:
        """For inner products: the score without a factor of its logits, and the factor.

        Kernels multiply logits by it in the accumulation type. A float is structure; an
        array, a scalar or ``[N]``, is data.
        """
        return self, 1.0

    def flops_per_pair(self, projected_size: int) -> int:
        """Floating-point operations of one query-key comparison."""
        return (2 if self.is_inner_product else 3) * projected_size

    def transcendentals_per_pair(self, projected_size: int) -> int:
        """Evaluations of tanh, exp and their like in one comparison."""
        return 0

    def flops_per_query(self, head_size: int) -> int:
        """Floating-point operations of projecting one query token of one head."""
        return 0

    def flops_per_key(self, head_size: int) -> int:
        """Floating-point operations of projecting one key token of one head."""
        return 0


class Modifier:
    """A function of the logits, after the score and before the mask; to be subclassed.

    ``apply`` must work on tiles of any size, reading arrays only through its operands.
    """

    #: Multiplications, additions and function calls for each logit, for ``cost``.
    flops_per_pair: ClassVar[int] = 1

    def operands(self) -> tuple[Operand, ...]:
        """The arrays that ``apply`` needs."""
        return ()

    def apply(self, logits: Array, tile: Tile, *operands: Array) -> Array:
        """``[q, k] -> [q, k]``, in the accumulation type.

        Args:
            logits: ``[q, k]``.
            tile: their positions and head.
            operands: each ``[q or 1, k or 1, *payload]``.
        """
        raise NotImplementedError("a modifier needs an apply of its own")


class Intervals(NamedTuple):
    """Half-open intervals of block numbers, ascending and disjoint in the last axis.

    Bp is B or 1, Np is N or 1: where it is 1, all examples or heads share them.

    Attributes:
        lo: ``[Bp, Np, rows, m]`` int, first block.
        hi: ``[Bp, Np, rows, m]`` int, one past the last block; ``hi <= lo`` is empty.
    """

    lo: Any
    hi: Any

    def per_row(self) -> Any:
        """Blocks in each row, ``[Bp, Np, rows]``."""
        zero = self.lo.dtype.type(0)
        xp = np if isinstance(self.lo, np.ndarray) else jnp
        return xp.maximum(self.hi - self.lo, zero).sum(-1, dtype=self.lo.dtype)


class Live(NamedTuple):
    """The live blocks of each row of blocks.

    Attributes:
        full: blocks in which every pair may attend: no mask needed.
        partial: blocks in which some pair may attend: the mask decides.
    """

    full: Intervals
    partial: Intervals

    def per_row(self) -> Any:
        """Number of live blocks of each row, ``[Bp, Np, rows]``."""
        return self.full.per_row() + self.partial.per_row()


@pytree
class Plan:
    """The blocks that a mask leaves alive; NumPy where the structure alone decides.

    Attributes:
        rows: for each block of queries, the live blocks of keys.
        cols: the transpose, for gradients of key and value; None where not asked for.
        block_q: queries in a block.
        block_k: keys in a block.
        query_length: T, the number of queries.
        key_length: S, the number of keys.
    """

    rows: Live
    cols: Live | None
    block_q: int = static()
    block_k: int = static()
    query_length: int = static()
    key_length: int = static()

    @property
    def is_static(self) -> bool:
        """Whether the plan is known without running anything."""
        return all(isinstance(x, np.ndarray) for x in jax.tree.leaves(self))

    _repr_html_ = picture_of_plan  # notebooks show it


@pytree
class AttentionInputs:
    """Everything an implementation needs, validated, in canonical form.

    Attributes:
        query: ``[B, T, N, P]``, projected.
        key: ``[B, S, K, P]``, projected.
        value: ``[B, S, K, D]``.
        pair_params: the score's parameters, as operands ``[1, N or 1, 1, 1,
            *payload]``; ``[B, ...]`` where ``vmap`` maps over them.
        modifier_operands: a tuple of operands for each modifier.
        mask_operands: the mask's operands, nested like the parts of the mask.
        query_positions: ``[B or 1, 1, T, 1]`` int32; ``[B or 1, N, T, 1]`` where the
            mask reads the head.
        key_positions: ``[B or 1, 1, 1, S]`` int32.
        dropout_words: None, or two uint32 operands: a word for each query of each head,
            and one for each key.
        living: which queries see a key, ``[B or 1, N or 1, T]``, and which keys are
            seen, ``[B or 1, K or 1, S]``; the other slots may hold NaN. None: every
            slot is live.
        head_scale: None, or a second factor of inner products, which is data: an
            operand ``[B or 1, N or 1, 1, 1]`` in the accumulation type.
        score: the score without its arrays (a skeleton).
        modifiers: the modifiers without their arrays.
        mask: the mask without its arrays.
        dropout_rate: in [0, 1).
        precision: of matrix products.
        needs_lse: whether the caller reads (and may differentiate) log-sum-exp.
        position_kinds: where the positions of queries and of keys come from. "index":
            they are slot numbers, known when compiling; "offset": slot numbers plus an
            offset, the position of slot 0 (a slot with a position below 0 is empty);
            "given": one by one.
        logit_scale: a constant factor of inner products; it would round 16-bit queries.
    """

    query: Array
    key: Array
    value: Array
    pair_params: PyTree
    modifier_operands: PyTree
    mask_operands: PyTree
    query_positions: Array
    key_positions: Array
    dropout_words: tuple[Array, Array] | None
    living: tuple[Array | None, Array | None]
    head_scale: Array | None
    score: Score = static()
    modifiers: tuple[Modifier, ...] = static()
    mask: Any = static()
    dropout_rate: float = static()
    precision: Any = static()
    needs_lse: bool = static()
    position_kinds: tuple[str, str] = static()
    logit_scale: float = static()

    @property
    def sizes(self) -> "Sizes":
        """The axis sizes by letter."""
        batch, query_length, heads, projected = self.query.shape
        _, key_length, key_heads, value_size = self.value.shape
        return Sizes(
            batch, query_length, key_length, heads, key_heads, projected, value_size
        )

    def gradients(self, **found: PyTree) -> list[Array | None]:
        """The list that ``backward`` returns: gradients by field; others are None."""
        found_by_field: Any = skeleton(self)
        found_by_field = dataclasses.replace(found_by_field, **found)
        return jax.tree.structure(self).flatten_up_to(found_by_field)

    @property
    def index_positions(self) -> bool:
        """Whether all positions are slot numbers, known when compiling."""
        return self.position_kinds == ("index", "index")

    @property
    def accumulation_dtype(self) -> Any:
        """float64 for float64 inputs, else float32."""
        return accumulation_dtype(self.query.dtype)


class Sizes(NamedTuple):
    """Axis sizes, named by the axis letters."""

    B: int
    T: int
    S: int
    N: int
    K: int
    P: int
    D: int


class AttentionResult(NamedTuple):
    """What ``attention_with_stats`` returns.

    Attributes:
        output: ``[B, T, N, D]``, the query's dtype.
        lse: ``[B, T, N]`` log-sum-exp of the logits, float32 (float64 for float64);
            -inf where a query may attend to nothing.
        weights: None; or ``[B, N, T, S]``, all of them; or ``[B, N, T, k]``, the
            greatest of each query, in descending order. After dropout.
        indices: None, or ``[B, N, T, k]`` int32: key slots of ``weights``, -1 = none.
    """

    output: Array
    lse: Array
    weights: Array | None = None
    indices: Array | None = None
    _repr_html_ = picture_of_weights  # notebooks show it


class Implementation:
    """One way to compute the mathematics that ``reference`` defines."""

    name: ClassVar[str]
    #: Whether JAX differentiates ``forward``, because there is no ``backward``.
    differentiable: ClassVar[bool] = False
    #: Where it runs ("cpu", "cuda", "rocm", "tpu"), or None for everywhere.
    platforms: ClassVar[tuple[str, ...] | None] = None
    #: Where the automatic choice takes it, or None for wherever it runs.
    chosen_on: ClassVar[tuple[str, ...] | None] = None
    #: Why the automatic choice leaves it out, where it has no priority.
    why_not_automatic: ClassVar[str] = "it was registered without a priority"
    #: Whether a program that is exported (``jax.export``) can hold it.
    exportable: ClassVar[bool] = True
    #: Whether a program for several platforms can hold it.
    shares_program: ClassVar[bool] = True
    #: Whether XLA can partition it by itself where it must (programs for several TPUs).
    partitionable: ClassVar[bool] = True
    #: Letters of the axes whose sizes may be symbolic (``jax.export``).
    symbolic: ClassVar[str] = ""
    #: Whether dead slots may hold NaN; otherwise they are zeroed beforehand.
    reads_raw: ClassVar[bool] = False

    def unsupported(self, inputs: AttentionInputs) -> tuple[str, ...]:
        """Every reason why these inputs cannot be taken; empty if they can."""
        return ()

    def block_sizes(self, inputs: AttentionInputs) -> tuple[int, int]:
        """Queries and keys in a block, by default all. Arrays may be shapes."""
        return max(inputs.sizes.T, 1), max(inputs.sizes.S, 1)

    def candidates(self, inputs: AttentionInputs) -> dict[tuple[int, int], float]:
        """Block sizes that ``block_sizes`` chose from, with their relative costs."""
        return {}

    def blocks_executed(self, plan: Plan) -> Any:
        """Blocks of keys that each block of queries computes, ``[Bp, Np, rows]``."""
        return plan.rows.per_row()

    def keys_listed(self, inputs: AttentionInputs) -> int | None:
        """Keys in the list of a query, where queries are computed without a plan."""

    def forward(self, inputs: AttentionInputs) -> tuple[Array, Array]:
        """Output ``[B, T, N, D]``, log-sum-exp ``[B, T, N]``, in the accumulation type.

        A query that sees nothing has 0 and -inf. Unless ``differentiable``, both passes
        are traced at lowering, once for all equal calls, and see no manual mesh axes.
        """
        raise NotImplementedError

    def backward(
        self,
        inputs: AttentionInputs,
        output: Array,
        lse: Array,
        d_output: Array,
        d_lse: Array | None,
        wanted: Sequence[bool],
    ) -> list[Array | None]:
        """Gradients of the leaves of ``inputs``, None where ``wanted`` is False.

        Each is in the type of its leaf or in the accumulation type. The gradient of the
        query is that of ``head_scale * query``, in the accumulation type where there is
        a ``head_scale``; the gradient of ``head_scale`` follows from it and is never
        asked for. ``d_lse`` is None where ``lse`` is not differentiated.
        """
        raise NotImplementedError
