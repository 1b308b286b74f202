"""Mutants of masks and planning."""

from tests.mutants.mutant import Mutant

_LAWS = "tests/test_laws.py::"
_MASKS = "tests/masks/test_masks.py::"
_PLANS = "tests/masks/test_planning.py::"
_SOUND = f"{_PLANS}test_sound_and_the_complement_too"

MUTANTS = (
    Mutant(
        "full-blocks-with-empty-slots",
        "masks/planning.py",
        "whole = rows.occupied[:, None, :, None]",
        "whole = rows.occupied[:, None, :, None] | True",
        "A block with an empty query slot counts as full.",
        ("tests/masks/test_planning.py::test_given_positions_are_sound",),
    ),
    Mutant(
        "window-left",
        "masks/structural.py",
        "else t - self.left)",
        "else t - self.left + 1)",
        "A window ends one position too early on the left.",
        (f"{_LAWS}test_5_window_bounds_are_inclusive[1-1]",),
    ),
    Mutant(
        "window-right",
        "masks/structural.py",
        "result = result & (s - self.right <= t)",
        "result = result & (s - self.right < t)",
        "A window ends one position too early on the right.",
        (f"{_LAWS}test_5_window_bounds_are_inclusive[1-1]",),
    ),
    Mutant(
        "dilated-step",
        "masks/structural.py",
        "result = result & ((s - t) % self.step == 0)",
        "result = result & (s % self.step == 0)",
        "A dilated window counts its steps from position 0, not from the query.",
        (f"{_MASKS}test_structural_masks_and_their_repr[dilated_window(4, 5, 3)]",),
    ),
    Mutant(
        "window-plan-last-block",
        "masks/structural.py",
        "else plus(last, right + 1)",
        "else plus(last, right)",
        "A plan leaves out the block that holds only a window's last position.",
        (f"{_SOUND}[window]",),
    ),
    Mutant(
        "window-plan-transposed",
        "masks/structural.py",
        "left, right = right, left",
        "left, right = left, right",
        "The plan of keys has the window of queries.",
        (f"{_SOUND}[one_sided]",),
    ),
    Mutant(
        "chunk-plan-spans",
        "masks/structural.py",
        "same = xp.where(first == last, hi, lo)",
        "same = hi",
        "A block of queries from two chunks has full blocks.",
        (f"{_SOUND}[chunked]",),
    ),
    Mutant(
        "anchor-sees-all",
        "masks/patterns.py",
        "masks = [Anchor(runs, side) for side in sides]",
        'masks = [Anchor(runs, "key") for side in sides]',
        "see_all=True has no effect: anchors see no more than others.",
        (
            f"{_MASKS}test_structural_masks_and_their_repr"
            "[(anchor([0:2], seen) | anchor([0:2], seeing))]",
        ),
    ),
    Mutant(
        "document-padding",
        "masks/data.py",
        "return (query_ids == key_ids) & (query_ids >= 0)",
        "return (query_ids == key_ids) & (query_ids == query_ids)",
        "Padding of documents is a document of its own.",
        (f"{_MASKS}test_documents",),
    ),
    Mutant(
        "length-inclusive",
        "masks/data.py",
        "result.append(Operand(slots < lengths))",
        "result.append(Operand(slots <= lengths))",
        "The first slot of padding counts as a token.",
        (f"{_MASKS}test_lengths",),
    ),
    Mutant(
        "heads-in-reverse",
        "masks/per_head.py",
        "return lax.switch(part, branches, operands)",
        "return lax.switch(len(branches) - 1 - part, branches, operands)",
        "per_head gives its masks to the heads in reverse order.",
        (f"{_MASKS}test_per_head",),
    ),
    Mutant(
        "random-blocks-transposed",
        "masks/layouts.py",
        "(jnp.argsort(b)[:, None] - shifts[None]) % num_blocks",
        "(jnp.argsort(b)[:, None] + shifts[None]) % num_blocks",
        "The plan of keys knows other random blocks than that of queries.",
        (f"{_SOUND}[drawn]",),
    ),
    Mutant(
        "layout-askew",
        "masks/lists.py",
        "+ (not (aligned and rows.starts_at_zero))",
        "+ 0 * (not (aligned and rows.starts_at_zero))",
        "Where blocks do not fit a layout's, a plan leaves out the last of these.",
        (f"{_SOUND}[blocks]",),
    ),
    Mutant(
        "partly-covered-is-full",
        "masks/geometry.py",
        "last = xp.minimum(self._slot(hi) // self.size, self.length // self.size)",
        "last = xp.minimum(-(-self._slot(hi) // self.size), self.length // self.size)",
        "A block that is covered in part counts as full.",
        (f"{_SOUND}[prefix]",),
    ),
    Mutant(
        "full-is-partial-too",
        "masks/planning.py",
        "return Live(certain, difference(possible, certain))",
        "return Live(certain, possible)",
        "Full blocks are listed among the partial ones, too.",
        (f"{_SOUND}[causal]",),
    ),
    Mutant(
        "full-is-never-told",
        "masks/planning.py",
        "certain = merge(certain)",
        "certain = merge(certain._replace(hi=certain.lo))",
        "No block is full: the mask is evaluated everywhere.",
        (f"{_PLANS}test_structural_plans_are_tight[causal-sizes0]",),
    ),
    Mutant(
        "incomplete-row-is-full",
        "masks/planning.py",
        'if rows.side == "key" and rows.length % rows.size:',
        'if rows.side == "query" and rows.length % rows.size:',
        "A last block of keys that is not complete counts as full.",
        (
            f"{_PLANS}"
            "test_a_block_that_holds_more_than_the_keys_is_partial_from_both_sides",
        ),
    ),
    Mutant(
        "plan-without-offset",
        "masks/planning.py",
        'if position_kinds[0] == "offset" else 0',
        'if position_kinds[0] == "nothing" else 0',
        "Plans do not know the queries' offset.",
        (f"{_LAWS}test_4_offsets_select_rows[window-tiled]",),
    ),
    Mutant(
        "keys-of-full-blocks-are-dead",
        "masks/liveness.py",
        ".astype(jnp.int32) * bq",
        ".astype(jnp.int32) * 0",
        "A key that is seen in full blocks only counts as dead.",
        (f"{_PLANS}test_what_is_alive_is_what_somebody_sees[in full blocks]",),
    ),
)
