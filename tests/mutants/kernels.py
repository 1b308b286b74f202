"""Mutants of implementations."""

from tests.mutants.mutant import Mutant

_LAWS = "tests/test_laws.py::"
_TILES = f"{_LAWS}test_7_dropout_does_not_depend_on_tiles"
_CELL = "tests/test_conformance.py::test_cell"
_FULL = f"{_CELL}[scaled_dot-none-none-grouped-float32-index-plain-wide-chunks]"
_CAUSAL = (
    f"{_CELL}[cosine-causal-bias-grouped_square-float32-offset_batch-plain-wide-chunks]"
)
_KEYS = f"{_CELL}[bilinear-causal-bias_keys-grouped-float32-index-dropout-wide-whole]"
_NOT = f"{_CELL}[scaled_dot-not-bias_keys-grouped-float64-index-sinks-square-chunks]"
_STREAMING = (
    f"{_CELL}[scaled_dot-streaming-soft_cap-each-float32-offset-plain-square-chunks]"
)
_BUCKETS = (
    f"{_CELL}[scaled_dot-lengths-t5-grouped-float32-offset-dropout-square-blocks]"
)
_NATIVE = "tests/native/kernel/test_running.py::"
_BATCHED = "tests/implementations/test_batched.py::"
_TPU = "tests/implementations/test_pallas_tpu.py::"

