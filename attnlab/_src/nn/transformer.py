"""Encoder, decoder, and the standard encoder-decoder Transformer."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab._src.masks.base import Dense, Mask, as_mask
from attnlab._src.masks.structural import causal
from attnlab._src.nn.blocks import Block, BlockState
from attnlab._src.nn.cache import Cache, check_examples
from attnlab._src.nn.embedding import Embedding
from attnlab._src.nn.stack import Stack
from attnlab._src.nn.standard import last_norm, make_blocks, make_embedding
from attnlab._src.types import Array, ArrayLike, PyTree


class Encoder(nnx.Module):
    """Encodes tokens: one vector for each, which depends on the tokens around it.

    Example:
        >>> encoder = Encoder.standard(100, features=16, num_heads=2, rngs=nnx.Rngs(0))
        >>> encoder(jnp.zeros((2, 5), int)).shape
        (2, 5, 16)
    """

    def __init__(self, embedding: Embedding, stack: Stack):
        self.embedding, self.stack = embedding, stack

    @classmethod
    def standard(
        cls,
        vocabulary_size: int,
        *,
        num_layers: int = 6,
        embedding: Embedding | None = None,
        remat: bool = False,
        scan: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> "Encoder":
        """The encoder of Vaswani et al., 2017, section 3.1; parts can be replaced.

        Args:
            vocabulary_size: V, the number of tokens.
            num_layers: number of blocks.
            embedding: an existing embedding to share; a new one if not given.
            remat: see :class:`Stack`.
            scan: see :class:`Stack`.
            rngs: Flax's random streams.
            **options: further arguments of :func:`make_blocks`.
        """
        blocks = make_blocks(num_layers, rngs=rngs, **options)
        norm = last_norm(blocks, options, rngs)
        embedding = embedding or make_embedding(vocabulary_size, options, rngs)
        return cls(embedding, Stack(blocks, norm=norm, remat=remat, scan=scan))

    def __call__(
        self,
        tokens: ArrayLike,
        *,
        mask: Mask | ArrayLike | None = None,
        positions: Array | None = None,
    ) -> Array:
        """``[*batch, T] -> [*batch, T, features]``.

        Args:
            tokens: integers.
            mask: mask of this call (lengths, documents), combined with the blocks' own.
            positions: ``[T]`` or ``[*batch, T]``; -1 marks an empty slot.
        """
        x = self.embedding(tokens, positions)
        return self.stack(x, mask=mask, query_positions=positions)


class MaskedLanguageModel(nnx.Module):
    """An encoder with an output layer that predicts the masked tokens.

    Example:
        >>> encoder = Encoder.standard(100, features=16, num_heads=2, rngs=nnx.Rngs(0))
        >>> MaskedLanguageModel(encoder)(jnp.zeros((2, 5), int)).shape
        (2, 5, 100)

    References:
        Devlin et al., "BERT", 2019, section 3.1, task 1.
    """

    def __init__(self, encoder: Encoder, head: Callable[[Array], Array] | None = None):
        """Puts parts together.

        Args:
            encoder: encoder of tokens.
            head: output layer, ``[*, features] -> [*, V]``; the embedding's
                :meth:`~Embedding.logits` if not given.
        """
        self.encoder, self.head = encoder, head

    def __call__(
        self,
        tokens: ArrayLike,
        *,
        mask: Mask | ArrayLike | None = None,
        positions: Array | None = None,
    ) -> Array:
        """``[*batch, T] -> [*batch, T, V]``; arguments as of :class:`Encoder`."""
        x = self.encoder(tokens, mask=mask, positions=positions)
        return self.encoder.embedding.logits(x) if self.head is None else self.head(x)


class DecoderState(NamedTuple):
    """State of a decoder between steps; the first axis of every array is the batch.

    Attributes:
        blocks: for each block its cache and its memory.
        memory_mask: which query may attend to which slot of the memory.
    """

    blocks: tuple[BlockState, ...]
    memory_mask: Mask | ArrayLike | None = None


class Decoder(nnx.Module):
    """Maps tokens to the logits of the next token at each position.

    With cross-attention it also attends to a memory (an encoder's output); without, it
    is a language model.

    Example:
        >>> decoder = Decoder.standard(100, features=16, num_heads=2, rngs=nnx.Rngs(0))
        >>> decoder(jnp.zeros((2, 5), int)).shape
        (2, 5, 100)
    """

    def __init__(
        self,
        embedding: Embedding,
        stack: Stack,
        head: Callable[[Array], Array] | None = None,
    ):
        """Puts parts together.

        Args:
            embedding: embedding of tokens.
            stack: blocks with causal self-attention.
            head: output layer, ``[*, features] -> [*, V]``; the embedding's
                :meth:`~Embedding.logits` if not given.
        """
        self.embedding, self.stack, self.head = embedding, stack, head

    @classmethod
    def standard(
        cls,
        vocabulary_size: int,
        *,
        num_layers: int = 6,
        mask: Mask | ArrayLike | Sequence[Mask] | None = None,
        cross_attention: bool = False,
        embedding: Embedding | None = None,
        remat: bool = False,
        scan: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> "Decoder":
        """The decoder of Vaswani et al., 2017, section 3.1; parts can be replaced.

        Args:
            vocabulary_size: V, the number of tokens.
            num_layers: number of blocks.
            mask: mask of the self-attention of all blocks (a mask or an array), or a
                list of one mask for each block; ``causal()`` if not given.
            cross_attention: whether blocks also attend to a memory.
            embedding: an existing embedding to share; a new one if not given.
            remat: see :class:`Stack`.
            scan: see :class:`Stack`.
            rngs: Flax's random streams.
            **options: further arguments of :func:`make_blocks`.
        """
        blocks = make_blocks(
            num_layers,
            mask=causal() if mask is None else mask,
            cross_attention=cross_attention,
            rngs=rngs,
            **options,
        )
        norm = last_norm(blocks, options, rngs)
        embedding = embedding or make_embedding(vocabulary_size, options, rngs)
        return cls(embedding, Stack(blocks, norm=norm, remat=remat, scan=scan))

    def __call__(
        self,
        tokens: ArrayLike,
        memory: Array | None = None,
        *,
        mask: Mask | ArrayLike | None = None,
        memory_mask: Mask | ArrayLike | None = None,
        positions: Array | None = None,
    ) -> Array:
        """``[*batch, T] -> [*batch, T, V]``.

        Args:
            tokens: integers.
            memory: ``[*batch, S, features]``, for cross-attention.
            mask: mask of this call (lengths, documents), combined with the blocks' own.
            memory_mask: mask of the cross-attention in this call.
            positions: ``[T]`` or ``[*batch, T]``; -1 marks an empty slot.
        """
        x = self.stack(
            self.embedding(tokens, positions),
            memory,
            mask=mask,
            memory_mask=memory_mask,
            query_positions=positions,
        )
        return self._logits(x)

    def start(
        self,
        batch: int,
        length: int,
        memory: Array | None = None,
        *,
        memory_mask: Mask | ArrayLike | None = None,
        make_cache: Callable[[Block], Cache] | None = None,
        dtype: Any = None,
    ) -> DecoderState:
        """The state before the first token.

        Args:
            batch: B, the batch size.
            length: number of slots of full caches, one for each token that is read;
                decoding n tokens after a prompt of T takes ``T + n - 1``.
            memory: ``[B, S, features]``, for cross-attention.
            memory_mask: which query may attend to which slot of the memory: a boolean
                array that broadcasts to ``[B, N, T, S]``, or a mask whose arrays have
                B as their first axis.
            make_cache: makes the cache of a block; by the cache policy of its
                self-attention (:class:`CachePolicy`) if not given.
            dtype: type of caches made by policy; the type that each self-attention
                computes in if not given.
        """
        types = iter(self._types() if dtype is None and make_cache is None else ())

        def by_policy(block: Block) -> Cache:
            return block.attention.make_cache(batch, length, next(types, dtype))

        blocks = self.stack.start(
            by_policy if make_cache is None else make_cache, memory
        )
        return DecoderState(blocks, _for_batch(memory_mask, batch))

    def decode(
        self, tokens: ArrayLike, state: DecoderState, *, positions: Array | None = None
    ) -> tuple[Array, DecoderState]:
        """Reads the next tokens, one or several.

        Args:
            tokens: ``[B, T]`` integers.
            state: from :meth:`start`, or returned by the step before.
            positions: ``[B, T]``, ascending, -1 marks padding; the positions that
                follow those in the caches if not given.

        Returns:
            Logits ``[B, T, V]``, and the next state.
        """
        check_examples("tokens", tokens, state.blocks[0].cache.length.shape[0])
        if positions is None:
            positions = state.blocks[0].cache.next_positions(tokens.shape[1])
        x, blocks = self.stack.decode(
            self.embedding(tokens, positions),
            state.blocks,
            memory_mask=state.memory_mask,
            positions=positions,
        )
        return self._logits(x), state._replace(blocks=blocks)

    def _types(self) -> list[jnp.dtype]:
        """The type each self-attention computes in, found by abstract evaluation."""

        def queries(decoder: Decoder, tokens: Array) -> list[Array]:
            x, found = decoder.embedding(tokens, tokens), []
            for block in decoder.stack.each():
                query, x = block.types(x)
                found.append(query)
            return found

        tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        return [query.dtype for query in nnx.eval_shape(queries, self, tokens)]

    def _logits(self, x: Array) -> Array:
        return self.embedding.logits(x) if self.head is None else self.head(x)


class EncoderDecoder(nnx.Module):
    """The standard Transformer: every decoder block attends to the encoder's output.

    Example:
        >>> model = EncoderDecoder.standard(
        ...     100, features=16, num_heads=2, num_layers=2, rngs=nnx.Rngs(0)
        ... )
        >>> model(jnp.zeros((2, 7), int), jnp.zeros((2, 5), int)).shape
        (2, 5, 100)

    References:
        Vaswani et al., 2017.
    """

    def __init__(self, encoder: Encoder, decoder: Decoder):
        self.encoder, self.decoder = encoder, decoder

    @classmethod
    def standard(
        cls,
        vocabulary_size: int,
        target_size: int | None = None,
        *,
        mask: Mask | ArrayLike | Sequence[Mask] | None = None,
        embedding: Embedding | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> "EncoderDecoder":
        """Encoder and decoder of the same sizes; by default the paper's base model.

        Args:
            vocabulary_size: number of source tokens; if ``target_size`` is not given,
                of target tokens, too, and both share one embedding.
            target_size: number of target tokens.
            mask: mask of the self-attention of encoder and decoder (a mask or an
                array), or a list of one mask for each block; in the decoder it is
                combined with ``causal()``.
            embedding: an existing embedding of source tokens (and of target tokens, if
                ``target_size`` is not given); a new one if not given.
            rngs: Flax's random streams.
            **options: further arguments of :meth:`Encoder.standard`.
        """
        encoder = Encoder.standard(
            vocabulary_size, mask=mask, embedding=embedding, rngs=rngs, **options
        )
        if mask is not None:
            each = [causal() & m for m in mask] if isinstance(mask, Sequence) else None
            mask = causal() & mask if each is None else each
        decoder = Decoder.standard(
            vocabulary_size if target_size is None else target_size,
            mask=mask,
            embedding=encoder.embedding if target_size is None else None,
            cross_attention=True,
            rngs=rngs,
            **options,
        )
        return cls(encoder, decoder)

    def __call__(
        self,
        source: ArrayLike,
        target: ArrayLike,
        *,
        source_mask: Mask | ArrayLike | None = None,
        target_mask: Mask | ArrayLike | None = None,
        memory_mask: Mask | ArrayLike | None = None,
    ) -> Array:
        """Logits of the tokens that follow each target token.

        Args:
            source: ``[*batch, S]`` integers.
            target: ``[*batch, T]`` integers, beginning with the start token.
            source_mask: mask of the encoder's self-attention: lengths, documents.
            target_mask: mask of the decoder's self-attention.
            memory_mask: mask of the cross-attention, targets (queries) to sources
                (keys).

        Returns:
            ``[*batch, T, V]``.
        """
        memory = self.encoder(source, mask=source_mask)
        return self.decoder(target, memory, mask=target_mask, memory_mask=memory_mask)


def _for_batch(mask: Mask | ArrayLike | None, batch: int) -> Mask | None:
    """The mask with the batch as first axis of its arrays, as states need it."""
    if mask is None:
        return None

    def spread(part: PyTree) -> PyTree:
        if not isinstance(part, Dense):
            return part
        shape = (1,) * (4 - part.array.ndim) + part.array.shape
        if shape[0] not in (1, batch) or len(shape) > 4:
            return part
        array = jnp.asarray(part.array).reshape(shape)
        return Dense(jnp.broadcast_to(array, (batch, *shape[1:])))

    mask = jax.tree.map(spread, as_mask(mask), is_leaf=lambda x: isinstance(x, Dense))
    for array in jax.tree.leaves(mask):
        if jnp.shape(array)[:1] != (batch,):
            raise ValueError(
                f"memory_mask: expected arrays that lead with a batch of {batch}, got "
                f"shape {jnp.shape(array)} in {mask!r}; jnp.broadcast_to would do"
            )
    return mask
