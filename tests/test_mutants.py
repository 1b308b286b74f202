"""The mutants still apply to the code; ``python -m tests.mutants`` runs them."""

import re

import pytest

from tests.conftest import LONG
from tests.mutants import MUTANTS
from tests.mutants.mutant import ROOT


def test_there_are_enough_and_each_has_a_name():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS) >= 40


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_the_old_text_occurs_once_and_the_tests_are_there(mutant):
    text = (ROOT / "attnlab/_src" / mutant.file).read_text(encoding="utf-8")
    assert mutant.planted(text) != text
    compile(mutant.planted(text), mutant.file, "exec")
    assert "\n" not in mutant.old + mutant.new
    assert mutant.fault.endswith(".")
    assert mutant.tests
    for test in mutant.tests:
        file, name = test.split("::")
        function = re.escape(name.partition("[")[0])
        source = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {function}\(", source, re.MULTILINE), test


def test_long_tests_are_there_and_no_mutant_needs_them():
    needed = [test for mutant in MUTANTS for test in mutant.tests]
    assert not [n for n in LONG if n in needed or n.partition("[")[0] in needed]
    for name in LONG:
        file, _, test = name.partition("::")
        function = re.escape(test.partition("[")[0])
        source = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^ *def {function}\(", source, re.MULTILINE), name
