"""Beam search: a compiled loop that decodes several hypotheses of each example."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnlab._src.nn.choosing import as_count
from attnlab._src.nn.compiled import compile_once
from attnlab._src.nn.decoding import Decoded, Step, check, is_one_of, last
from attnlab._src.types import Array, ArrayLike, PyTree


def beam_search(
    step: Step,
    state: PyTree,
    prompt: ArrayLike,
    *,
    beams: int,
    length: int,
    end: int | Sequence[int] | ArrayLike,
    padding: int = 0,
    length_penalty: float | ArrayLike = 0.0,
) -> Decoded:
    """Decodes with beam search and returns the best hypotheses.

    A hypothesis that ends leaves the beam; its score is the sum of log-probabilities
    divided by ``((5 + tokens) / 6) ** length_penalty``. Decoding stops when no running
    hypothesis can reach a higher score than the worst finished one, or at ``length``,
    where running hypotheses are scored as if they had ended.

    Args:
        step: see :func:`attnlab.nn.greedy`.
        state: the step's state before the prompt; its arrays lead with B.
        prompt: ``[B, T]`` integers, at least the start token.
        beams: number of hypotheses of each example that are kept, and returned.
        length: greatest number of tokens to decode.
        end: the token that ends a sentence, or several such tokens.
        padding: token that fills the output after ``end``.
        length_penalty: exponent, at least 0; 0 is no penalty.

    Returns:
        Hypotheses ``[B, beams, length]``, best first. If there are fewer than ``beams``
        of them, the rest has a score of -inf.

    Raises:
        TypeError, ValueError: if an argument does not fit; the message names it. Also
            if the step changes its module, as dropout does.

    Example:
        >>> step = lambda tokens, state: (jax.nn.one_hot(tokens + 1, 5), state)
        >>> found = beam_search(step, (), jnp.array([[1]]), beams=2, length=3, end=4)
        >>> found.tokens[0, 0], found.lengths[0, 0]
        (Array([2, 3, 4], dtype=int32), Array(3, dtype=int32))

    References:
        Wu et al., "Google's Neural Machine Translation System", 2016, equation 14.
    """
    given = check(step, state, prompt, length, end, padding)
    _check_state(state, given[0].shape[0])
    fixed = {"beams": as_count("beams", beams), "length": int(length)}
    penalty = _as_penalty(length_penalty)
    return compile_once(_search, step, state, *given, penalty, **fixed)


class _Carry(NamedTuple):
    count: Array
    logits: Array  # [B, beams, V]
    tokens: Array  # [B, beams, length], running
    sums: Array  # [B, beams], running
    finished: Decoded
    state: PyTree


def _search(
    step: Step,
    state: PyTree,
    prompt: Array,
    ends: Array,
    padding: Array,
    length_penalty: Array,
    *,
    beams: int,
    length: int,
) -> Decoded:
    batch = prompt.shape[0]

    def penalty(tokens: int | Array, like: Array) -> Array:
        tokens = jnp.asarray(tokens, like.dtype)
        return ((5.0 + tokens) / 6.0) ** length_penalty.astype(like.dtype)

    def unfinished(c: _Carry) -> Array:
        # An upper bound: sums only decrease, and the penalty grows with the length.
        best = c.sums.max(1) / penalty(length, c.sums)
        worst = c.finished.scores.min(1)
        return (c.count < length) & (best > worst).any()

    def body(c: _Carry) -> _Carry:
        gains = jax.nn.log_softmax(c.logits)
        vocabulary = gains.shape[-1]
        sums = (c.sums[..., None] + gains).reshape(batch, -1)
        # Each hypothesis has ends.size continuations that end it. With these many
        # candidates, at least ``beams`` are left that go on.
        candidates = min((1 + ends.size) * beams, beams * vocabulary)
        best, index = lax.top_k(sums, candidates)
        parent, token = index // vocabulary, (index % vocabulary).astype(jnp.int32)
        tokens = jnp.take_along_axis(c.tokens, parent[..., None], 1)
        tokens = lax.dynamic_update_index_in_dim(tokens, token, c.count, 2)
        ended = is_one_of(token, ends)
        stops = ended | (c.count + 1 == length)
        done = Decoded(
            tokens,
            jnp.full(best.shape, c.count + 1),
            jnp.where(stops, best / penalty(c.count + 1, best), -jnp.inf),
        )
        joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), c.finished, done)
        scores, kept = lax.top_k(joined.scores, beams)
        finished = Decoded(
            jnp.take_along_axis(joined.tokens, kept[..., None], 1),
            jnp.take_along_axis(joined.lengths, kept, 1),
            scores,
        )
        running, chosen = lax.top_k(jnp.where(ended, -jnp.inf, best), beams)
        parent = jnp.take_along_axis(parent, chosen, 1)
        token = jnp.take_along_axis(token, chosen, 1)
        first = beams * jnp.arange(batch, dtype=jnp.int32)[:, None]
        example = (first + parent).reshape(-1)
        state = jax.tree.map(lambda x: jnp.take(x, example, axis=0), c.state)
        logits, state = step(token.reshape(-1, 1), state)
        return _Carry(
            c.count + 1,
            last(logits).reshape(batch, beams, -1),
            jnp.take_along_axis(tokens, chosen[..., None], 1),
            running,
            finished,
            state,
        )

    logits, state = step(prompt, state)
    first = last(logits)[:, None]
    empty = jnp.full((batch, beams, length), padding, jnp.int32)
    never = jnp.full((batch, beams), -jnp.inf, first.dtype)
    start = _Carry(
        jnp.int32(0),
        jnp.broadcast_to(first, (batch, beams, first.shape[-1])),
        empty,
        # The beam starts with one hypothesis, not with copies of it.
        never.at[:, 0].set(0),
        Decoded(empty, jnp.zeros((batch, beams), jnp.int32), never),
        jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), state),
    )
    return lax.while_loop(unfinished, body, start).finished


def _check_state(state: PyTree, batch: int) -> None:
    for path, array in jax.tree.leaves_with_path(state):
        if jnp.shape(array)[:1] != (batch,):
            raise ValueError(
                f"state: expected arrays that lead with the batch of {batch}, as beams "
                f"are reordered along it, got shape {jnp.shape(array)} at "
                f"state{jax.tree_util.keystr(path)}; jnp.broadcast_to would do"
            )


def _as_penalty(given: object) -> Array:
    known = not isinstance(given, jax.core.Tracer)
    if not isinstance(given, (int, float, np.number, np.ndarray, jax.Array)):
        raise TypeError(
            f"length_penalty: expected a number, got {type(given).__name__}"
        )
    if jnp.ndim(given) or (known and not given >= 0):
        got = f"shape {jnp.shape(given)}" if jnp.ndim(given) else given
        raise ValueError(f"length_penalty: expected a number, at least 0, got {got}")
    return jnp.asarray(given, float)