MUTANTS = (
    Mutant(
        "reference-heads",
        "implementations/reference.py",
        "k, v = jnp.repeat(k, group, 0), jnp.repeat(v, group, 0)",
        "k, v = jnp.tile(k, (group, 1, 1)), jnp.tile(v, (group, 1, 1))",
        "The reference gives grouped query heads the wrong key heads.",
        ("tests/ops/test_attention.py::test_against_numpy[reference]",),
    ),
    Mutant(
        "reference-empty-rows",
        "implementations/reference.py",
        "lse = jnp.where(alive, top + jnp.log(safe), -jnp.inf)[:, 0]",
        "lse = jnp.where(alive, top + jnp.log(safe), 0)[:, 0]",
        "In the reference a query that sees nothing has a finite log-sum-exp.",
        (f"{_LAWS}test_2_empty_rows[window-reference]",),
    ),
    Mutant(
        "reference-dropout-scale",
        "implementations/reference.py",
        "scale = 1 / (1 - inputs.dropout_rate)",
        "scale = 1 - inputs.dropout_rate",
        "What dropout keeps does not count for what it drops.",
        (f"{_LAWS}test_7_dropout_rate_and_independence",),
    ),
    Mutant(
        "reference-not-finite",
        "implementations/reference.py",
        "q, k, v = map(finite, (q, k, v))",
        "pass",
        "A NaN that some queries see reaches others.",
        ("tests/test_not_finite.py::test_only_those_who_see_it[product-reference]",),
    ),
    Mutant(
        "tiled-not-finite",
        "implementations/steps.py",
        "value = finite(value)",
        "pass",
        "A NaN in a value reaches queries of its block that do not see it.",
        ("tests/test_not_finite.py::test_only_those_who_see_it[product-tiled]",),
    ),
    Mutant(
        "dropout-threshold",
        "implementations/tile.py",
        "return x >> 8 >=",
        "return x >> 9 >=",
        "Dropout drops twice as much as it should.",
        (f"{_LAWS}test_7_the_mixing_function",),
    ),
    Mutant(
        "dropout-mixing",
        "implementations/tile.py",
        "x ^= x >> 15",
        "x ^= x >> 16",
        "Dropout mixes its words otherwise than the kernels in C++ do.",
        (f"{_LAWS}test_7_the_mixing_function",),
    ),
    Mutant(
        "lost-rescale-of-sums",
        "implementations/steps.py",
        "sums * shrink[:, None] + product",
        "sums + product",
        "Where the running maximum grows, what was summed before is not made smaller.",
        (f"{_TILES}[sizes0]",),
    ),
    Mutant(
        "lost-rescale-of-the-total",
        "implementations/steps.py",
        "total = total * shrink + p.sum(1)",
        "total = total + p.sum(1)",
        "The softmax's denominator is not made smaller where the maximum grows.",
        (f"{_TILES}[sizes0]",),
    ),
    Mutant(
        "tiled-dropout-scale",
        "implementations/steps.py",
        "kept_share = 1 - self._tiles.inputs.dropout_rate",
        "kept_share = 1",
        "What dropout keeps does not count for what it drops.",
        (f"{_TILES}[sizes2]",),
    ),
    Mutant(
        "gradient-through-hidden-pairs",
        "implementations/steps.py",
        "p = jnp.where(seen, jnp.where(bad, jnp.nan, p), 0)",
        "p = jnp.where(bad, jnp.nan, p)",
        "In the backward pass a query sees what the mask hides in partial blocks.",
        (_CAUSAL,),
    ),
    Mutant(
        "missing-delta",
        "implementations/steps.py",
        "delta = (d_output.astype(dtype) * output.astype(dtype)).sum(-1)",
        "delta = 0 * (d_output.astype(dtype) * output.astype(dtype)).sum(-1)",
        "The softmax's gradient lacks its mean.",
        (_FULL,),
    ),
    Mutant(
        "missing-gradient-of-lse",
        "implementations/steps.py",
        "delta = delta - d_lse",
        "delta = delta - 0 * d_lse",
        "What comes in through the log-sum-exp reaches no gradient.",
        (_FULL,),
    ),
    Mutant(
        "gradient-through-dropped-weights",
        "implementations/steps.py",
        "d_p = jnp.where(keep, d_p, 0)",
        "d_p = jnp.where(keep, d_p, d_p)",
        "Weights that dropout drops have a gradient.",
        (_BUCKETS,),
    ),
    Mutant(
        "idle-lanes-work",
        "implementations/batched.py",
        "ranks = jnp.where(works, ranks, jnp.iinfo(jnp.int32).max - self.chunk)",
        "pass",
        "A lane without work computes a chunk of the last row once more.",
        (f"{_BATCHED}test_every_chunk_is_computed_once[causal-11]",),
    ),
    Mutant(
        "batched-shared-gradient",
        "implementations/batched.py",
        "return x.at[kv, ids].add(part.swapaxes(1, 2))",
        "return x.at[kv, ids].set(part.swapaxes(1, 2))",
        "Of the rows that read a block of keys, one adds to its gradient.",
        (_STREAMING,),
    ),
    Mutant(
        "bias-gradient-of-the-last-tile",
        "implementations/schedule.py",
        "return lax.dynamic_update_slice(x, old + part.reshape(shape), start)",
        "return lax.dynamic_update_slice(x, part.reshape(shape), start)",
        "A gradient that many tiles add to is that of the last one.",
        (_KEYS,),
    ),
    Mutant(
        "walk-heads",
        "implementations/schedule.py",
        "return row.head // (self.sizes.N // self.sizes.K)",
        "return row.head % self.sizes.K",
        "Grouped query heads read the wrong key heads.",
        ("tests/ops/test_attention.py::test_against_numpy[tiled]",),
    ),
    Mutant(
        "walk-rank-within-an-interval",
        "implementations/schedule.py",
        "ids = jnp.clip(lo[which] + ranks - start, 0, self.nk - 1)",
        "ids = jnp.clip(lo[which] + ranks, 0, self.nk - 1)",
        "Blocks of a row's second interval are counted from the first one on.",
        (_NOT,),
    ),
    Mutant(
        "walk-one-rank-too-many",
        "implementations/schedule.py",
        "return ids, ranks < total",
        "return ids, ranks <= total",
        "A chunk computes one block more than is alive.",
        (_NOT,),
    ),
    Mutant(
        "walk-last-chunk",
        "implementations/schedule.py",
        "return fulls, -(-(self.total - fulls * self.wide) // self.chunk)",
        "return fulls, (self.total - fulls * self.wide) // self.chunk",
        "Blocks that do not fill a chunk are left out.",
        (_FULL,),
    ),
    Mutant(
        "walk-rest-from-the-start",
        "implementations/schedule.py",
        "first = in_full * w.wide",
        "first = in_full * 0",
        "After chunks of full blocks the walk starts from the first block again.",
        (_FULL,),
    ),
    Mutant(
        "walk-padding-is-a-key",
        "implementations/schedule.py",
        "keys = jnp.where(slots < tiles.sizes.S, slots, -1).reshape(1, -1)",
        "keys = slots.reshape(1, -1)",
        "What fills the last block up counts as keys.",
        (f"{_TILES}[sizes0]",),
    ),
    Mutant(
        "native-window-sides",
        "implementations/native/program.py",
        "return [_WINDOW, limit(mask.left), limit(mask.right), mask.step]",
        "return [_WINDOW, limit(mask.right), limit(mask.left), mask.step]",
        "The native kernel has a window's two sides in the wrong order.",
        (f"{_NATIVE}test_few_queries_of_heads_that_see_different_keys",),
    ),
    Mutant(
        "native-anchor-side",
        "implementations/native/program.py",
        'return [_ANCHOR, int(mask.side == "key")',
        'return [_ANCHOR, int(mask.side == "query")',
        "The native kernel takes anchors that are seen for anchors that see.",
        (_STREAMING,),
    ),
    Mutant(
        "native-bits-of-heads",
        "implementations/native/__init__.py",
        "heads = max(mask.head_count, *(x.shape[1] for x in leaves))",
        "heads = max(x.shape[1] for x in leaves)",
        "A mask for each head that the native kernel does not know is that of head 0.",
        ("tests/test_subclasses.py::test_masks[per_head-native]",),
    ),
    Mutant(
        "native-modifiers",
        "implementations/native/program.py",
        "_SOFT_CAP, _ALIBI, _RELATIVE, _BIAS = range(4)",
        "_ALIBI, _SOFT_CAP, _RELATIVE, _BIAS = range(4)",
        "The native kernel takes a soft cap for ALiBi, and the reverse.",
        (f"{_NATIVE}test_few_queries[product-modified-1]",),
    ),
    Mutant(
        "native-activation",
        "implementations/native/program.py",
        "jax.nn.silu: 3,",
        "jax.nn.silu: 4,",
        "The native kernel computes gelu where silu is asked for.",
        (f"{_NATIVE}test_activations_of_a_perceptron[11-silu]",),
    ),
    Mutant(
        "native-bucket-gradient",
        "implementations/native/program.py",
        "count)].add(gradient)",
        "count)].set(gradient)",
        "A bucket's gradient is that of one offset, not of all that share it.",
        (_BUCKETS,),
    ),
    Mutant(
        "tpu-masked-steps",
        "implementations/pallas_tpu/steps.py",
        "xp.where(active & (rank >= fulls[line]), _MASKED, 0)",
        "xp.where(active & (rank > fulls[line]), _MASKED, 0)",
        "A TPU kernel takes the first partial block of a row for full.",
        (f"{_TPU}test_the_steps_are_the_plan[97-130-causal-2]",),
    ),
    Mutant(
        "tpu-lost-rescale",
        "implementations/pallas_tpu/forward.py",
        "sums[...] *= shrink",
        "sums[...] *= 1",
        "A TPU kernel does not make sums smaller where the maximum grows.",
        (f"{_TPU}test_large_logits_go_the_safe_way[3.0-False]",),
    ),
)
