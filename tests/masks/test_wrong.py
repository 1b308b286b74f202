"""Wrong masks: errors name the mask or argument, and what is expected."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import attention, explain, masks, scores
from attnlab._src.types import ArrayLike, Modifier, Score, pytree
from attnlab.masks import Mask

X = jnp.ones((1, 4, 2, 8))
CAUSAL = masks.causal()
ONES = np.ones((1, 1))


def use(mask):
    return lambda: explain(X, X, X, mask=mask)


def rule(fn, *operands):
    return use(masks.predicate(fn, *operands))


def earlier(tile):
    return tile.query_positions >= tile.key_positions


class Undecorated(Mask):
    def visible(self, tile, operands):
        return earlier(tile)


@pytree
class Empty(Mask):
    pass


@pytree
class ReadsItself(Mask):
    array: ArrayLike

    def visible(self, tile, operands):
        return tile.query_positions > self.array


FAILS = r"mask: predicate\(<lambda>\) fails for a tile of 2 queries and 3 keys: .*"
HINT = ".*by jnp.where, '&'.* not by 'if', .* only through its operands"

CASES = {
    "an if": (rule(lambda t, s: t if (t > s).any() else s), TypeError, FAILS + HINT),
    "an and": (rule(lambda t, s: t > s and s > 0), ValueError, FAILS + HINT),
    "an index": (rule(lambda t, s: s[s > 3] > 0), TypeError, FAILS + HINT),
    "NumPy": (rule(lambda t, s: np.asarray(t) > s), TypeError, FAILS + HINT),
    "shapes": (rule(lambda t, s: s[:, :2] > s), TypeError, FAILS + HINT),
    "a part": (
        use(CAUSAL & ~masks.predicate(lambda t, s: t + s)),
        TypeError,
        r"mask: predicate\(<lambda>\) yields int32, expected booleans",
    ),
    "a part of a head": (
        use(masks.per_head([CAUSAL, masks.predicate(lambda t, s: t * s)])),
        TypeError,
        r"mask: predicate\(<lambda>\) yields int32, expected booleans",
    ),
    "an axis too few": (
        rule(lambda t, s: (t > 0)[:, 0]),
        ValueError,
        r"mask: predicate\(<lambda>\) yields shape \(2,\) .* expected \(2, 3\)",
    ),
    "no rule": (
        lambda: masks.predicate(cast(Any, 3)),
        TypeError,
        "fn: expected a function of query and key positions, got 3",
    ),
    "a rule of one argument": (
        lambda: masks.predicate(lambda t: t > 0),
        TypeError,
        r"fn: expected .* the tiles of 0 operands, got <lambda>\(t\)",
    ),
    "a rule without operands": (
        lambda: masks.predicate(lambda t, s: t > s, ONES),
        TypeError,
        r"fn: expected .* the tiles of 1 operands, got <lambda>\(t, s\)",
    ),
    "an operand of text": (
        lambda: masks.predicate(lambda t, s, x: t > s, cast(Any, "x")),
        TypeError,
        r"operands\[0\]: expected numbers or booleans, got <U1",
    ),
    "an operand that wraps": (
        lambda: masks.predicate(lambda t, s, x: t > x, np.array([[2**40]])),
        ValueError,
        r"operands\[0\]: expected integers from .* got 1099511627776; .*x64",
    ),
    "a mask that wraps": (
        use(ReadsItself(np.array(2**40))),
        ValueError,
        "mask: ReadsItself.array: expected integers from .* got 1099511627776",
    ),
    "no pytree": (
        use(Undecorated()),
        TypeError,
        "mask: Undecorated is no pytree; decorate it with attnlab.extend.pytree",
    ),
    "a part that is no pytree": (
        use(CAUSAL & Undecorated()),
        TypeError,
        "mask: Undecorated is no pytree; decorate it with attnlab.extend.pytree",
    ),
    "nothing visible": (
        use(Empty()),
        TypeError,
        r"mask: Empty\(\) fails .* a mask needs a 'visible' of its own",
    ),
    "an array that is no operand": (
        use(ReadsItself(jnp.ones((1, 1)))),
        TypeError,
        r"mask: ReadsItself\(array=None\) fails .* only through its operands",
    ),
    "a function": (
        use(masks.causal),
        TypeError,
        r"mask: expected an attnlab mask, .* got function; call it: causal\(\.\.\.\)",
    ),
    "six axes": (
        use(np.ones((1,) * 4 + (4, 4), bool)),
        ValueError,
        r"mask: shape \(1, 1, 1, 1, 4, 4\) does not fit batch axes \(1,\)",
    ),
    "one mask for heads": (
        lambda: masks.per_head(cast(Any, CAUSAL)),
        TypeError,
        r"masks: expected a list, .* got causal\(\); a single mask holds for all heads",
    ),
    "one of one head for two": (
        use(masks.per_head([CAUSAL])),
        ValueError,
        "mask: per_head got 1 masks for 2 query heads",
    ),
    "two numbers of heads": (
        use(masks.per_head([CAUSAL]) & masks.per_head([CAUSAL] * 2)),
        ValueError,
        "mask: per_head got 1 masks for 2 query heads",
    ),
    "no key": (
        lambda: masks.random_blocks(cast(Any, None), 1, 2, 4),
        TypeError,
        "rng: expected a PRNG key, got NoneType; jax.random.key makes one",
    ),
    "a floating seed": (
        lambda: masks.random_blocks(cast(Any, 1.5), 1, 2, 4),
        TypeError,
        "rng: expected a PRNG key, got float",
    ),
    "a seed that wraps": (
        lambda: masks.random_blocks(2**32, 1, 2, 4),
        ValueError,
        "rng: expected a seed of 32 bits, got 4294967296",
    ),
    "no random blocks": (
        lambda: masks.big_bird(window=1, anchors=1, random_blocks=0, rng=0),
        ValueError,
        "random_blocks: expected at least 1, got 0",
    ),
    "a negative window": (
        lambda: masks.longformer(window=-1),
        ValueError,
        "window: expected at least 0, got -1",
    ),
    "one document": (
        lambda: masks.documents(cast(Any, 3)),
        ValueError,
        r"query_ids: expected \[\*batch, length\], got one id: 3",
    ),
    "no query block": (
        lambda: masks.blocks(np.zeros((0, 2), int), 4),
        ValueError,
        r"indices: expected at least one query block, got shape \(0, 2\)",
    ),
    "a negative length": (
        lambda: CAUSAL.density(-1),
        ValueError,
        "query_length: expected at least 0, got -1",
    ),
    "a floating length": (
        lambda: CAUSAL.to_dense(cast(Any, 8.5)),
        TypeError,
        "query_length: expected an int, got 8.5",
    ),
    "another floating length": (
        lambda: CAUSAL.plan(8, cast(Any, 2.5)),
        TypeError,
        "key_length: expected an int, got 2.5",
    ),
    "floating blocks": (
        lambda: CAUSAL.plan(8, block_size=(4, cast(Any, 2.5))),
        TypeError,
        "block_size: expected an int, got 2.5",
    ),
    "three sizes of blocks": (
        lambda: CAUSAL.plan(8, block_size=cast(Any, (1, 2, 3))),
        ValueError,
        r"block_size: expected an int, or two .* got \(1, 2, 3\)",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_message(name):
    run, kind, message = CASES[name]
    with pytest.raises(kind, match=message):
        run()


def reading(number) -> dict[str, list[dict[str, Any]]]:
    """Options with a mask, a score or a modifier that closes over ``number``."""

    @pytree
    class Ours(Score):
        def compare(self, params, query, key):
            return query @ key.T * number

    @pytree
    class Scaled(Modifier):
        def apply(self, logits, tile, *operands):
            return logits * number

    activation = scores.mlp.init(
        jax.random.key(0), 8, hidden_sizes=(2,), activation=lambda x: x * number
    )
    mask = masks.predicate(lambda t, s: t.astype(jnp.float32) > number)
    return {
        "mask": [dict(mask=mask), dict(mask=~mask | CAUSAL)],
        "heads": [dict(mask=masks.per_head([CAUSAL, mask]))],
        "score": [dict(score=Ours()), dict(score=activation)],
        "modifiers": [dict(modifiers=[Scaled()])],
    }


@pytest.mark.parametrize("implementation", ["reference", None])
@pytest.mark.parametrize("name", reading(0))
def test_what_is_traced_must_be_an_operand(name, implementation):
    """A closed-over tracer is refused: the kernel is traced later, without it."""

    def run(number):
        for options in reading(number)[name]:
            with pytest.raises(TypeError, match="reads a traced array that is none of"):
                attention(X, X, X, implementation=implementation, **options)
        return number

    jax.jit(run)(1.0)
    jax.grad(run)(1.0)
    jax.vmap(run)(jnp.ones(2))


def test_a_known_number_may_be_closed_over():
    for options in sum(reading(jnp.float32(1.0)).values(), []):
        explain(X, X, X, **options)


def test_bounds_may_be_left_out():
    @pytree
    class Own(Mask):
        def visible(self, tile, operands):
            return earlier(tile)

    plan = Own().plan(8, block_size=4)
    assert plan.rows.partial.per_row().tolist() == [[[2, 2]]]
    assert not plan.rows.full.per_row().any()
    np.testing.assert_array_equal(Own().to_dense(8), CAUSAL.to_dense(8))
    found, wanted = (attention(X, X, X, mask=mask) for mask in (Own(), CAUSAL))
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_a_rule_may_yield_one_truth_for_all():
    truths: list[Any] = [True, np.bool_(True)]
    for truth in truths:
        mask = masks.predicate(lambda t, s, truth=truth: truth)
        assert mask.to_dense(2, 3).all()
        assert not (~mask).to_dense(2, 3).any()
        explain(X, X, X, mask=~mask)


def test_two_keys_are_no_fault_of_a_mask():
    """The trial tile of the checks has other sides than the arrays of the mask."""
    ids, key = np.array([0, 1, 1, 0]), X[:, :2]
    for shape in ((4, 2), (4, 1), (1, 2)):
        mask = masks.documents(ids, ids[:2]) & np.ones(shape, bool)
        explain(X, key, key, mask=mask)
