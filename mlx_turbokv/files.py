"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike, prefix: str | None = None) -> Iterator[Path]:
    """A temporary file in the folder of ``path`` that replaces it when the block succeeds.

    Args:
        path: the file to write. It stays as it is if the block raises.
        prefix: of the temporary file's name; None takes the name of ``path``.

    Raises:
        OSError: the folder cannot be written.
    """
    path = Path(path)
    name = f"{prefix or f'.{path.name}-'}{secrets.token_hex(4)}{path.suffix}"
    temporary = path.with_name(name)
    # 0o666 less the umask, as open() creates files
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write ``text`` in UTF-8; the old file stays whole until the new one is complete.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
