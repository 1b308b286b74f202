"""Reference implementations of the papers' recurrent models, in plain loops.

``xp`` is NumPy, for values in float64, or ``jax.numpy``, for gradients. Nothing here
calls attnlab; only the parameters are read from its modules.
"""

import jax
import numpy as np

from attnlab import scores


def in_float64(module):
    """The module with NumPy parameters."""
    return jax.tree.map(
        lambda x: np.asarray(x, np.float64) if x.dtype == np.float32 else x, module
    )


def sigmoid(x, xp):
    return 1 / (1 + xp.exp(-x))


def linear(layer, x):
    y = x @ layer.kernel[...]
    return y if layer.bias is None else y + layer.bias[...]


def gru(cell, h, gates, xp):
    n = cell.hidden_size
    u = cell.recurrent[...]
    r = sigmoid(gates[:n] + h @ u[:, :n], xp)
    z = sigmoid(gates[n : 2 * n] + h @ u[:, n : 2 * n], xp)
    new = xp.tanh(gates[2 * n :] + r * (h @ u[:, 2 * n :] + cell.bias[...]))
    return (1 - z) * new + z * h


def lstm(cell, state, gates, xp):
    h, c = state
    i, f, g, o = xp.split(gates + h @ cell.recurrent[...], 4)
    c = sigmoid(f, xp) * c + sigmoid(i, xp) * xp.tanh(g)
    return sigmoid(o, xp) * xp.tanh(c), c


def step(cell, state, gates, xp):
    if hasattr(cell, "bias"):
        return gru(cell, state, gates, xp)
    return lstm(cell, state, gates, xp)


def output(state):
    return state[0] if isinstance(state, tuple) else state


def unpack(cell, x, xp):
    return x if hasattr(cell, "bias") else tuple(xp.split(x, 2))


def zeros(cell, xp):
    return unpack(cell, xp.zeros(cell.state_size), xp)


def read(layer, xs, xp):
    """The outputs ``[S, hidden_size]`` of one direction, and its last output."""
    state, outputs = zeros(layer.cell, xp), {}
    places = range(len(xs))
    for t in reversed(places) if layer.reverse else places:
        state = step(layer.cell, state, linear(layer.cell.input, xs[t]), xp)
        outputs[t] = output(state)
    return xp.stack([outputs[t] for t in places]), output(state)


def embed(embedding, tokens):
    return embedding.table.embedding[...][tokens] * embedding.scale


def encode(encoder, tokens, xp):
    """The states ``[S, features]``, and the last outputs of the directions."""
    x = embed(encoder.embedding, tokens)
    for layer in encoder.layers:
        directions = (
            [layer.forward, layer.backward] if hasattr(layer, "forward") else [layer]
        )
        found = [read(direction, x, xp) for direction in directions]
        x = xp.concatenate([outputs for outputs, _ in found], 1)
    return x, [last for _, last in found]


def similarity(score, q, k, xp):
    """The score of one query and one key."""
    get = lambda x: x[...][0]
    if isinstance(score, scores.dot):
        return q @ k
    if isinstance(score, scores.scaled_dot):
        return q @ k / np.sqrt(len(q))
    if isinstance(score, scores.bilinear):
        return q @ get(score.weight) @ k
    x = q @ get(score.query_weight) + k @ get(score.key_weight)
    if score.bias is not None:
        x = x + get(score.bias)
    if isinstance(score, scores.additive):  # concat, too
        return get(score.weight) @ xp.tanh(x)
    x = xp.maximum(x, 0)
    for matrix, bias in score.hidden:
        x = xp.maximum(x @ get(matrix) + get(bias), 0)
    return get(score.weight) @ x


