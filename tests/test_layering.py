"""Which modules may import which: only those of lower layers."""

import ast
import graphlib
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PUBLIC = ROOT / "attnlab"
PACKAGE = PUBLIC / "_src"

#: Single files of the lowest layer, which all may import.
BASE = {
    "arguments",
    "dtypes",
    "exact",
    "files",
    "operands",
    "picture",
    "prng",
    "pytrees",
    "reverse",
    "placement",
    "types",
    "varying",
}

#: For each package of ``attnlab._src`` the others that it may import.
MAY_IMPORT = {
    "pytrees": set(),
    "arguments": set(),
    "reverse": set(),
    "placement": set(),
    "varying": set(),
    "dtypes": set(),
    "exact": set(),
    "files": set(),
    "picture": set(),
    "operands": {"types"},
    "types": {"dtypes", "exact", "picture", "pytrees"},
    "prng": {"types"},
    "scores": BASE,
    "modifiers": BASE,
    "masks": BASE,
    "implementations": BASE | {"scores", "modifiers", "masks"},
    "ops": BASE | {"scores", "modifiers", "masks", "implementations"},
    "checks": BASE | {"scores", "modifiers", "masks", "implementations", "ops"},
    "nn": BASE | {"scores", "modifiers", "masks", "ops"},
    "view": BASE | {"masks"},
    "command": {"bench"},
    "bench": BASE | {"scores", "modifiers", "masks", "implementations", "ops", "view"},
}
#: Files that implementations share; implementations do not import each other.
SHARED = {
    "capability", "deferred", "elementwise", "measured", "not_finite", "schedule",
    "sizes", "steps", "tile", "visibility",
}  # fmt: skip


def modules():
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def imported(path) -> Iterator[tuple[str, ...]]:
    """The private modules that a file imports, also in functions; tuples of names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "attnlab._src"
        ):
            base = tuple((node.module or "").split("."))[2:]
            for alias in node.names:
                module = PACKAGE.joinpath(*base, alias.name)
                is_module = module.is_dir() or module.with_suffix(".py").exists()
                yield (*base, alias.name) if is_module or not base else base
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("attnlab._src."):
                    yield tuple(alias.name.split("."))[2:]


def room(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    for target in imported(path):
        assert target[0] == room(path) or target[0] in MAY_IMPORT[room(path)], (
            f"{path.relative_to(ROOT)} imports {'.'.join(target)}"
        )


def test_no_circle_of_files():
    """Imports within functions count, too: they hide a cycle without removing it."""
    names = {
        path.relative_to(PACKAGE).with_suffix("").parts: path for path in modules()
    }
    known = {
        parts[:-1] if parts[-1] == "__init__" else parts: path
        for parts, path in names.items()
    }
    graph = {}
    for module, path in known.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "attnlab._src"
            ):
                base = tuple((node.module or "").split("."))[2:]
                each = [(*base, alias.name) for alias in node.names]
                found |= {x if x in known else base for x in each}
        graph[module] = {x for x in found if x in known and x != module}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_only_the_bench_uses_the_public_surface():
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and room(path) != "bench":
                name = node.module or ""
                outside = name.startswith("attnlab") and "_src" not in name
                assert not outside, f"{path.relative_to(ROOT)} imports {name}"


def test_public_modules_only_name_what_is_public():
    for path in PUBLIC.rglob("*.py"):
        if PACKAGE not in path.parents and path != PUBLIC / "__init__.py":
            for node in ast.parse(path.read_text()).body:
                assert not isinstance(node, (ast.FunctionDef, ast.ClassDef)), path


def test_implementations_do_not_import_each_other():
    folder = PACKAGE / "implementations"
    for path in folder.rglob("*.py"):
        if path == folder / "__init__.py":
            continue
        own = path.relative_to(folder).parts[0].removesuffix(".py")
        for target in imported(path):
            if target[0] == "implementations":
                known = target[1] in SHARED | {own}
                assert known, f"{path.name} imports {target[1]}"


def test_only_the_verb_and_the_dispatch_import_the_reference():
    importers = {
        str(path.relative_to(PACKAGE))
        for path in modules()
        if ("implementations", "reference") in set(imported(path))
    }
    assert importers == {
        "implementations/__init__.py",
        "ops/attention.py",
        "ops/derivative.py",
    }


def test_no_file_is_too_long():
    for path in modules():
        limit = 600 if room(path) == "implementations" else 400
        assert len(path.read_text().splitlines()) <= limit, path
