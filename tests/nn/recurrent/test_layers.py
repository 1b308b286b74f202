"""Cells, layers in both directions, packed documents, padding, the encoder."""

import itertools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import nn
from tests.grid import few
from tests.nn.recurrent import reference

B, T, F, H, V = 3, 7, 5, 11, 13
CELLS = pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])


def close(found, wanted, atol=2e-6):
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=atol)


def shaken(module, seed=0):
    """Adds noise to all parameters, so that biases are not zero."""
    rng = np.random.default_rng(seed)

    def shake(x):
        noise = 0.3 * rng.normal(size=x.shape).astype(np.float32)
        return x + noise if x.dtype == jnp.float32 else x

    return jax.tree.map(shake, module)


def drawn(make, seed=0):
    """The module of ``make()`` with parameters drawn by NumPy, without compiling."""
    rng = np.random.default_rng(seed)

    def draw(x):
        assert x.dtype == jnp.float32
        scale = 0.3 if x.ndim < 2 else x.shape[-2] ** -0.5
        return jnp.asarray(scale * rng.normal(size=x.shape).astype(np.float32))

    return jax.tree.map(draw, jax.eval_shape(make))


def with_nan(table, row):
    """A copy of the table with NaN in one row."""
    table = np.array(table)
    table[row] = np.nan
    return jnp.asarray(table)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def inputs(seed=0, *shape):
    return jax.random.normal(jax.random.key(seed), shape or (B, T, F))


def cell_of(kind, features=F, seed=0):
    return shaken(kind(features, H, rngs=nnx.Rngs(seed)), seed)


def test_gru_is_the_one_of_flax():
    cell = cell_of(nn.GRU)
    other = nnx.GRUCell(F, H, rngs=nnx.Rngs(1))
    other.dense_i.kernel[...] = cell.input.kernel[...]
    # Flax has no bias in the term that the reset gate multiplies.
    cell.bias[...] = jnp.zeros(H)
    assert other.dense_i.bias is not None
    assert cell.input.bias is not None
    other.dense_i.bias[...] = cell.input.bias[...]
    other.dense_h.kernel[...] = cell.recurrent[...]
    mine = theirs = inputs(1, B, H)
    for t in range(3):
        x = inputs(2 + t, B, F)
        mine = cell.step(mine, cell.project(x))
        theirs, _ = other(theirs, x)
        close(cell.output(mine), theirs)


def test_lstm_is_the_one_of_flax():
    cell = cell_of(nn.LSTM)
    other = nnx.OptimizedLSTMCell(F, H, rngs=nnx.Rngs(1))
    other.dense_i.kernel[...] = cell.input.kernel[...]
    assert other.dense_h.bias is not None
    assert cell.input.bias is not None
    other.dense_h.bias[...] = cell.input.bias[...]
    other.dense_h.kernel[...] = cell.recurrent[...]
    mine = nn.LSTMState(inputs(1, B, H), inputs(7, B, H))
    theirs = (mine.cell, mine.hidden)
    for t in range(3):
        x = inputs(2 + t, B, F)
        mine = cell.step(mine, cell.project(x))
        theirs, seen = other(theirs, x)
        close(mine.hidden, seen)
        close(mine.cell, theirs[0])


def test_start_and_forget_bias():
    cell = nn.LSTM(F, H, rngs=nnx.Rngs(0))
    bias = np.zeros(4 * H)
    bias[H : 2 * H] = 1
    assert cell.input.bias is not None
    np.testing.assert_array_equal(cell.input.bias[...], bias)
    for x in jax.tree.leaves(cell.start(B)):
        np.testing.assert_array_equal(x, np.zeros((B, H)))
    turned = nn.GRU(F, H, rngs=nnx.Rngs(0)).recurrent[...].reshape(H, 3, H)
    for g in range(3):
        close(turned[:, g] @ turned[:, g].T, np.eye(H))


@CELLS
@pytest.mark.parametrize("reverse", [False, True])
def test_a_layer_is_its_cell_step_by_step(kind, reverse):
    layer = nn.Recurrent(cell_of(kind), reverse=reverse)
    x = inputs()
    outputs, state = jax.jit(layer)(x)
    exact = reference.in_float64(layer)
    for b in range(B):
        wanted, last = reference.read(exact, np.asarray(x[b], float), np)
        close(outputs[b], wanted)
        close(layer.last(state)[0][b], last)


@CELLS
def test_a_layer_continues_where_it_stopped(kind):
    layer = nn.Recurrent(cell_of(kind))
    x = inputs()
    run = jax.jit(layer)
    whole, end = run(x)
    first, state = run(x[:, :4])
    second, state = run(x[:, 4:], state)
    close(np.concatenate([first, second], 1), whole)
    jax.tree.map(close, state, end)