def align(attention, query, states, t, window, xp):
    """Context and weights; ``window`` is D of Luong's local-m, or None."""
    size = len(states)
    if not size:
        return xp.zeros(states.shape[1]), xp.zeros(0)
    q = query if attention.query is None else linear(attention.query, query)
    keys = states if attention.key is None else linear(attention.key, states)
    logits = xp.stack([similarity(attention.score, q, k, xp) for k in keys])
    places, factor = np.arange(size), 1
    seen = np.full(size, True) if window is None else abs(places - t) <= window
    if hasattr(attention, "half_width"):
        d = attention.half_width
        hidden = xp.tanh(linear(attention.hidden, query))
        places = places.astype(np.float32)
        p = size * sigmoid(linear(attention.place, hidden)[0], xp)
        seen = xp.abs(places - p) <= d
        factor = xp.exp(-((places - p) ** 2) / (2 * (d / 2) ** 2))
    weights = xp.where(seen, xp.exp(logits - logits.max()), 0)
    row = weights / xp.where(seen.any(), weights.sum(), 1) * factor
    return row @ states, row


def read_out(readout, s, c, y, xp):
    x = xp.concatenate([s, c, y])
    if not hasattr(readout, "hidden"):
        return linear(readout.out, x)
    return linear(readout.out, xp.maximum(*xp.split(linear(readout.hidden, x), 2)))


def plain(decoder, tokens, last, xp):
    c = xp.concatenate(last)
    state = unpack(decoder.cell, xp.tanh(linear(decoder.first, c)), xp)
    logits = []
    for y in embed(decoder.embedding, tokens):
        gates = linear(decoder.cell.input, y) + linear(decoder.context, c)
        state = step(decoder.cell, state, gates, xp)
        logits.append(read_out(decoder.readout, output(state), c, y, xp))
    return xp.stack(logits), None


def bahdanau(decoder, tokens, states, last, window, xp):
    state = unpack(decoder.cell, xp.tanh(linear(decoder.first, last[-1])), xp)
    logits, rows = [], []
    for t, y in enumerate(embed(decoder.embedding, tokens)):
        c, row = align(decoder.attention, output(state), states, t, window, xp)
        gates = linear(decoder.cell.input, y) + linear(decoder.context, c)
        state = step(decoder.cell, state, gates, xp)
        logits.append(read_out(decoder.readout, output(state), c, y, xp))
        rows.append(row)
    return xp.stack(logits), xp.stack(rows)


def luong(decoder, tokens, states, last, window, xp):
    state = unpack(decoder.cell, xp.tanh(linear(decoder.first, last[-1])), xp)
    said = xp.zeros(decoder.combine.out_features)
    logits, rows = [], []
    for t, y in enumerate(embed(decoder.embedding, tokens)):
        gates = linear(decoder.cell.input, y)
        if decoder.feed is not None:
            gates = gates + linear(decoder.feed, said)
        state = step(decoder.cell, state, gates, xp)
        h = output(state)
        c, row = align(decoder.attention, h, states, t, window, xp)
        said = xp.tanh(linear(decoder.combine, xp.concatenate([c, h])))
        logits.append(linear(decoder.head, said))
        rows.append(row)
    return xp.stack(logits), xp.stack(rows)


def translate(model, source, target, window, xp):
    """Logits ``[T, V]`` and weights ``[T, S]`` of one example without padding."""
    states, last = encode(model.encoder, source, xp)
    decoder = model.decoder
    if not hasattr(decoder, "attention"):
        return plain(decoder, target, last, xp)
    run = bahdanau if hasattr(decoder, "context") else luong
    return run(decoder, target, states, last, window, xp)


def language_model(model, tokens, xp):
    """Logits ``[T, V]`` of one example, and the contexts ``[T, features]``."""
    x = embed(model.embedding, tokens)
    for layer in model.layers:
        x, _ = read(layer, x, xp)
    logits, contexts = [], []
    for t, h in enumerate(x):
        if model.attention is None:
            logits.append(linear(model.head, h))
            continue
        c = xp.zeros_like(h)
        if t:
            c, _ = align(model.attention, h, x[:t], t, None, xp)
        combined = xp.tanh(linear(model.combine, xp.concatenate([c, h])))
        logits.append(linear(model.head, combined))
        contexts.append(c)
    return xp.stack(logits), contexts
