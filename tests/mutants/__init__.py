"""Mutants: faults inserted one at a time, and the tests that must fail.

``python -m tests.mutants`` runs them: see ``__main__.py``.
"""

from tests.mutants import kernels, masks, modules, operations
from tests.mutants.mutant import Mutant

MUTANTS: tuple[Mutant, ...] = (
    *operations.MUTANTS,
    *masks.MUTANTS,
    *kernels.MUTANTS,
    *modules.MUTANTS,
)

__all__ = ["MUTANTS", "Mutant"]
