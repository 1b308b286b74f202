"""The README's examples run, in order, in one namespace."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent


def test_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) >= 5
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["output"].shape == (2, 128, 8, 64)


def test_commands_are_the_ones_that_ci_runs():
    commands = re.findall(
        r"```console\n(.*?)```", (ROOT / "README.md").read_text(), re.S
    )
    assert len(commands) == 2
    test_command = commands[1].strip().split("&& .venv/bin/")[1]
    assert test_command in (ROOT / ".ci" / "run").read_text()