@pytest.mark.parametrize(
    ("how", "reverse", "kind"),
    few(
        itertools.product(["lengths", "documents"], [False, True], [nn.GRU, nn.LSTM]),
        ("lengths", False, nn.GRU),
        ("documents", True, nn.LSTM),
    ),
)
def test_padding_does_not_exist(kind, reverse, how):
    """Padding, NaN included, affects neither outputs nor gradients."""
    layer = nn.Recurrent(cell_of(kind), reverse=reverse)
    lengths = np.array([4, T, 0])
    real = np.arange(T) < lengths[:, None]
    seen = dict(
        lengths=dict(lengths=lengths), documents=dict(documents=np.where(real, 3, -1))
    )[how]
    x = np.where(real[..., None], inputs(), np.float32(np.nan))

    def run(layer, x):
        outputs, state = layer(x, **seen)
        total = (outputs**2).sum() + sum((s**3).sum() for s in jax.tree.leaves(state))
        return total, (outputs, state)

    both = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))
    (_, (outputs, state)), (d_layer, d_x) = jax.tree.map(np.asarray, both(layer, x))
    np.testing.assert_array_equal(outputs[~real], 0)
    np.testing.assert_array_equal(d_x[~real], 0)
    totals = []
    for b, n in enumerate(lengths[:2]):

        def alone(layer, x):
            outputs, state = layer(x)
            states = jax.tree.leaves(state)
            return (outputs**2).sum() + sum((s**3).sum() for s in states), outputs

        both = jax.jit(jax.value_and_grad(alone, (0, 1), has_aux=True))
        (_, wanted), gradients = jax.tree.map(np.asarray, both(layer, x[b : b + 1, :n]))
        close(outputs[b, :n], wanted[0])
        close(d_x[b, :n], gradients[1][0], 1e-5)
        totals.append(gradients[0])
    summed = jax.tree.map(lambda *g: sum(g), *totals)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), d_layer, summed)
    for x in jax.tree.leaves(state):
        np.testing.assert_array_equal(x[2], np.zeros(H))


@CELLS
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_documents_are_as_if_alone(kind, reverse):
    layer = nn.Recurrent(cell_of(kind), reverse=reverse)
    #                2 tokens, padding, 3 tokens with padding in between, 1 token
    ids = np.array([[4, 4, -1, 0, 0, -1, 0, 2], [7, 7, 7, 7, 7, 7, 7, 7]])
    x = inputs(0, 2, 8, F)
    x = np.asarray(x)
    poisoned = np.where((ids >= 0)[..., None], x, np.float32(np.nan))

    @jax.jit
    def run(layer, x, ids=None):
        return layer(x, documents=ids)

    outputs, state = jax.tree.map(np.asarray, run(layer, poisoned, ids))
    for slots in ([0, 1], [3, 4, 6], [7]):
        wanted, last = jax.tree.map(np.asarray, run(layer, x[:1, slots]))
        close(outputs[0, slots], wanted[0])
        if (0 if reverse else 7) in slots:
            jax.tree.map(lambda a, b: close(a[0], b[0]), state, last)
    close(outputs[1], np.asarray(run(layer, x[1:])[0])[0])
    np.testing.assert_array_equal(outputs[0, [2, 5]], 0)


@CELLS
def test_both_directions(kind):
    layer = nn.Bidirectional(
        nn.Recurrent(cell_of(kind)), nn.Recurrent(cell_of(kind, seed=1), reverse=True)
    )
    lengths = np.array([4, T, 2])
    outputs, state = layer(inputs(), lengths=lengths)
    backwards = nn.Recurrent(layer.backward.cell)
    for b, n in enumerate(lengths):
        x = inputs()[b : b + 1, :n]
        close(outputs[b, :n, :H], layer.forward(x)[0][0])
        turned, _ = backwards(x[:, ::-1])
        close(outputs[b, :n, H:], turned[0, ::-1])
        ahead, back = layer.last(state)
        close(ahead[b], outputs[b, n - 1, :H])
        close(back[b], outputs[b, 0, H:])


def test_stacked_cells_are_layers():
    cells = [cell_of(nn.LSTM), cell_of(nn.GRU, H, 1)]
    stacked = nn.StackedCells(cells)
    outputs, state = nn.Recurrent(stacked)(inputs())
    below, _ = nn.Recurrent(cells[0])(inputs())
    wanted, last = nn.Recurrent(cells[1])(below)
    close(outputs, wanted)
    close(state[1], last)
    flat = inputs(3, B, stacked.state_size)
    parts = jnp.concatenate(jax.tree.leaves(stacked.state(flat)), -1)
    np.testing.assert_array_equal(parts, flat)
    assert stacked.state_size == 3 * H
    assert stacked.gate_features == 4 * H


