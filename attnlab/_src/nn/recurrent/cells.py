"""Recurrent cells: GRU, LSTM, and stacks of them."""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from attnlab._src.nn.parameters import GLOROT, ZEROS, Initializer, named
from attnlab._src.nn.projection import projection
from attnlab._src.types import Array, PyTree

#: Default initializer of weights of the state (Saxe et al., 2014).
ORTHOGONAL = nnx.initializers.orthogonal()


class Cell(nnx.Module):
    """Base class of recurrent cells.

    ``project`` maps the inputs of all time steps to gates at once; ``step`` then
    computes the states one by one. A subclass sets ``gates`` and defines ``step``; if
    its state is more than its output, also ``state_size``, ``state`` and ``output``.
    """

    #: Number of vectors of ``hidden_size`` that an input is projected to.
    gates: ClassVar[int]

    def __init__(
        self,
        in_features: int,
        hidden_size: int,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Initializer = GLOROT,
        recurrent_init: Initializer = ORTHOGONAL,
        bias_init: Initializer = ZEROS,
        rngs: nnx.Rngs,
    ):
        """Makes the weights and bias of inputs, and the weights of the state.

        Args:
            in_features: size of the inputs.
            hidden_size: size of the output.
            dtype: type of the computation; that of inputs and parameters if not given.
            param_dtype: type of the parameters.
            kernel_init: initializer of the weights of inputs.
            recurrent_init: initializer of the weights of the state, used per gate.
            bias_init: initializer of the biases.
            rngs: Flax's random streams.
        """
        self.hidden_size = hidden_size
        self.input = projection(
            in_features,
            self.gates * hidden_size,
            use_bias=True,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )
        square = (hidden_size, hidden_size)
        weights = [
            recurrent_init(rngs.params(), square, param_dtype)
            for _ in range(self.gates)
        ]
        self.recurrent = nnx.Param(jnp.concatenate(weights, 1), **named(None, "hidden"))

    @property
    def in_features(self) -> int:
        """Size of the inputs."""
        return self.input.in_features

    @property
    def gate_features(self) -> int:
        """Size of what :meth:`project` returns."""
        return self.gates * self.hidden_size

    @property
    def state_size(self) -> int:
        """How many numbers the state of one example has."""
        return self.hidden_size

    def project(self, x: Array) -> Array:
        """``[*, in_features] -> [*, gate_features]``: for all time steps at once."""
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"x: expected [*, {self.in_features}] for this cell, got {x.shape}"
            )
        return self.input(x)

    def start(self, batch: int, dtype: DTypeLike = jnp.float32) -> PyTree:
        """A state of zeros; its arrays lead with ``batch``."""
        return self.state(jnp.zeros((batch, self.state_size), dtype))

    def state(self, x: Array) -> PyTree:
        """The state made from an array ``[*, state_size]``."""
        return x

    def output(self, state: PyTree) -> Array:
        """The output of the cell in this state: ``[*, hidden_size]``."""
        return state

    def step(self, state: PyTree, gates: Array) -> PyTree:
        """The next state.

        Args:
            state: the state before.
            gates: ``[*, gate_features]``, the input as :meth:`project` returns it.
        """
        raise NotImplementedError

    def _turned(self, output: Array, dtype: DTypeLike) -> Array:
        return output @ self.recurrent[...].astype(dtype)


