"""Greedy decoding and sampling: compiled loops over one step."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab._src.arguments import integers
from attnlab._src.nn.cache import Cache
from attnlab._src.nn.choosing import as_count, as_temperature, as_top_k, as_top_p, draw
from attnlab._src.nn.compiled import compile_once
from attnlab._src.nn.positions import Learned
from attnlab._src.nn.transformer import Decoder
from attnlab._src.types import Array, ArrayLike, PyTree, accumulation_dtype

Step = Callable[[Array, PyTree], tuple[Array, PyTree]]


class Decoded(NamedTuple):
    """Decoded tokens and their scores.

    Attributes:
        tokens: int32 ``[B, length]``, from beam search ``[B, beams, length]``: the
            tokens after the prompt, up to and including the end token, then padding.
        lengths: ``[B]`` or ``[B, beams]``: number of tokens before the padding.
        scores: ``[B]`` or ``[B, beams]``: the sum of the tokens' log-probabilities;
            from beam search divided by the length penalty, best first.
    """

    tokens: Array
    lengths: Array
    scores: Array


def greedy(
    step: Step,
    state: PyTree,
    prompt: ArrayLike,
    *,
    length: int,
    end: int | Sequence[int] | ArrayLike,
    padding: int = 0,
) -> Decoded:
    """Decodes the most probable token in each step.

    If the step is a module, or a method of one, the search is compiled once for each
    shape; the module's weights are arguments of the compiled program, so that changes
    of them take effect. Any other function is traced and compiled in every call, unless
    the whole search is under ``jax.jit``.

    Args:
        step: ``step(tokens [B, T], state) -> (logits [B, T, V], state)``, for instance
            ``decoder.decode``. Every array of its state leads with the batch, so that
            beams can be reordered. Full caches in the state need a slot for each token
            but the last: ``T + length - 1``.
        state: the step's state before the prompt.
        prompt: ``[B, T]`` integers, at least the start token.
        length: greatest number of tokens to decode.
        end: the token that ends a sentence, or several such tokens; decoding stops
            when all sentences have ended.
        padding: token that fills the output after ``end``.

    Raises:
        TypeError, ValueError: if an argument does not fit; the message names it. Also
            if the step changes its module, as dropout does.

    Example:
        >>> step = lambda tokens, state: (jax.nn.one_hot(tokens + 1, 5), state)
        >>> greedy(step, (), jnp.array([[0], [2]]), length=4, end=4).tokens
        Array([[1, 2, 3, 4],
               [3, 4, 0, 0]], dtype=int32)
    """
    given = check(step, state, prompt, length, end, padding)
    return compile_once(_greedy, step, state, *given, length=int(length))


def sample(
    step: Step,
    state: PyTree,
    prompt: ArrayLike,
    rng: Array,
    *,
    length: int,
    end: int | Sequence[int] | ArrayLike,
    padding: int = 0,
    temperature: float | ArrayLike = 1.0,
    top_k: int | ArrayLike | None = None,
    top_p: float | ArrayLike | None = None,
) -> Decoded:
    """Draws the token of each step at random from the model's distribution.

    Args:
        step: see :func:`attnlab.nn.greedy`.
        state: the step's state before the prompt.
        prompt: ``[B, T]`` integers, at least the start token.
        rng: a PRNG key.
        length: greatest number of tokens to decode.
        end: the token that ends a sentence, or several such tokens.
        padding: token that fills the output after ``end``.
        temperature: number that logits are divided by, or one for each example,
            ``[B]``: below 1 the distribution gets sharper, above 1 flatter; 0, or less
            than the smallest normal float32, is greedy.
        top_k: draw only from the k most probable tokens: an int, or ``[B]`` integers.
        top_p: draw only from the fewest most probable tokens whose probabilities sum to
            at least ``top_p``, in (0, 1]. A number, or ``[B]``. See :func:`restrict`
            for both.

    Raises:
        TypeError, ValueError: see :func:`greedy`.

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
    given = check(step, state, prompt, length, end, padding)
    rows = (given[0].shape[0],)
    k = as_top_k(top_k, rows)
    options = (as_temperature(temperature, rows), as_top_p(top_p, rows))
    fixed = {"length": int(length), "top_k": k if isinstance(k, int) else None}
    each = None if isinstance(k, int) else k
    return compile_once(_sample, step, state, *given, rng, *options, each, **fixed)


def _greedy(
    step: Step,
    state: PyTree,
    prompt: Array,
    ends: Array,
    padding: Array,
    *,
    length: int,
) -> Decoded:
    def choose(logits: Array, count: Array) -> Array:
        return logits.argmax(-1)

    return _decode(step, state, prompt, ends, padding, choose, length)


