"""Functions that make the parts of the standard Transformer."""

from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx

from attnlab._src.masks.base import Mask, as_mask
from attnlab._src.nn.attention import MultiHeadAttention
from attnlab._src.nn.blocks import Block
from attnlab._src.nn.embedding import Embedding
from attnlab._src.nn.layers import FeedForward, PostNorm, PreNorm, Residual
from attnlab._src.nn.positions import Positions, Sinusoidal, refuse_added
from attnlab._src.types import ArrayLike


def make_blocks(
    num_layers: int,
    *,
    features: int = 512,
    num_heads: int = 8,
    num_key_heads: int | None = None,
    hidden_features: int | None = None,
    dropout_rate: float = 0.0,
    mask: Mask | ArrayLike | Sequence[Mask] | None = None,
    cross_attention: bool = False,
    position: Callable[[], Positions | None] | None = None,
    norm: Callable[..., nnx.Module] | None = nnx.LayerNorm,
    residual: Callable[..., Residual] = PostNorm,
    feed_forward: Callable[..., nnx.Module] = FeedForward,
    attention: Callable[..., MultiHeadAttention] = MultiHeadAttention,
    rngs: nnx.Rngs,
) -> list[Block]:
    """Blocks of the standard Transformer; each part can be replaced.

    Args:
        num_layers: number of blocks.
        features: size of the residual stream.
        num_heads: N, the number of query heads.
        num_key_heads: K, the number of key and value heads; N if not given.
        hidden_features: hidden size of the feed-forward layers; four times
            ``features`` if not given.
        dropout_rate: dropout rate of each layer's output before the residual sum.
        mask: mask of the self-attention of all blocks (a mask or an array), or a list
            of one mask for each block.
        cross_attention: whether blocks also attend to a memory (an encoder's output).
        position: called without arguments for each block, returns the ``Positions`` of
            its self-attention: ``Rotary``, ``lambda: Alibi(8)``.
        norm: makes a norm, ``norm(features, rngs=rngs)``; None if ``residual`` takes no
            norm.
        residual: makes the residual connection around a layer: ``PostNorm``,
            ``PreNorm``, ``Residual``, ...
        feed_forward: makes a feed-forward layer,
            ``feed_forward(features, hidden_features, rngs=rngs)``.
        attention: makes an attention layer, ``attention(features, num_heads, ...)``;
            bind further arguments (score, implementation, types) with
            ``functools.partial``.
        rngs: Flax's random streams.

    Example:
        >>> from attnlab import masks
        >>> from attnlab.nn import GatedFeedForward, PreNorm, Rotary
        >>> blocks = make_blocks(
        ...     2,
        ...     features=16,
        ...     num_heads=2,
        ...     mask=[masks.sliding_window(4, 4), masks.full()],
        ...     position=Rotary,
        ...     norm=nnx.RMSNorm,
        ...     residual=PreNorm,
        ...     feed_forward=GatedFeedForward,
        ...     rngs=nnx.Rngs(0),
        ... )
        >>> len(blocks)
        2
    """
    hidden = 4 * features if hidden_features is None else hidden_features
    if mask is not None and not isinstance(mask, Sequence):
        mask = as_mask(mask)
    masks = mask if isinstance(mask, Sequence) else [mask] * num_layers
    if len(masks) != num_layers:
        raise ValueError(f"mask: got {len(masks)} masks for {num_layers} layers")

    def around() -> Residual:
        normed = () if norm is None else (norm(features, rngs=rngs),)
        return residual(*normed, dropout_rate=dropout_rate, rngs=rngs)

    def block(mask: Mask | None) -> Block:
        heads = {"num_key_heads": num_key_heads, "rngs": rngs}
        own = attention(
            features,
            num_heads,
            mask=mask,
            position=_positions(position),
            **heads,
        )
        cross = attention(features, num_heads, **heads) if cross_attention else None
        return Block(
            own,
            feed_forward(features, hidden, rngs=rngs),
            cross_attention=cross,
            residual=around,
        )

    return [block(m) for m in masks]


def _positions(make: Any) -> Positions | None:
    """The positions that ``make()`` returns for one block; None if it is None."""
    if make is None:
        return None
    refuse_added(make)
    if isinstance(make, Positions) or not callable(make):
        name = type(make).__name__
        hint = f"lambda: {name}(...)" if isinstance(make, Positions) else "Rotary"
        raise TypeError(
            "position: expected a callable that returns the positions of a block, got "
            f"an instance of {name}; write position={hint}"
        )
    try:
        return make()
    except TypeError as error:
        if not isinstance(make, type):
            raise
        raise TypeError(
            f"position: {make.__name__} is called without arguments ({error}); write "
            f"position=lambda: {make.__name__}(...)"
        ) from error


def last_norm(
    blocks: Sequence[Block], options: dict[str, Any], rngs: nnx.Rngs
) -> nnx.Module | None:
    """The norm after the last block, for pre-norm blocks only; else None."""
    norm = options.get("norm", nnx.LayerNorm)
    pre_norm = blocks and isinstance(blocks[-1].feed_forward_residual, PreNorm)
    if not pre_norm or norm is None:
        return None
    return norm(options.get("features", 512), rngs=rngs)


def make_embedding(
    vocabulary_size: int, options: dict[str, Any], rngs: nnx.Rngs
) -> Embedding:
    """An embedding with sinusoids, unless the self-attention encodes positions."""
    return Embedding(
        vocabulary_size,
        options.get("features", 512),
        position=None if options.get("position") else Sinusoidal(),
        dropout_rate=options.get("dropout_rate", 0.0),
        rngs=rngs,
    )
