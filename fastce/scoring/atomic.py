"""Files that appear complete and on disk, or not at all."""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under its name complete and on disk, or not at all.

    What cannot be written raises an OSError that names the file. Nothing is tried twice: after a failed
    fsync the system may take pages as written that are not.
    """
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with io.BufferedWriter(_Raw(part, "xb")) as file:
            yield file
            file.flush()
            with _named(part):
                os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with suppress(OSError):  # what went wrong first is what users must hear of
            part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


class _Raw(io.FileIO):
    """A file whose errors name it."""

    def write(self, data: Any) -> int:
        with _named(self.name):
            return os.write(self.fileno(), data)


@contextmanager
def _named(path: Any) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on disk."""
    if os.name == "nt":  # Windows cannot open a folder, and needs no such call
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with _named(folder):
            os.fsync(handle)
    finally:
        os.close(handle)