def _sample(
    step: Step,
    state: PyTree,
    prompt: Array,
    ends: Array,
    padding: Array,
    rng: Array,
    temperature: Array,
    top_p: Array | None,
    top_k_each: Array | None,
    *,
    length: int,
    top_k: int | None,
) -> Decoded:
    k = top_k if top_k_each is None else top_k_each

    def choose(logits: Array, count: Array) -> Array:
        return draw(logits, jax.random.fold_in(rng, count), temperature, k, top_p)

    return _decode(step, state, prompt, ends, padding, choose, length)


class _Carry(NamedTuple):
    count: Array
    logits: Array
    found: Decoded
    ended: Array
    state: PyTree


def _decode(
    step: Step,
    state: PyTree,
    prompt: Array,
    ends: Array,
    padding: Array,
    choose: Callable[[Array, Array], Array],
    length: int,
) -> Decoded:
    batch = prompt.shape[0]

    def unfinished(c: _Carry) -> Array:
        return (c.count < length) & ~c.ended.all()

    def body(c: _Carry) -> _Carry:
        chosen = choose(c.logits, c.count).astype(jnp.int32)
        log_p = jax.nn.log_softmax(c.logits)
        gain = jnp.take_along_axis(log_p, chosen[:, None], 1)[:, 0]
        token = jnp.where(c.ended, padding, chosen)
        found = Decoded(
            lax.dynamic_update_index_in_dim(c.found.tokens, token, c.count, 1),
            c.found.lengths + (~c.ended).astype(jnp.int32),
            c.found.scores + jnp.where(c.ended, 0, gain),
        )
        logits, state = step(token[:, None], c.state)
        ended = c.ended | is_one_of(token, ends)
        return _Carry(c.count + 1, last(logits), found, ended, state)

    logits, state = step(prompt, state)
    first = last(logits)
    nothing = Decoded(
        jnp.full((batch, length), padding, jnp.int32),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros(batch, first.dtype),
    )
    start = _Carry(jnp.int32(0), first, nothing, jnp.zeros(batch, bool), state)
    return lax.while_loop(unfinished, body, start).found


def last(logits: Array) -> Array:
    """The logits of the last token, ``[B, T, V] -> [B, V]``, at least float32."""
    return logits[:, -1].astype(accumulation_dtype(logits.dtype))


def is_one_of(tokens: Array, ends: Array) -> Array:
    """Where tokens ``[*]`` are among ``ends [E]``."""
    each = ends.reshape((1,) * tokens.ndim + (-1,))
    return (tokens[..., None] == each).any(-1)


def check(
    step: object,
    state: PyTree,
    prompt: Any,
    length: object,
    end: object,
    padding: Any,
) -> tuple[Array, Array, Array]:
    """Checks the arguments that every search takes.

    Returns:
        Prompt, end tokens ``[E]`` and padding, as int32.

    Raises:
        TypeError, ValueError: if an argument does not fit; the message names it.
    """
    prompt, ends = integers("prompt", prompt), integers("end", end)
    padding = integers("padding", padding)
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ValueError(
            f"prompt: expected [B, T] with at least one token, got {prompt.shape}"
        )
    if ends.ndim > 1:
        raise ValueError(f"end: expected one token or [E], got shape {ends.shape}")
    if padding.ndim:
        raise ValueError(f"padding: expected one token, got shape {padding.shape}")
    _check_room(step, state, prompt.shape[1], as_count("length", length))
    return prompt, ends.reshape(-1), padding


def _check_room(step: object, state: PyTree, given: int, length: int) -> None:
    """Raises if full caches, or learned positions, are too short for the search."""
    # The last token needs no slot: the logits after it are not used.
    taken = given + length - 1
    caches = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Cache))
    for cache in [x for x in caches if isinstance(x, Cache)]:
        held = 0
        if not isinstance(cache.length, jax.core.Tracer):
            with jax.ensure_compile_time_eval():  # known, also where the rest is traced
                held = int(cache.length.max(initial=0))
        beside = f"{taken}{f' besides {held} that are in use' if held else ''}"
        slots = cache.positions.shape[-1]
        if cache.window is None and slots < held + taken:
            raise ValueError(
                f"state: a full cache of {slots} slots is too short for "
                f"{given} tokens of prompt and length={length}, which need "
                f"{beside}; make it by start(length={held + taken}), or use a ring"
            )
        decoder = getattr(step, "__self__", None)
        learned = isinstance(decoder, Decoder) and decoder.embedding.position
        if isinstance(learned, Learned) and learned.table.shape[0] < held + taken:
            raise ValueError(
                f"length: {given} tokens of prompt and length={length} need {beside} "
                f"positions, expected at most the {learned.table.shape[0]} that "
                "Learned has"
            )
