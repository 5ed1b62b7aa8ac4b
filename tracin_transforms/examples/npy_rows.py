"""Rows of the arrays in a NumPy archive, read when they are wanted.

`numpy.savez` stores arrays as they are, so rows can be read from their place in the file, whatever
its size. Arrays that `numpy.savez_compressed` wrote are read as a whole.
"""

import contextlib
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tracin_transforms.core.errors import InputError
from tracin_transforms.storage.files import AnyPath

# What NumPy raises for files that are not whole, or hold more than plain arrays.
_UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
_LOCAL_HEADER = struct.Struct("<26xHH")
_CHUNK_BYTES = 2**20


class Rows(Protocol):
    """An array of which some rows can be had."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The array's dtype."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        ...

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Returns rows start to stop."""
        ...


@dataclass(frozen=True)
class StoredRows:
    """An array that lies in a file as it is.

    Attributes:
        file: The file.
        offset: Where its first row begins.
        dtype: Its dtype.
        shape: Its shape.
    """

    file: AnyPath
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Returns rows start to stop."""
        start, stop, _ = rows.indices(self.shape[0])
        found = np.empty((max(0, stop - start), *self.shape[1:]), self.dtype)
        row_bytes = self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=int))
        with self.file.open("rb", buffering=0) as opened:
            opened.seek(self.offset + start * row_bytes)
            left = found.reshape(-1).view(np.uint8).data
            while left.nbytes:
                read = opened.readinto(left)
                if not read:
                    raise InputError(f"{str(self.file)!r} ended while it was read: is it changing?")
                left = left[read:]
        return found


def open_rows(file: AnyPath, names: Sequence[str], hint: str) -> dict[str, Rows]:
    """Returns the named arrays of an archive; nothing is unpickled.

    Args:
        file: As written by numpy.savez or numpy.savez_compressed.
        names: Of the arrays.
        hint: How to name other arrays, for the message if there is none of that name.

    Raises:
        InputError: The file is no archive, or truncated, or has no such array.
    """
    with _opened(file) as archive:
        members = {member.removesuffix(".npy"): member for member in archive.namelist()}
        for name in names:
            if name not in members:
                raise InputError(
                    f"{str(file)!r} has no array {name!r}: found {', '.join(members)}; {hint}"
                )
        return {name: _rows(file, archive, members[name], name) for name in names}


def verify(file: AnyPath, names: Sequence[str]) -> None:
    """Reads arrays to the end and compares their checksums, which reading single rows does not.

    Raises:
        InputError: An array is damaged.
    """
    with _opened(file) as archive:
        for name in names:
            with _damage_named(file, name), archive.open(f"{name}.npy") as member:
                while member.read(_CHUNK_BYTES):
                    pass


@contextlib.contextmanager
def _opened(file: AnyPath) -> Iterator[zipfile.ZipFile]:
    with file.open("rb") as opened:
        try:
            archive = zipfile.ZipFile(opened)
        except _UNREADABLE as error:
            raise InputError(
                f"{str(file)!r} is not a NumPy archive, or truncated: expected an .npz file as "
                f"written by numpy.savez ({error})"
            ) from error
        with archive:
            yield archive


def _rows(file: AnyPath, archive: zipfile.ZipFile, member: str, name: str) -> Rows:
    info = archive.getinfo(member)
    with _damage_named(file, name):
        if info.compress_type == zipfile.ZIP_STORED:
            stored = _stored(file, info)
            if stored is not None:
                return stored
        with archive.open(member) as opened:
            found: np.ndarray = np.lib.format.read_array(opened, allow_pickle=False)
        return found


def _stored(file: AnyPath, info: zipfile.ZipInfo) -> StoredRows | None:
    """Returns an array by its place in the file, or None if it lies there in another order."""
    with file.open("rb") as opened:
        opened.seek(info.header_offset)
        name_bytes, extra_bytes = _LOCAL_HEADER.unpack(opened.read(_LOCAL_HEADER.size))
        opened.seek(name_bytes + extra_bytes, os.SEEK_CUR)
        version = np.lib.format.read_magic(opened)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(opened)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(opened)
        else:
            return None
        if fortran or dtype.hasobject or not shape:
            return None
        return StoredRows(file, opened.tell(), dtype, shape)


@contextlib.contextmanager
def _damage_named(file: AnyPath, name: str) -> Iterator[None]:
    try:
        yield
    except _UNREADABLE as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{str(file)!r}: array {name!r} cannot be read: expected plain numbers or strings in a "
            f"complete file, such as ids.astype(str) instead of objects ({error})"
        ) from error
