"""Scores of examples, ranked in memory that does not grow with their number.

A worker writes the scores of its examples in the order of the ranking. The ranking of all is a
merge of these files: each is read from its beginning to its end, a chunk at a time, and what is
certain to come before all that is unread leaves memory before more is read.
"""

import heapq
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa

from tracin_transforms.storage.files import AnyPath, open_stream, written_atomically
from tracin_transforms.storage.remote import refusals_named

# Bytes of a file that are read at once, about.
_CHUNK = 2**15
# Files that are merged at once. All are open meanwhile, and some systems allow no more than 256.
_FAN_IN = 128
# Bytes that are sorted at once, about. A chunk of each file may have to stay, half of it all.
_POOL = 2 * _FAN_IN * _CHUNK

# A row's place in the ranking: its self-influence, negative, and its example id.
_Key = tuple[float, str]
_ORDER = [("self_influence", "descending"), ("example_id", "ascending")]
_BEFORE_ALL = (-math.inf, "")


def write_ranked(path: AnyPath, scores: pa.Table) -> None:
    """Writes the scores of some examples to a file that `ranked` can read.

    Args:
        path: The file.
        scores: In any order. Of their columns, ``example_id`` holds strings and
            ``self_influence`` finite float64.

    Raises:
        InputError: The system refuses.
    """
    _write(path, scores.schema, [_sorted(scores.to_batches())] if len(scores) else [])


def ranked(files: Sequence[AnyPath], work: AnyPath) -> Iterator[pa.RecordBatch]:
    """Yields the rows of files by falling self-influence, then by example id in code-point order.

    Args:
        files: Of `write_ranked`, all with the same columns.
        work: Directory for intermediate files, where there are too many to merge at once.

    Yields:
        Some of the rows; about `_POOL` bytes at most and, but for the last ones, half of that at
        least.

    Raises:
        InputError: A file cannot be read, or an intermediate one not be written.
    """
    left = list(files)
    merged = 0
    while len(left) > _FAN_IN:
        # No more files than must be: their rows are written and read once more.
        some = left[: min(_FAN_IN, len(left) - _FAN_IN + 1)]
        path = work / f"merged-{merged:06d}.arrow"
        _write(path, _schema(some[0]), _merge(some))
        left = [*left[len(some) :], path]
        merged += 1
    yield from _merge(left)


def _write(path: AnyPath, schema: pa.Schema, pieces: Iterable[pa.RecordBatch]) -> None:
    """Writes rows that are in order, in chunks."""
    with written_atomically(path) as temporary, pa.ipc.new_stream(temporary, schema) as writer:
        for piece in pieces:
            rows = max(1, len(piece) * _CHUNK // max(1, piece.nbytes))
            for start in range(0, len(piece), rows):
                writer.write_batch(piece.slice(start, rows))


def _chunks(file: AnyPath) -> Iterator[pa.RecordBatch]:
    """Yields the rows of a file as they were written.

    Raises:
        InputError: The file cannot be read.
    """
    with (
        refusals_named(file, "read"),
        open_stream(file) as stream,
        # Arrow asks for a chunk in three pieces.
        pa.input_stream(stream, compression=None, buffer_size=_CHUNK) as buffered,
        pa.ipc.open_stream(buffered) as chunks,
    ):
        yield from chunks


def _schema(file: AnyPath) -> pa.Schema:
    with refusals_named(file, "read"), open_stream(file) as stream:
        return pa.ipc.open_stream(stream).schema


def _merge(files: Sequence[AnyPath]) -> Iterator[pa.RecordBatch]:
    """Yields the rows of files in order.

    Of all files' last rows that were read, the first in order is as far as the ranking is
    certain: its file is read next. So what is not certain is less than a chunk of each file.
    """
    chunks = [_chunks(file) for file in files]
    # A heap: the last row that was read of each file that is not at its end.
    ends = [(_BEFORE_ALL, place) for place in range(len(files))]
    pool: list[pa.RecordBatch] = []
    while ends:
        pool += _more(chunks, ends, _POOL - sum(rows.nbytes for rows in pool))
        if not pool:
            return
        rows = _sorted(pool)
        certain = _count_up_to(ends[0][0], rows) if ends else len(rows)
        yield rows.slice(0, certain)
        pool = [rows.slice(certain)]


def _more(
    chunks: Sequence[Iterator[pa.RecordBatch]], ends: list[tuple[_Key, int]], size: int
) -> Iterator[pa.RecordBatch]:
    """Yields the chunks that are needed next: `size` bytes, but one at least, if there is one.

    Args:
        chunks: Of each file.
        ends: As in `_merge`; brought up to date.
        size: In bytes.
    """
    while ends:
        place = ends[0][1]
        chunk = next(chunks[place], None)
        if chunk is None:
            heapq.heappop(ends)
            continue
        heapq.heapreplace(ends, (_key(chunk, len(chunk) - 1), place))
        yield chunk
        size -= chunk.nbytes
        if size <= 0:
            return


def _sorted(batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    # One batch: Arrow sorts a table of many several times slower.
    return pa.concat_batches(batches).sort_by(_ORDER)


def _count_up_to(end: _Key, rows: pa.RecordBatch) -> int:
    """Returns how many of some rows in order come no later than a place in the ranking."""
    return bisect_right(range(len(rows)), end, key=lambda row: _key(rows, row))


def _key(rows: pa.RecordBatch, row: int) -> _Key:
    return -rows["self_influence"][row].as_py(), rows["example_id"][row].as_py()
