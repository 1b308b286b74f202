"""The options of ``attnlab bench``: parsing and checks."""

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from attnlab._src.bench.cases import PATTERNS, SCORES
from attnlab._src.files import write_atomically
from attnlab._src.implementations import IMPLEMENTATIONS

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the command line; None if the default depends on other options.

    Attributes:
        batch: B, the batch size.
        length: T and S, query and key length.
        heads: N, query heads; None: 8, or 1 for scores that are not inner products.
        key_heads: K, key and value heads; None: N.
        head_size: H and D, size of query, key and value heads.
        dtypes: names of types.
        patterns: names of mask patterns; None: chosen by ``select``.
        scores: names of scores; None: chosen by ``select``.
        implementations: names of implementations; None: chosen by ``select``.
        repeats: number of rounds; None: as many as fit into the time.
        out: folder of the results.
        full: whether to measure the whole grid, without a time limit.
        quick: whether to measure a small selection.
        text: folder of .txt files; None: the State of the Union addresses.
        peers: whether other libraries are measured, too.
        seed: seed of all random numbers.
    """

    batch: int = 1
    length: int = 2048
    heads: int | None = None
    key_heads: int | None = None
    head_size: int = 64
    dtypes: tuple[str, ...] = ("float32",)
    patterns: tuple[str, ...] | None = None
    scores: tuple[str, ...] | None = None
    implementations: tuple[str, ...] | None = None
    repeats: int | None = None
    out: Path = Path("attnlab-bench")
    full: bool = False
    quick: bool = False
    text: Path | None = None
    peers: bool = True
    seed: int = 0


def whole(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number of at least ``least``."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < least:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {least}, got {text!r}"
            )
        return value

    return read


def _names(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def read(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(n for n in text.split(",") if n))
        wrong = [n for n in names if n not in known]
        if wrong or not names:
            raise argparse.ArgumentTypeError(
                f"expected names from {', '.join(known)}, separated by commas, "
                f"got {(wrong or [text])[0]!r}"
            )
        return names

    return read


def text_folder(text: str) -> Path:
    """An argparse type: a folder that has .txt files."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(
            f"expected a folder of .txt files, got {text!r}, which is no folder"
        )
    if not any(path.glob("*.txt")):
        raise argparse.ArgumentTypeError(
            f"expected a folder of .txt files, got {text!r}, which has none"
        )
    return path


def writable_folder(text: str) -> Path:
    """An argparse type: a folder that can be written to; it need not exist yet."""
    path = Path(text)
    probe = path / ".attnlab-writable"
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        write_atomically(probe, b"")
        probe.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"expected a folder that can be written to, got {text!r} ({error.strerror})"
        ) from None
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``attnlab bench``."""
    many = {"metavar": "A,B,..."}
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument("--batch", type=whole(1), default=1, help="batch size (1)")
    sizes.add_argument(
        "--length",
        type=whole(16),
        help="query and key length (2048; with --quick 1024)",
    )
    sizes.add_argument(
        "--heads",
        type=whole(1),
        help="query heads (8; 1 for the costlier scores additive, mlp and concat)",
    )
    sizes.add_argument(
        "--key-heads",
        type=whole(1),
        help="key and value heads, a divisor of --heads (as many as --heads)",
    )
    sizes.add_argument(
        "--head-size", type=whole(1), default=64, help="size of a head (64)"
    )
    sizes.add_argument(
        "--dtypes", type=_names(DTYPES), default=("float32",), help="(float32)", **many
    )
    what = parser.add_argument_group("what is compared")
    what.add_argument(
        "--patterns", type=_names(tuple(PATTERNS)), help=", ".join(PATTERNS), **many
    )
    what.add_argument(
        "--scores", type=_names(tuple(SCORES)), help=", ".join(SCORES), **many
    )
    what.add_argument(
        "--implementations",
        type=_names(tuple(IMPLEMENTATIONS)),
        help=", ".join(IMPLEMENTATIONS),
        **many,
    )
    what.add_argument(
        "--no-peers",
        dest="peers",
        action="store_false",
        help="do not measure jax.nn, flax.nnx and torch",
    )
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument(
        "--full", action="store_true", help="the whole grid, however long it takes"
    )
    extent.add_argument(
        "--quick", action="store_true", help="a few rows in less than 40 seconds"
    )
    parser.add_argument(
        "--repeats",
        type=whole(1),
        help="rounds of each measurement (as many as fit, from 3 to 15)",
    )
    parser.add_argument(
        "--text",
        type=text_folder,
        metavar="FOLDER",
        help="your own .txt files as input",
    )
    parser.add_argument(
        "--seed", type=whole(0), default=0, help="seed of all random numbers (0)"
    )
    parser.add_argument(
        "--out",
        type=writable_folder,
        default="attnlab-bench",
        metavar="DIR",
        help="folder for bench.json and the charts (./attnlab-bench)",
    )


def read(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Options:
    """Options from parsed arguments; exits with a message if they do not fit."""
    names = [field.name for field in dataclasses.fields(Options)]
    options = Options(**{name: getattr(given, name) for name in names})
    if options.length is None:
        options = dataclasses.replace(options, length=1024 if options.quick else 2048)
    heads, key_heads = options.heads or 8, options.key_heads
    if key_heads and heads % key_heads:
        parser.error(
            f"argument --key-heads: expected a divisor of --heads {heads}, "
            f"got {key_heads}"
        )
    return options
