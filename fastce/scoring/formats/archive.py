"""Zip files, which hold the arrays of `.npz` and of torch's files: opened only if they keep limits."""

from __future__ import annotations

import io
from pathlib import Path, PurePosixPath
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

from fastce.scoring.formats.base import InputError, refusing

_MAX_DIRECTORY_BYTES = 2**20
_MAX_MEMBERS = 10_000

#: Nothing deflated becomes more than so many times as long.
_MAX_RATIO = 1032

_LOCAL_HEADER_BYTES = 30


def open_zip(path: Path, file: io.RawIOBase) -> ZipFile:
    """Return the members of a zip file, once what it declares of them fits into the file.

    Parameters
    ----------
    path : path
        What messages call it.
    file : file
        Open for reading; closing the zip file leaves it open.
    """
    with refusing(path, "zip file"):
        opened = ZipFile(_Capped(file))
    members = opened.infolist()
    if len(members) > _MAX_MEMBERS or len(members) != len({m.filename for m in members}):
        raise InputError(
            f"{path}: expected at most {_MAX_MEMBERS} members of different names, got {len(members)}"
        )
    for member in members:
        _check(path, member)
    n_bytes = file.seek(0, io.SEEK_END)
    stored = sum(m.compress_size for m in members)
    if stored > n_bytes:
        raise InputError(
            f"{path}: expected members of at most {n_bytes} bytes as in the file, got {stored}; "
            "write the file again"
        )
    return opened


def _check(path: Path, member: ZipInfo) -> None:
    name = PurePosixPath(member.filename.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts:
        raise InputError(f"{path}: expected names inside the file, got {member.filename!r:.100}")
    if member.compress_type not in (ZIP_STORED, ZIP_DEFLATED) or member.flag_bits & 1:
        raise InputError(
            f"{path}: expected members stored or deflated, and not encrypted; "
            f"{member.filename!r:.100} is not; write the file again"
        )
    ratio = 1 if member.compress_type == ZIP_STORED else _MAX_RATIO
    if member.file_size > ratio * member.compress_size:
        raise InputError(
            f"{path}: expected {member.filename!r:.100} of at most {ratio} times its bytes in the "
            f"file, got {member.file_size} bytes from {member.compress_size}"
        )


def data_offset(file: io.RawIOBase, member: ZipInfo) -> int:
    """Return where in the file the data of a member begin, which has been opened once."""
    file.seek(member.header_offset)
    header = file.read(_LOCAL_HEADER_BYTES) or b""
    name, extra = header[26:28], header[28:30]
    return (
        member.header_offset
        + _LOCAL_HEADER_BYTES
        + int.from_bytes(name, "little")
        + int.from_bytes(extra, "little")
    )


class _Capped:
    """A file that reads no more at once than any honest directory has."""

    def __init__(self, file: io.RawIOBase) -> None:
        self._file = file

    def read(self, n: int = -1) -> bytes:
        if n > _MAX_DIRECTORY_BYTES:
            raise ValueError(f"a directory of {n} bytes, of at most {_MAX_DIRECTORY_BYTES}")
        return self._file.read(_MAX_DIRECTORY_BYTES if n < 0 else n) or b""

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True
