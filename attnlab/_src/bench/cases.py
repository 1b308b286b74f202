"""The cases to measure: mask patterns, scores, and the arrays of one case."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from attnlab import masks, scores
from attnlab._src.bench.packing import embed, pack
from attnlab._src.masks.base import Mask
from attnlab._src.types import Array, Score

#: Hidden units of the additive, mlp and concat scores.
HIDDEN_SIZE = 64
_BLOCK = 64
WINDOW = 256


@dataclasses.dataclass(frozen=True)
class Spec:
    """Specification of one problem, which is the same for all contenders.

    Attributes:
        pattern: a name in ``PATTERNS``.
        score: a name in ``SCORES``.
        dtype: type of query, key and value.
        batch: B, the batch size.
        length: S, the key length; also T if ``query_length`` is not given.
        heads: N, the number of query heads.
        key_heads: K, the number of key and value heads.
        head_size: H and D, the size of query, key and value heads.
        seed: seed of text order, embeddings, parameters and random blocks.
        query_length: T, the query length; queries belong to the last T tokens.
    """

    pattern: str = "full"
    score: str = "scaled_dot"
    dtype: str = "float32"
    batch: int = 1
    length: int = 2048
    heads: int = 8
    key_heads: int = 8
    head_size: int = 64
    seed: int = 0
    query_length: int | None = None

    @property
    def queries(self) -> int:
        """T, the query length."""
        return self.length if self.query_length is None else self.query_length

    @property
    def label(self) -> str:
        """Pattern and score."""
        return f"{self.pattern} · {self.score}"

    @property
    def dense_bytes(self) -> int:
        """Memory of forward and backward for methods that store all logits.

        Counts four arrays ``[B, N, T, S]`` in float32, and for the mlp score four
        arrays of its hidden units.
        """
        pairs = self.batch * self.heads * self.queries * self.length
        copies = 4 + (4 * HIDDEN_SIZE if self.score == "mlp" else 0)
        return 4 * copies * pairs


@dataclasses.dataclass(frozen=True)
class Case:
    """The arrays of a ``Spec``.

    Attributes:
        spec: what it was made from.
        query: ``[B, T, N, H]``.
        key: ``[B, T, K, H]``.
        value: ``[B, T, K, H]``.
        cotangent: ``[B, T, N, H]``, the gradient with respect to the output.
        score: score with its parameters.
        mask: attnlab mask, not materialised.
        density: number of visible pairs over that of all pairs.
    """

    spec: Spec
    query: Array
    key: Array
    value: Array
    cotangent: Array
    score: Score
    mask: Mask
    density: float

    def dense_mask(self) -> Array | None:
        """The mask as booleans ``[B or 1, 1, T, S]``; None for the full mask."""
        if self.spec.pattern == "full":
            return None
        sizes = self.spec.queries, self.spec.length
        return self.mask.to_dense(*sizes).reshape(-1, 1, *sizes)

    @property
    def visible_pairs(self) -> float:
        """Query-key pairs that may attend, all heads and examples."""
        s = self.spec
        return self.density * s.batch * s.heads * s.queries * s.length

    def useful_flops(self, backward: bool) -> float:
        """Operations on visible pairs, forward or forward and backward together.

        Forward computes the score and the product of weights and values. Backward
        computes the score again, its gradients with respect to query and key, and two
        products with the value: for an inner product 2.5 times the forward pass.
        """
        pair = scores.cost(self.score, self.spec.head_size, self.spec.heads)
        forward = pair.flops_per_pair + 2 * self.spec.head_size
        if backward:
            forward += 3 * pair.flops_per_pair + 4 * self.spec.head_size
        return self.visible_pairs * forward

    def tanh_count(self, backward: bool) -> float:
        """Evaluations of tanh needed by any method that does not store hidden units.

        One for each hidden unit of a pair in the forward pass, another in the backward.
        """
        return self.visible_pairs * self._hidden_units * (2 if backward else 1)

    def beside_tanh_flops(self, backward: bool) -> float:
        """Operations in addition to those evaluations; 0 for scores without tanh.

        The addition before an evaluation, and the multiplication and addition after it,
        belong to the evaluation. Additional are the product with the value, two more in
        the backward pass, and there eight operations for the gradient of a hidden unit:
        ``1 - t * t``, two factors, a sum for the query, one for the key, and a product
        and a sum for the weight.
        """
        if not self._hidden_units:
            return 0.0
        pair = 2 * self.spec.head_size
        if backward:
            pair += 4 * self.spec.head_size + 8 * self._hidden_units
        return self.visible_pairs * pair

    @property
    def _hidden_units(self) -> int:
        pair = scores.cost(self.score, self.spec.head_size, self.spec.heads)
        return pair.transcendentals_per_pair


def _blocks(spec: Spec) -> int:
    return -(-spec.length // _BLOCK)


def _random_blocks(spec: Spec) -> int:
    return min(3, _blocks(spec))


def _documents(spec: Spec, ids: np.ndarray) -> Mask:
    if spec.queries == spec.length:
        return masks.documents(ids)
    return masks.documents(ids[:, : spec.queries], ids[:, : spec.length])


_Pattern = Callable[[Spec, np.ndarray], Mask]

#: Each makes a mask from the sizes and the documents' ids, ``[B, max(T, S)]``.
PATTERNS: dict[str, _Pattern] = {
    "full": lambda spec, ids: masks.full(),
    "causal": lambda spec, ids: masks.causal(),
    "window": lambda spec, ids: masks.sliding_window(WINDOW, WINDOW),
    "causal_window": lambda spec, ids: masks.sliding_window(WINDOW - 1, 0),
    "longformer": lambda spec, ids: masks.longformer(window=192, anchors=64),
    "big_bird": lambda spec, ids: masks.big_bird(
        window=192,
        anchors=64,
        random_blocks=_random_blocks(spec),
        rng=spec.seed,
        block_size=_BLOCK,
        num_blocks=_blocks(spec),
    ),
    "random": lambda spec, ids: masks.random_blocks(
        spec.seed, _random_blocks(spec), _BLOCK, _blocks(spec)
    ),
    "documents": lambda spec, ids: masks.causal() & _documents(spec, ids),
}

#: Explanations of the names, for reports.
PATTERN_NOTES = {
    "window": f"±{WINDOW}",
    "causal_window": f"itself and {WINDOW - 1} back",
    "longformer": "window ±192, 64 anchors",
    "big_bird": "longformer and 3 random blocks of 64",
    "random": "3 blocks of 64 a row",
    "documents": "causal, within a paragraph",
}

_Make = Callable[[Spec, Array], Score]

SCORES: dict[str, _Make] = {
    "scaled_dot": lambda spec, rng: scores.scaled_dot(),
    "bilinear": lambda spec, rng: scores.bilinear.init(
        rng, spec.head_size, num_heads=spec.heads
    ),
    "cosine": lambda spec, rng: scores.cosine.init(rng, num_heads=spec.heads),
    "additive": lambda spec, rng: scores.additive.init(
        rng,
        spec.head_size,
        hidden_size=HIDDEN_SIZE,
        num_heads=spec.heads,
        num_key_heads=spec.key_heads,
    ),
    "mlp": lambda spec, rng: scores.mlp.init(
        rng,
        spec.head_size,
        hidden_sizes=(HIDDEN_SIZE,),
        num_heads=spec.heads,
        num_key_heads=spec.key_heads,
    ),
    "concat": lambda spec, rng: scores.concat.init(
        rng,
        spec.head_size,
        hidden_size=HIDDEN_SIZE,
        num_heads=spec.heads,
        num_key_heads=spec.key_heads,
    ),
}

#: Scores that are not inner products; by default they are measured with one head.
PAIRWISE = ("additive", "mlp", "concat")


def build(spec: Spec, documents: Sequence[bytes]) -> Case:
    """Makes the arrays of a spec from the documents."""
    # Random numbers are from NumPy, as JAX would first compile for each shape.
    random = np.random.default_rng(spec.seed)
    packed = pack(documents, spec.batch, spec.length, spec.seed)
    asking = packed.tokens[:, -spec.queries :]
    query, key, value = (
        embed(tokens, heads, spec.head_size, spec.dtype, random)
        for tokens, heads in (
            (asking, spec.heads),
            (packed.tokens, spec.key_heads),
            (packed.tokens, spec.key_heads),
        )
    )
    mask = PATTERNS[spec.pattern](spec, packed.ids)
    if spec.length <= 4096:
        density = float(np.asarray(mask.to_dense(spec.queries, spec.length)).mean())
    else:
        density = mask.density(spec.queries, spec.length)
    return Case(
        spec,
        query,
        key,
        value,
        cotangent=jnp.asarray(
            random.standard_normal(query.shape, np.float32), spec.dtype
        ),
        score=SCORES[spec.score](spec, jax.random.key(spec.seed)),
        mask=mask,
        density=density,
    )