class GRU(Cell):
    """Gated recurrent unit, with a reset gate r and an update gate z.

    ::

        r  = sigmoid(x W_r + b_r + h U_r)
        z  = sigmoid(x W_z + b_z + h U_z)
        n  = tanh(x W_n + b_n + r * (h U_n + bias))
        h' = (1 - z) * n + z * h

    The reset gate is applied after the product with U_n, as in cuDNN, PyTorch and Flax
    (Cho et al. apply it to h before), and so also to the bias of that product.
    ``input`` holds W and b, ``recurrent`` U, in PyTorch's order r, z, n. PyTorch also
    has state biases for r and z; to convert weights, add them to b.

    Example:
        >>> cell = GRU(3, 5, rngs=nnx.Rngs(0))
        >>> gates = cell.project(jnp.ones((7, 2, 3)))  # for 7 time steps
        >>> cell.step(cell.start(2), gates[0]).shape
        (2, 5)

    References:
        Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder for
        Statistical Machine Translation", 2014, section 2.3; Chung et al., "Empirical
        Evaluation of Gated Recurrent Neural Networks on Sequence Modeling", 2014,
        section 3.2.
    """

    gates = 3

    def __init__(
        self,
        in_features: int,
        hidden_size: int,
        *,
        param_dtype: DTypeLike = jnp.float32,
        bias_init: Initializer = ZEROS,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        """See :class:`Cell`."""
        super().__init__(
            in_features,
            hidden_size,
            param_dtype=param_dtype,
            bias_init=bias_init,
            rngs=rngs,
            **options,
        )
        bias = bias_init(rngs.params(), (hidden_size,), param_dtype)
        self.bias = nnx.Param(bias, **named("hidden"))

    def step(self, state: Array, gates: Array) -> Array:
        """See :class:`Cell`."""
        r, z, n = jnp.split(gates, 3, -1)
        of_r, of_z, of_n = jnp.split(self._turned(state, gates.dtype), 3, -1)
        r, z = jax.nn.sigmoid(r + of_r), jax.nn.sigmoid(z + of_z)
        n = jnp.tanh(n + r * (of_n + self.bias.astype(gates.dtype)[None]))
        return (1 - z) * n + z * state


class LSTMState(NamedTuple):
    """The state of an LSTM.

    Attributes:
        hidden: ``[*, hidden_size]``, h, the output.
        cell: ``[*, hidden_size]``, c, the memory.
    """

    hidden: Array
    cell: Array


class LSTM(Cell):
    """Long short-term memory, with input gate i, forget gate f and output gate o.

    ::

        i  = sigmoid(x W_i + b_i + h U_i)
        f  = sigmoid(x W_f + b_f + h U_f)
        g  = tanh(x W_g + b_g + h U_g)
        o  = sigmoid(x W_o + b_o + h U_o)
        c' = f * c + i * g
        h' = o * tanh(c')

    ``input`` holds W and b, ``recurrent`` U, in PyTorch's order i, f, g, o; b is the
    sum of PyTorch's two biases. The bias of the forget gate starts at 1.

    Example:
        >>> cell = LSTM(3, 5, rngs=nnx.Rngs(0))
        >>> state = cell.step(cell.start(2), cell.project(jnp.ones((2, 3))))
        >>> cell.output(state).shape
        (2, 5)

    References:
        Hochreiter, Schmidhuber, "Long Short-Term Memory", 1997; Gers et al., "Learning
        to Forget", 2000 (the forget gate); Jozefowicz et al., "An Empirical Exploration
        of Recurrent Network Architectures", 2015, section 2.2 (its bias).
    """

    gates = 4

    def __init__(
        self,
        in_features: int,
        hidden_size: int,
        *,
        bias_init: Initializer = ZEROS,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        """See :class:`Cell`; 1 is added to the bias of the forget gate."""

        def keep(*arguments: Any, **types: Any) -> Array:
            bias = bias_init(*arguments, **types)
            return bias.at[hidden_size : 2 * hidden_size].add(1)

        super().__init__(in_features, hidden_size, bias_init=keep, rngs=rngs, **options)

    @property
    def state_size(self) -> int:
        """See :class:`Cell`."""
        return 2 * self.hidden_size

    def state(self, x: Array) -> LSTMState:
        """See :class:`Cell`."""
        return LSTMState(*jnp.split(x, 2, -1))

    def output(self, state: LSTMState) -> Array:
        """See :class:`Cell`."""
        return state.hidden

    def step(self, state: LSTMState, gates: Array) -> LSTMState:
        """See :class:`Cell`."""
        gates = gates + self._turned(state.hidden, gates.dtype)
        i, f, g, o = jnp.split(gates, 4, -1)
        cell = jax.nn.sigmoid(f) * state.cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        return LSTMState(jax.nn.sigmoid(o) * jnp.tanh(cell), cell)


class StackedCells(nnx.Module):
    """Several cells on top of each other, used as one cell.

    For decoders that feed their output back. Otherwise a sequence of
    :class:`Recurrent` layers is faster, as each projects all its inputs at once.

    Example:
        >>> rngs = nnx.Rngs(0)
        >>> cell = StackedCells([LSTM(3, 5, rngs=rngs), LSTM(5, 5, rngs=rngs)])
        >>> state = cell.step(cell.start(2), cell.project(jnp.ones((2, 3))))
        >>> cell.output(state).shape
        (2, 5)
    """

    def __init__(self, cells: Sequence[Cell]):
        """Stacks cells, the lowest first."""
        if not cells:
            raise ValueError("cells: expected at least one, got none")
        for below, cell in zip(cells[:-1], cells[1:], strict=True):
            if cell.in_features != below.hidden_size:
                raise ValueError(
                    f"cells: expected in_features={below.hidden_size}, the hidden_size "
                    f"of the cell below, got {cell.in_features}"
                )
        self.cells = nnx.List(cells)

    @property
    def in_features(self) -> int:
        """Size of the inputs, those of the lowest cell."""
        return self.cells[0].in_features

    @property
    def hidden_size(self) -> int:
        """Size of the output, that of the highest cell."""
        return self.cells[-1].hidden_size

    @property
    def gate_features(self) -> int:
        """Size of what ``project`` returns, the gates of the lowest cell."""
        return self.cells[0].gate_features

    @property
    def state_size(self) -> int:
        """How many numbers the states of all cells have together, for one example."""
        return sum(cell.state_size for cell in self.cells)

    def project(self, x: Array) -> Array:
        """See :class:`Cell`."""
        return self.cells[0].project(x)

    def start(self, batch: int, dtype: DTypeLike = jnp.float32) -> PyTree:
        """See :class:`Cell`."""
        return tuple(cell.start(batch, dtype) for cell in self.cells)

    def state(self, x: Array) -> PyTree:
        """See :class:`Cell`."""
        states = []
        for cell in self.cells:
            own, x = jnp.split(x, [cell.state_size], -1)
            states.append(cell.state(own))
        return tuple(states)

    def output(self, state: PyTree) -> Array:
        """See :class:`Cell`."""
        return self.cells[-1].output(state[-1])

    def step(self, state: PyTree, gates: Array) -> PyTree:
        """See :class:`Cell`."""
        (lowest, *others), (own, *rest) = self.cells, state
        following = [lowest.step(own, gates)]
        x = lowest.output(following[0])
        for cell, own in zip(others, rest, strict=True):
            following.append(cell.step(own, cell.project(x)))
            x = cell.output(following[-1])
        return tuple(following)
