"""The framing of TFRecord files: records with lengths and checksums, gzipped or not.

A record is its length (uint64), the length's checksum (uint32), the data, the data's checksum;
all little-endian. Checksums are CRC-32C, masked.
"""

import gzip
import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import google_crc32c

from tracin_transforms.core.errors import InputError
from tracin_transforms.examples.decoding import Broken
from tracin_transforms.storage.files import AnyPath, open_stream
from tracin_transforms.storage.remote import refusals_named

_HEADER = struct.Struct("<QI")
_LENGTH = struct.Struct("<Q")
_CHECKSUM = struct.Struct("<I")
_GZIP_MAGIC = b"\x1f\x8b"
_BUFFER_BYTES = 2**20
# A damaged file may claim any length; memory is taken as the data arrive.
_CHUNK_BYTES = 2**24


def read_records(file: AnyPath) -> Iterator[bytes | Broken]:
    """Yields the data of the records in order, or why one cannot be had.

    A record whose data are damaged is broken, and the next one follows. So is the record in which
    the file ends, which is the last. Whether the file is gzipped, its first bytes tell.

    Raises:
        InputError: A length is damaged, so that no one knows where the next record begins, or the
            system refuses.
    """
    with refusals_named(file, "read"), open_stream(file) as opened:
        stream: Any = io.BufferedReader(opened, _BUFFER_BYTES)
        start = stream.peek(_HEADER.size)[: _HEADER.size]
        # A record of 559,903 bytes begins like a gzipped file.
        if not start.startswith(_GZIP_MAGIC) or _length(start) is not None:
            yield from _records(stream, str(file))
            return
        try:
            yield from _records(gzip.GzipFile(fileobj=stream), f"{file} (unzipped)")
        except EOFError:
            yield Broken("truncated: the file ends before its gzip data do")
        except (gzip.BadGzipFile, zlib.error) as error:
            raise InputError(
                f"{str(file)!r}: the gzip data are damaged, the records in them cannot be found: "
                f"{error}; copy or write the file again"
            ) from error


def checksum(data: bytes) -> int:
    """Returns the checksum of a record's length or data."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _records(stream: Any, name: str) -> Iterator[bytes | Broken]:
    offset = index = 0
    while header := _read(stream, _HEADER.size):
        if len(header) < _HEADER.size:
            yield Broken(f"truncated: the file ends {len(header)} bytes after its beginning")
            return
        length = _length(header)
        if length is None:
            raise InputError(
                f"{name!r}: record {index} at byte {offset}: the checksum of its length is wrong, "
                "so it and the records after it cannot be found; expected a TFRecord file: copy or "
                "write it again"
            )
        data, end = _read(stream, length), _read(stream, _CHECKSUM.size)
        if len(end) < _CHECKSUM.size:
            yield Broken(f"truncated: the file ends within its {length} bytes")
            return
        damaged = _CHECKSUM.unpack(end)[0] != checksum(data)
        yield Broken("the checksum of its data is wrong: it is damaged") if damaged else data
        offset += _HEADER.size + length + _CHECKSUM.size
        index += 1


def _length(header: bytes) -> int | None:
    """Returns the length that a record begins with, or None if its checksum is wrong."""
    if len(header) < _HEADER.size:
        return None
    length, expected = _HEADER.unpack(header)
    return length if checksum(_LENGTH.pack(length)) == expected else None


def _read(stream: Any, size: int) -> bytes:
    """Returns the next `size` bytes, fewer where the stream ends."""
    if size <= _CHUNK_BYTES:
        found: bytes = stream.read(size)
        return found
    parts = []
    while size and (part := stream.read(min(size, _CHUNK_BYTES))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
