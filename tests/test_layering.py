"""Who may import whom: imports point down only."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "attnlab"

#: Single files at the bottom, for all.
BASE = {"arguments", "dtypes", "prng", "pytrees", "reverse", "types"}

#: For each room, the rooms that it may import besides itself.
MAY_IMPORT = {
    "pytrees": set(),
    "arguments": set(),
    "reverse": set(),
    "dtypes": set(),
    "types": {"dtypes", "pytrees"},
    "prng": {"types"},
    "scores": BASE,
    "modifiers": BASE,
    "masks": BASE,
    "implementations": BASE | {"scores", "modifiers", "masks"},
    "ops": BASE | {"scores", "modifiers", "masks", "implementations"},
    "nn": BASE | {"scores", "modifiers", "masks", "ops"},
    "command": {"bench"},
    "bench": BASE | {"scores", "modifiers", "masks", "implementations", "ops"},
}
#: What implementations share; each other one stands alone.
SHARED = {"measured", "plain", "tile", "walk"}


def modules():
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def imported(path):
    """The attnlab modules that a file imports, as tuples below ``attnlab``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "attnlab"
        ):
            base = tuple(node.module.split("."))[1:]
            if base:
                yield base
            else:
                yield from ((alias.name,) for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("attnlab."):
                    yield tuple(alias.name.split("."))[1:]


def room(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    for target in imported(path):
        if room(path) == "bench" and target[0] not in MAY_IMPORT:
            continue  # names of the public surface: attention, cost, ...
        assert target[0] == room(path) or target[0] in MAY_IMPORT[room(path)], (
            f"{path.relative_to(ROOT)} imports attnlab.{'.'.join(target)}"
        )


def test_implementations_do_not_import_each_other():
    for path in (PACKAGE / "implementations").glob("*.py"):
        if path.stem == "__init__":
            continue
        for target in imported(path):
            if target[0] == "implementations":
                assert target[1] in SHARED, f"{path.name} imports {target[1]}"


def test_only_the_verb_and_the_dispatch_import_the_reference():
    importers = {
        str(path.relative_to(PACKAGE))
        for path in modules()
        if ("implementations", "reference") in set(imported(path))
    }
    assert importers == {
        "implementations/__init__.py",
        "ops/attention.py",
        "ops/dispatch.py",
    }


def test_no_file_is_too_long():
    for path in modules():
        limit = 600 if room(path) == "implementations" else 400
        assert len(path.read_text().splitlines()) <= limit, path
