"""The code blocks of README.md and the examples run; links in all pages lead somewhere.

The code of docs/ runs when the site is built (tests/docs).
"""

import pathlib
import re
import runpy
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))


def test_blocks_of_the_readme_run():
    namespace: dict = {}
    for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.S):
        exec(compile(block, README.name, "exec"), namespace)


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_run(path, loose, monkeypatch):
    """Examples run with JAX's default promotion and use no private module."""
    monkeypatch.setattr(sys, "argv", [str(path)])
    private = re.findall(r"attnlab\._\w+", path.read_text())
    assert not private
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem.lower())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_readme_is_short():
    assert len(README.read_bytes()) <= 7_000


def test_commands_are_the_ones_that_ci_runs():
    commands = re.findall(r"```console\n(.*?)```", README.read_text(), re.S)
    assert len(commands) == 2
    test_command = commands[1].strip().split("&& .venv/bin/")[1]
    assert test_command in (ROOT / ".ci" / "run").read_text()
