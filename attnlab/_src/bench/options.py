"""The options of ``attnlab bench``: read, checked, and explained where wrong."""

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from attnlab._src.bench.cases import PATTERNS, SCORES
from attnlab._src.bench.files import write_atomically
from attnlab._src.implementations import IMPLEMENTATIONS

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for; None where a default depends on the rest.

    Attributes:
        batch: B.
        length: T.
        heads: N; None: 8, and 1 for scores that are no inner product.
        key_heads: K; None: N.
        head_size: H.
        dtypes: names.
        patterns: names; None: the selection's.
        scores: names; None: the selection's.
        implementations: names; None: the selection's.
        repeats: rounds; None: as many as fit.
        out: folder of the results.
        full: the whole grid, without a limit of time.
        quick: a small selection.
        text: folder of .txt files; None: the addresses.
        peers: whether other libraries are measured too.
        seed: of everything that is drawn.
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
    """Reads a whole number that is no less."""

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
    """A folder that has .txt files."""
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
    """A folder that results can be written to; it is made when they are."""
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
    sizes.add_argument("--batch", type=whole(1), default=1, help="B (1)")
    sizes.add_argument(
        "--length", type=whole(16), help="T and S (2048; with --quick 1024)"
    )
    sizes.add_argument(
        "--heads",
        type=whole(1),
        help="N (8; 1 for additive, mlp and concat, whose pairs cost more)",
    )
    sizes.add_argument("--key-heads", type=whole(1), help="K, a divisor of N (N)")
    sizes.add_argument("--head-size", type=whole(1), default=64, help="H and D (64)")
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
        help="leave jax.nn, flax.nnx and torch out",
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
        "--seed", type=whole(0), default=0, help="of everything drawn (0)"
    )
    parser.add_argument(
        "--out",
        type=writable_folder,
        default="attnlab-bench",
        metavar="DIR",
        help="where bench.json and the charts go (./attnlab-bench)",
    )


def read(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Options:
    """Options from parsed arguments; ends the program where they do not fit."""
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
