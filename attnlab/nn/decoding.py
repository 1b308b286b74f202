"""Greedy decoding, sampling, beam search: compiled loops over one step.

A step is ``step(tokens [B, T], state) -> (logits [B, T, V], state)``, for instance
``decoder.decode``. Every array of its state leads with the batch, so that beams can be
reordered. Full caches among them need a slot for each token but the last:
``T + length - 1``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.nn.cache import Cache
from attnlab.types import Array, PyTree

Step = Callable[[Array, PyTree], tuple[Array, PyTree]]


class Decoded(NamedTuple):
    """What was decoded.

    Attributes:
        tokens: ``[B, length]`` or, of beams, ``[B, beams, length]``, int32: what
            follows the prompt; ``end`` included, then padding.
        lengths: ``[B]`` or ``[B, beams]``: tokens before the padding.
        scores: ``[B]`` or ``[B, beams]``: the sum of their log-probabilities; of beams
            divided by the length penalty, best first.
    """

    tokens: Array
    lengths: Array
    scores: Array


def greedy(
    step: Step, state: PyTree, prompt: Array, *, length: int, end: int, padding: int = 0
) -> Decoded:
    """The most probable token, one after another.

    Args:
        step: see the module's text.
        state: before the prompt.
        prompt: ``[B, T]`` integers, at least the start token.
        length: tokens to decode at most.
        end: the token that ends a sentence; decoding stops when all have ended.
        padding: what follows ``end``.

    Example:
        >>> step = lambda tokens, state: (jax.nn.one_hot(tokens + 1, 5), state)
        >>> greedy(step, (), jnp.array([[0], [2]]), length=4, end=4).tokens
        Array([[1, 2, 3, 4],
               [3, 4, 0, 0]], dtype=int32)
    """

    def choose(logits: Array, rng: Array) -> Array:
        return logits.argmax(-1)

    rng = jax.random.key(0)  # nobody reads it
    return _decode(step, state, prompt, choose, rng, length, end, padding)


def sample(
    step: Step,
    state: PyTree,
    prompt: Array,
    rng: Array,
    *,
    length: int,
    end: int,
    padding: int = 0,
    temperature: float | Array = 1.0,
    top_k: int | None = None,
    top_p: float | Array | None = None,
) -> Decoded:
    """Tokens drawn at random.

    Args:
        step: see the module's text.
        state: before the prompt.
        prompt: ``[B, T]`` integers, at least the start token.
        rng: a PRNG key.
        length: tokens to decode at most.
        end: the token that ends a sentence.
        padding: what follows ``end``.
        temperature: positive; below 1 sharper, above 1 flatter.
        top_k: only the k most probable tokens.
        top_p: only the fewest most probable tokens whose probabilities reach ``top_p``,
            in (0, 1].

    Example:
        >>> step = lambda tokens, state: (jax.nn.one_hot(tokens + 1, 5), state)
        >>> prompt = jnp.array([[0], [2]])
        >>> sample(step, (), prompt, jax.random.key(0), length=3, end=4, top_k=1).tokens
        Array([[1, 2, 3],
               [3, 4, 0]], dtype=int32)

    References:
        Fan et al., "Hierarchical Neural Story Generation", 2018, section 5.4 (top-k);
        Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020, section
        3.1 (top-p).
    """
    if isinstance(temperature, (int, float)) and not temperature > 0:
        raise ValueError(
            f"temperature: expected a positive number, got {temperature}; for the most "
            "probable token use greedy"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}")
    if isinstance(top_p, (int, float)) and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")

    def choose(logits: Array, rng: Array) -> Array:
        return jax.random.categorical(rng, restrict(logits / temperature, top_k, top_p))

    return _decode(step, state, prompt, choose, rng, length, end, padding)


def restrict(
    logits: Array, top_k: int | None = None, top_p: float | Array | None = None
) -> Array:
    """Logits ``[*, V]`` with -inf for tokens that ``top_k`` or ``top_p`` leaves out.

    Example:
        >>> restrict(jnp.array([2.0, 1.0, -5.0]), top_p=0.9)
        Array([  2.,   1., -inf], dtype=float32)
    """
    if top_k is not None and top_k < logits.shape[-1]:
        least = lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        descending = -jnp.sort(-logits, axis=-1)
        mass = jnp.cumsum(jax.nn.softmax(descending, axis=-1), axis=-1)
        # How many tokens it takes; the first one is always kept.
        count = (mass < top_p).sum(-1, keepdims=True)
        count = jnp.minimum(count, logits.shape[-1] - 1)
        least = jnp.take_along_axis(descending, count, -1)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def _decode(
    step: Step,
    state: PyTree,
    prompt: Array,
    choose: Callable[[Array, Array], Array],
    rng: Array,
    length: int,
    end: int,
    padding: int,
) -> Decoded:
    _check(state, prompt, length)
    batch = prompt.shape[0]

    class Carry(NamedTuple):
        count: Array
        logits: Array
        tokens: Array
        ended: Array
        lengths: Array
        scores: Array
        state: PyTree

    def unfinished(c: Carry) -> Array:
        return (c.count < length) & ~c.ended.all()

    def body(c: Carry) -> Carry:
        found = choose(c.logits, jax.random.fold_in(rng, c.count)).astype(jnp.int32)
        gain = jnp.take_along_axis(jax.nn.log_softmax(c.logits), found[:, None], 1)[
            :, 0
        ]
        token = jnp.where(c.ended, padding, found)
        tokens = lax.dynamic_update_index_in_dim(c.tokens, token, c.count, 1)
        lengths = c.lengths + (~c.ended).astype(jnp.int32)
        scores = c.scores + jnp.where(c.ended, 0, gain)
        ended = c.ended | (token == end)
        logits, state = step(token[:, None], c.state)
        return Carry(
            c.count + 1,
            logits[:, -1].astype(jnp.float32),
            tokens,
            ended,
            lengths,
            scores,
            state,
        )

    logits, state = step(prompt, state)
    start = Carry(
        jnp.int32(0),
        logits[:, -1].astype(jnp.float32),
        jnp.full((batch, length), padding, jnp.int32),
        jnp.zeros(batch, bool),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros(batch, jnp.float32),
        state,
    )
    done = lax.while_loop(unfinished, body, start)
    return Decoded(done.tokens, done.lengths, done.scores)


def beam_search(
    step: Step,
    state: PyTree,
    prompt: Array,
    *,
    beams: int,
    length: int,
    end: int,
    padding: int = 0,
    length_penalty: float = 0.0,
) -> Decoded:
    """The best of what a beam of hypotheses finds.

    A hypothesis that ends leaves the beam; its score is the sum of log-probabilities
    divided by ``((5 + tokens) / 6) ** length_penalty``. Decoding stops when no running
    hypothesis can overtake the worst finished one, or at ``length``, where hypotheses
    that have not ended count as they are.

    Args:
        step: see the module's text.
        state: before the prompt; leaves lead with B.
        prompt: ``[B, T]`` integers, at least the start token.
        beams: hypotheses an example; also how many are returned.
        length: tokens to decode at most.
        end: the token that ends a sentence.
        padding: what follows ``end``.
        length_penalty: at least 0; 0: none.

    Returns:
        Best first, ``[B, beams, length]``; hypotheses that do not exist have a score of
        -inf.

    Example:
        >>> step = lambda tokens, state: (jax.nn.one_hot(tokens + 1, 5), state)
        >>> found = beam_search(step, (), jnp.array([[1]]), beams=2, length=3, end=4)
        >>> found.tokens[0, 0], found.lengths[0, 0]
        (Array([2, 3, 4], dtype=int32), Array(3, dtype=int32))

    References:
        Wu et al., "Google's Neural Machine Translation System", 2016, equation 14.
    """
    _check(state, prompt, length)
    if beams < 1:
        raise ValueError(f"beams: expected at least 1, got {beams}")
    if length_penalty < 0:
        raise ValueError(f"length_penalty: expected at least 0, got {length_penalty}")
    batch = prompt.shape[0]

    def penalty(tokens: Any) -> Array:
        return ((5.0 + jnp.float32(tokens)) / 6.0) ** length_penalty

    class Carry(NamedTuple):
        count: Array
        logits: Array  # [B, beams, V]
        tokens: Array  # [B, beams, length], running
        sums: Array  # [B, beams], running
        finished: Decoded
        state: PyTree

    def unfinished(c: Carry) -> Array:
        # Sums only fall; the penalty of the longest hypothesis is the greatest.
        best = c.sums.max(1) / penalty(length)
        worst = c.finished.scores.min(1)
        return (c.count < length) & (best > worst).any()

    def body(c: Carry) -> Carry:
        gains = jax.nn.log_softmax(c.logits)
        vocabulary = gains.shape[-1]
        sums = (c.sums[..., None] + gains).reshape(batch, -1)
        # Twice as many as beams: at most half of them end.
        best, index = lax.top_k(sums, min(2 * beams, beams * vocabulary))
        parent, token = index // vocabulary, (index % vocabulary).astype(jnp.int32)
        tokens = jnp.take_along_axis(c.tokens, parent[..., None], 1)
        tokens = lax.dynamic_update_index_in_dim(tokens, token, c.count, 2)
        ends = token == end
        last = c.count + 1 == length
        done = Decoded(
            tokens,
            jnp.full(best.shape, c.count + 1),
            jnp.where(ends | last, best / penalty(c.count + 1), -jnp.inf),
        )
        joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), c.finished, done)
        scores, kept = lax.top_k(joined.scores, beams)
        finished = Decoded(
            jnp.take_along_axis(joined.tokens, kept[..., None], 1),
            jnp.take_along_axis(joined.lengths, kept, 1),
            scores,
        )
        running, chosen = lax.top_k(jnp.where(ends, -jnp.inf, best), beams)
        parent = jnp.take_along_axis(parent, chosen, 1)
        token = jnp.take_along_axis(token, chosen, 1)
        example = (jnp.arange(batch)[:, None] * beams + parent).reshape(-1)
        state = jax.tree.map(lambda x: jnp.take(x, example, axis=0), c.state)
        logits, state = step(token.reshape(-1, 1), state)
        return Carry(
            c.count + 1,
            logits[:, -1].astype(jnp.float32).reshape(batch, beams, -1),
            jnp.take_along_axis(tokens, chosen[..., None], 1),
            running,
            finished,
            state,
        )

    logits, state = step(prompt, state)
    logits = logits[:, -1:].astype(jnp.float32)
    empty = jnp.full((batch, beams, length), padding, jnp.int32)
    never = jnp.full((batch, beams), -jnp.inf)
    start = Carry(
        jnp.int32(0),
        jnp.broadcast_to(logits, (batch, beams, logits.shape[-1])),
        empty,
        # One hypothesis to begin with, not as many copies of it.
        never.at[:, 0].set(0),
        Decoded(empty, jnp.zeros((batch, beams), jnp.int32), never),
        jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), state),
    )
    return lax.while_loop(unfinished, body, start).finished


def _check(state: PyTree, prompt: Array, length: int) -> None:
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ValueError(
            f"prompt: expected [B, T] with at least one token, got {prompt.shape}"
        )
    if length < 1:
        raise ValueError(f"length: expected at least 1, got {length}")
    # The last token takes no slot: nobody reads what would follow it.
    taken = prompt.shape[1] + length - 1
    for cache in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Cache)):
        if not isinstance(cache, Cache) or cache.window is not None:
            continue
        held = 0
        if not isinstance(cache.length, jax.core.Tracer):
            with jax.ensure_compile_time_eval():  # known, also where the rest is traced
                held = int(cache.length.max(initial=0))
        if (slots := cache.positions.shape[-1]) < held + taken:
            raise ValueError(
                f"state: a full cache of {slots} slots is too short for "
                f"{prompt.shape[1]} tokens of prompt and length={length}, which need "
                f"{taken}{f' besides {held} that are held' if held else ''}; make it "
                f"by start(length={held + taken}), or take a ring"
            )
