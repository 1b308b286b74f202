"""Recurrent layers in one direction or both, and the recurrent encoder."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from attnlab._src import arguments
from attnlab._src.masks.data import document_ids
from attnlab._src.nn.embedding import Embedding
from attnlab._src.nn.recurrent.cells import GRU, Cell, StackedCells
from attnlab._src.types import Array, ArrayLike, PyTree

AnyCell = Cell | StackedCells


class Recurrent(nnx.Module):
    """A recurrent layer: applies a cell to each time step of a sequence.

    Example:
        >>> layer = Recurrent(GRU(3, 5, rngs=nnx.Rngs(0)))
        >>> outputs, state = layer(jnp.ones((2, 7, 3)), lengths=jnp.array([4, 7]))
        >>> outputs.shape, state.shape
        ((2, 7, 5), (2, 5))
    """

    def __init__(self, cell: AnyCell, *, reverse: bool = False):
        """Makes a layer of a cell.

        Args:
            cell: ``GRU``, ``LSTM``, ...
            reverse: whether the layer reads from the last token to the first.
        """
        self.cell, self.reverse = cell, reverse

    def __call__(
        self,
        x: Array,
        state: PyTree | None = None,
        *,
        lengths: ArrayLike | None = None,
        documents: ArrayLike | None = None,
    ) -> tuple[Array, PyTree]:
        """Reads sequences.

        Args:
            x: ``[B, T, in_features]``; values in padding have no effect.
            state: the state before the first token that is read; zeros if not given.
            lengths: ``[B]`` integers: number of tokens before the padding.
            documents: ``[B, T]`` document ids, instead of lengths: the state is reset
                to zeros where the id changes; negative ids mark padding, at any place.

        Returns:
            Outputs ``[B, T, hidden_size]``, 0 at padding; and the state after the last
            token that is read.
        """
        if x.ndim != 3:
            raise ValueError(f"x: expected [B, T, features], got shape {x.shape}")
        real, new = _read(x.shape[:2], lengths, documents, self.reverse)
        if real is not None:
            x = jnp.where(real[..., None], x, 0)  # before it is projected
        gates = self.cell.project(x.swapaxes(0, 1))
        outputs, state = run_cell(
            self.cell, gates, state, real=real, new=new, reverse=self.reverse
        )
        outputs = outputs.swapaxes(0, 1)
        if real is not None:
            outputs = jnp.where(real[..., None], outputs, 0)
        return outputs, state

    def last(self, state: PyTree) -> tuple[Array, ...]:
        """The last output of each direction (here one), ``[B, hidden_size]``."""
        return (self.cell.output(state),)

    @property
    def in_features(self) -> int:
        """Size of the inputs."""
        return self.cell.in_features

    @property
    def out_features(self) -> int:
        """Size of the outputs."""
        return self.cell.hidden_size


class Bidirectional(nnx.Module):
    """Two layers in opposite directions, with concatenated outputs.

    Example:
        >>> rngs = nnx.Rngs(0)
        >>> ahead = Recurrent(GRU(3, 5, rngs=rngs))
        >>> back = Recurrent(GRU(3, 5, rngs=rngs), reverse=True)
        >>> Bidirectional(ahead, back)(jnp.ones((2, 7, 3)))[0].shape
        (2, 7, 10)

    References:
        Schuster, Paliwal, "Bidirectional Recurrent Neural Networks", 1997; Bahdanau,
        Cho, Bengio, 2015, section 3.2.
    """

    def __init__(self, forward: Recurrent, backward: Recurrent):
        """Joins two layers of the same inputs, the second one with ``reverse=True``."""
        if forward.reverse or not backward.reverse:
            raise ValueError(
                "backward: expected a layer with reverse=True, and one with "
                "reverse=False as forward"
            )
        self.forward, self.backward = forward, backward

    def __call__(
        self,
        x: Array,
        state: tuple[PyTree, PyTree] | None = None,
        *,
        lengths: ArrayLike | None = None,
        documents: ArrayLike | None = None,
    ) -> tuple[Array, tuple[PyTree, PyTree]]:
        """As :class:`Recurrent`, with a pair of states: forward, backward."""
        ahead, back = (None, None) if state is None else state
        seen = {"lengths": lengths, "documents": documents}
        first, ahead = self.forward(x, ahead, **seen)
        second, back = self.backward(x, back, **seen)
        return jnp.concatenate([first, second], -1), (ahead, back)

    def last(self, state: tuple[PyTree, PyTree]) -> tuple[Array, ...]:
        """The last outputs: forward after the last token, backward after the first."""
        ahead, back = state
        return (*self.forward.last(ahead), *self.backward.last(back))

    @property
    def in_features(self) -> int:
        """Size of the inputs."""
        return self.forward.in_features

    @property
    def out_features(self) -> int:
        """Size of the outputs of both directions together."""
        return self.forward.out_features + self.backward.out_features


class Encoded(NamedTuple):
    """An encoded sentence, the input of recurrent decoders.

    Attributes:
        states: ``[B, S, features]``, one for each token, 0 at padding.
        last: last output of each direction, ``[B, hidden_size]``.
        positions: ``[B, S]`` int32, -1 marks padding; None: no padding.
    """

    states: Array
    last: tuple[Array, ...]
    positions: Array | None = None


class RecurrentEncoder(nnx.Module):
    """Recurrent encoder: a state for each token, and the last outputs.

    Example:
        >>> encoder = RecurrentEncoder.standard(
        ...     100, features=8, hidden_size=5, bidirectional=True, rngs=nnx.Rngs(0)
        ... )
        >>> encoded = encoder(jnp.zeros((2, 7), int), lengths=jnp.array([4, 7]))
        >>> encoded.states.shape, [x.shape for x in encoded.last]
        ((2, 7, 10), [(2, 5), (2, 5)])

    References:
        Cho et al., 2014, section 2.2; Sutskever et al., "Sequence to Sequence Learning
        with Neural Networks", 2014, section 2; Bahdanau, Cho, Bengio, 2015, section
        3.2.
    """

    def __init__(
        self,
        embedding: Embedding,
        layers: Sequence[Recurrent | Bidirectional],
        *,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs | None = None,
    ):
        """Puts parts together.

        Args:
            embedding: embedding of tokens.
            layers: layers, applied in this order.
            dropout_rate: dropout rate of the outputs between layers.
            rngs: Flax's random streams; needed for dropout.
        """
        if not layers:
            raise ValueError("layers: expected at least one, got none")
        self.embedding, self.layers = embedding, nnx.List(layers)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs) if dropout_rate else None

    @classmethod
    def standard(
        cls,
        vocabulary_size: int,
        *,
        features: int = 512,
        hidden_size: int = 512,
        num_layers: int = 1,
        bidirectional: bool = False,
        cell: Callable[..., AnyCell] = GRU,
        dropout_rate: float = 0.0,
        embedding: Embedding | None = None,
        rngs: nnx.Rngs,
    ) -> "RecurrentEncoder":
        """An encoder of equal layers.

        Args:
            vocabulary_size: V, the number of tokens.
            features: size of an embedding vector, if ``embedding`` is not given.
            hidden_size: size of every cell's output.
            num_layers: number of layers.
            bidirectional: whether each layer reads in both directions.
            cell: ``GRU``, ``LSTM``, or ``cell(in_features, hidden_size, rngs=rngs)``.
            dropout_rate: dropout rate of the embedding, and between layers.
            embedding: an existing embedding to share; a new one if not given.
            rngs: Flax's random streams.
        """
        if embedding is not None:
            features = embedding.table.features
        else:
            embedding = Embedding(
                vocabulary_size, features, dropout_rate=dropout_rate, rngs=rngs
            )

        def one(size: int, **options: Any) -> Recurrent:
            return Recurrent(cell(size, hidden_size, rngs=rngs), **options)

        def both(size: int) -> Bidirectional:
            return Bidirectional(one(size), one(size, reverse=True))

        layer = both if bidirectional else one
        layers: list[Recurrent | Bidirectional] = []
        for _ in range(num_layers):
            layers.append(layer(layers[-1].out_features if layers else features))
        return cls(embedding, layers, dropout_rate=dropout_rate, rngs=rngs)

    def __call__(
        self,
        tokens: ArrayLike,
        *,
        lengths: ArrayLike | None = None,
        documents: ArrayLike | None = None,
    ) -> Encoded:
        """Reads sentences.

        Args:
            tokens: ``[B, S]`` integers.
            lengths: ``[B]`` integers: number of tokens before the padding.
            documents: ``[B, S]`` document ids, instead of lengths; see
                :class:`Recurrent`.
        """
        x = self.embedding(tokens)
        real, _ = _read(tokens.shape, lengths, documents, False)
        state: PyTree = None
        for place, layer in enumerate(self.layers):
            if place and self.dropout is not None:
                x = self.dropout(x)
            x, state = layer(x, lengths=lengths, documents=documents)
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        positions = None if real is None else jnp.where(real, positions, -1)
        return Encoded(x, self.layers[-1].last(state), positions)

    @property
    def out_features(self) -> int:
        """Size of each state."""
        return self.layers[-1].out_features


def run_cell(
    cell: AnyCell,
    gates: Array,
    state: PyTree | None = None,
    *,
    real: Array | None = None,
    new: Array | None = None,
    reverse: bool = False,
) -> tuple[Array, PyTree]:
    """Applies a cell to each time step.

    Args:
        cell: the cell.
        gates: ``[T, B, gate_features]``, the inputs as ``cell.project`` returns them.
        state: the state before; zeros if not given.
        real: ``[B, T]`` booleans; where False (padding) the state does not change.
        new: ``[B, T]`` booleans; where True the state is reset to zeros before the
            step.
        reverse: whether the steps are taken from the last to the first.

    Returns:
        Outputs ``[T, B, hidden_size]``, and the last state.
    """
    zeros = cell.start(gates.shape[1], gates.dtype)

    def choose(where: Array | None, one: PyTree, other: PyTree) -> PyTree:
        if where is None:
            return one
        return jax.tree.map(lambda a, b: jnp.where(where, a, b), one, other)

    def step(state: PyTree, now: tuple) -> tuple[PyTree, Array]:
        gates, real, old = now
        after = cell.step(choose(old, state, zeros), gates)
        after = choose(real, after, state)
        return after, cell.output(after)

    def along(x: Array | None) -> Array | None:
        return None if x is None else x.swapaxes(0, 1)[..., None]

    times = (gates, along(real), along(None if new is None else ~new))
    if state is None:
        state = zeros
    else:
        state = jax.tree.map(lambda x, zero: x.astype(zero.dtype), state, zeros)
    last, outputs = lax.scan(step, state, times, reverse=reverse)
    return outputs, last


def _read(
    shape: Sequence[int],
    lengths: ArrayLike | None,
    documents: ArrayLike | None,
    reverse: bool,
) -> tuple[Array | None, Array | None]:
    """Which tokens are not padding, and which begin a document.

    Each is ``[B, T]`` booleans, or None for all tokens and for none, respectively.
    """
    batch, length = shape
    if lengths is not None and documents is not None:
        raise ValueError("lengths: give lengths or documents, got both")
    slots = jnp.arange(length, dtype=jnp.int32)[None]
    if lengths is not None:
        lengths = jnp.asarray(arguments.integers("lengths", lengths))
        if lengths.shape != (batch,):
            raise ValueError(
                f"lengths: expected one for each of {batch} examples, "
                f"got shape {lengths.shape}"
            )
        inside = (lengths >= 0) & (lengths <= length)
        if not isinstance(inside, jax.core.Tracer) and not inside.all():
            raise ValueError(
                f"lengths: expected 0 to {length}, the length of the sequence, "
                f"got {lengths}"
            )
        return slots < lengths[:, None], None
    if documents is None:
        return None, None
    (ids,) = map(jnp.asarray, document_ids(documents=documents))
    if ids.shape != (batch, length):
        raise ValueError(
            f"documents: expected ids of shape {(batch, length)}, got {ids.shape}"
        )
    real = ids >= 0
    slots = jnp.where(real, slots, length if reverse else -1)
    # Slot of the token read before, skipping padding: it does not separate documents.
    if reverse:
        before = lax.cummin(slots, axis=1, reverse=True)[:, 1:]
        before = jnp.pad(before, ((0, 0), (0, 1)), constant_values=length)
    else:
        before = lax.cummax(slots, axis=1)[:, :-1]
        before = jnp.pad(before, ((0, 0), (1, 0)), constant_values=-1)
    known = (before >= 0) & (before < length)
    other = jnp.take_along_axis(ids, jnp.clip(before, 0, length - 1), 1) != ids
    return real, real & known & other