@pytest.mark.parametrize("bidirectional", [False, True])
@CELLS
def test_encoder(kind, bidirectional):
    encoder = nn.RecurrentEncoder.standard(
        V, features=F, hidden_size=H, num_layers=2, bidirectional=bidirectional,
        cell=kind, rngs=nnx.Rngs(0),
    )  # fmt: skip
    tokens = jax.random.randint(jax.random.key(0), (B, T), 0, V)
    lengths = np.array([4, T, 1])
    encoded = jax.jit(encoder)(tokens, lengths=lengths)
    encoded = jax.tree.map(np.asarray, encoded)
    exact = reference.in_float64(encoder)
    for b, n in enumerate(lengths):
        states, last = reference.encode(exact, np.asarray(tokens[b, :n]), np)
        close(encoded.states[b, :n], states)
        for found, wanted in zip(encoded.last, last, strict=True):
            close(found[b], wanted)
        np.testing.assert_array_equal(encoded.states[b, n:], 0)
        np.testing.assert_array_equal(
            encoded.positions[b], [*range(n), *[-1] * (T - n)]
        )
    assert encoder(tokens).positions is None


def test_dropout_lies_between_layers():
    encoder = nn.RecurrentEncoder.standard(
        V, features=F, hidden_size=H, num_layers=2, dropout_rate=0.5, rngs=nnx.Rngs(0)
    )
    tokens = jnp.zeros((1, T), int)
    first, second = encoder(tokens).states, encoder(tokens).states
    assert float(jnp.abs(first - second).max()) > 1e-3
    encoder.eval()
    states, _ = reference.encode(reference.in_float64(encoder), np.zeros(T, int), np)
    close(encoder(tokens).states[0], states)


def test_half_precision_states():
    cell = nn.LSTM(F, H, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    outputs, state = nn.Recurrent(cell)(inputs(), lengths=np.array([4, T, 2]))
    assert {str(x.dtype) for x in jax.tree.leaves((outputs, state))} == {"bfloat16"}


def test_errors():
    layer = nn.Recurrent(nn.GRU(F, H, rngs=nnx.Rngs(0)))
    x = inputs()
    with pytest.raises(ValueError, match=r"x: expected \[\*, 5\] for this cell"):
        layer(x[..., :4])
    with pytest.raises(ValueError, match=r"x: expected \[B, T, features\]"):
        layer(x[0])
    with pytest.raises(ValueError, match="lengths: give lengths or documents, got bo"):
        layer(x, lengths=np.ones(B, int), documents=np.ones((B, T), int))
    with pytest.raises(ValueError, match="lengths: expected one for each of 3"):
        layer(x, lengths=np.ones(2, int))
    with pytest.raises(TypeError, match="lengths: expected integers, got float"):
        layer(x, lengths=np.ones(B))
    with pytest.raises(ValueError, match=r"documents: expected ids of shape \(3, 7\)"):
        layer(x, documents=np.ones((B, 2), int))
    with pytest.raises(ValueError, match="backward: expected a layer with reverse"):
        nn.Bidirectional(layer, layer)
    with pytest.raises(ValueError, match="cells: expected at least one"):
        nn.StackedCells([])
    with pytest.raises(ValueError, match="cells: expected in_features=11, .* got 5"):
        nn.StackedCells([cast(Any, layer.cell)] * 2)
    with pytest.raises(ValueError, match="layers: expected at least one"):
        nn.RecurrentEncoder(nn.Embedding(V, F, rngs=nnx.Rngs(0)), [])


@pytest.mark.parametrize("lengths", [[3, 9], [-1, 3]])
def test_lengths_that_cannot_be_are_refused(lengths):
    layer = nn.Recurrent(nn.GRU(3, 5, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="lengths: expected 0 to 7"):
        layer(jnp.ones((2, 7, 3)), lengths=jnp.array(lengths))


def test_an_embedding_that_is_given_says_its_size():
    rngs = nnx.Rngs(0)
    embedding = nn.Embedding(11, 3, rngs=rngs)
    encoder = nn.RecurrentEncoder.standard(
        11, hidden_size=5, embedding=embedding, rngs=rngs
    )
    assert encoder(jnp.zeros((2, 7), int)).states.shape == (2, 7, 5)
