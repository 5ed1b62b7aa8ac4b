"""Results in Parquet: self-influence rankings, and proponents and opponents of queries."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.factors import FactorBlock
from tracin_transforms.core.influence import influence
from tracin_transforms.core.protocols import BadExample
from tracin_transforms.core.queries import Queries
from tracin_transforms.core.ranking import InfluenceRows, TopInfluences
from tracin_transforms.storage.columns import as_column
from tracin_transforms.storage.files import AnyPath, written_atomically
from tracin_transforms.storage.ranked_scores import ranked, write_ranked
from tracin_transforms.storage.sidecar import Rows

_ROWS_PER_FILE = 1_000_000
# The other columns hardly repeat: a dictionary of them takes time and makes the file larger.
_REPEATED = ["label", "prediction"]


def write_scores(
    directory: AnyPath,
    name: str,
    rows: FactorBlock | Rows,
    parts: np.ndarray,
    layer_names: Sequence[str],
) -> AnyPath:
    """Writes the self-influence of some examples, unranked, to a file of their own.

    Args:
        directory: Where the scores of all examples are gathered.
        name: Of these examples, always the same, so that work that is repeated overwrites its
            own file.
        rows: The examples.
        parts: As `core.influence.self_influence` returns them, shape [n, K, L].
        layer_names: Of the L layers.

    Returns:
        The file.
    """
    columns = {
        "example_id": pa.array(rows.example_ids.tolist(), pa.string()),
        "label": as_column(rows.labels),
        "prediction": as_column(rows.predictions[:, -1]),
        "loss": as_column(rows.losses[:, -1]),
        "self_influence": as_column(parts.sum(axis=(1, 2))),
        **_part_columns(parts, layer_names),
    }
    path = directory / f"scores-{name}.arrow"
    write_ranked(path, pa.table(columns))
    return path


def write_self_influence(
    scores: AnyPath, output: AnyPath, expected: int, first: int
) -> list[dict[str, Any]]:
    """Ranks the scores of all examples and writes ``self_influence-*.parquet``.

    Args:
        scores: Directory with the files of `write_scores`.
        output: Result directory.
        expected: Number of examples that must be there, at least 1.
        first: Number of rows to return.

    Returns:
        The first rows of the ranking, highest self-influence first; columns as in the files.

    Raises:
        RuntimeError: Examples are missing.
        InputError: The system refuses to write.
    """
    files: list[AnyPath] = sorted(scores.glob("scores-*.arrow"))
    pieces = _with_ranks(ranked(files, scores))
    parts = groupby(pieces, lambda piece: (piece["rank"][0].as_py() - 1) // _ROWS_PER_FILE)
    top: list[dict[str, Any]] = []
    count = 0
    for part, of_part in parts:
        head = next(of_part)
        with (
            written_atomically(_part_path(output, "self_influence", part, expected)) as temporary,
            pq.ParquetWriter(temporary, head.schema, use_dictionary=_REPEATED) as writer,
        ):
            for piece in chain([head], of_part):
                writer.write_batch(piece)
                top += piece.slice(0, first - len(top)).to_pylist()
                count += len(piece)
    if count != expected:
        raise RuntimeError(f"{count} of {expected} examples were scored")
    return top


def write_influence(output: AnyPath, top: TopInfluences, queries: FactorBlock) -> pa.Table:
    """Writes ``influence-*.parquet`` and returns its rows.

    Rows are sorted by query (in the queries' order), direction (proponents first) and rank.
    """
    table = pa.concat_tables(
        [
            _influence_table(top.proponents, "proponent", queries),
            _influence_table(top.opponents, "opponent", queries),
        ]
    )
    query_rows = np.concatenate([top.proponents.query_rows, top.opponents.query_rows])
    table = table.take(pa.array(np.argsort(query_rows, kind="stable")))
    _write_parts(table, output, "influence")
    return table


def write_score_matrix(output: AnyPath, block: FactorBlock, queries: Queries) -> None:
    """Writes the influence of a block's examples on all queries as ``scores-*.parquet``.

    A row for each example: ``example_id``, ``label``, and a float32 column for each query, named
    by its id.

    Raises:
        InputError: An influence is beyond float32.
    """
    scores = influence(block, queries.block, queries.weights)
    columns = {
        "example_id": pa.array(block.example_ids.tolist(), pa.string()),
        "label": as_column(block.labels),
    }
    names = [*columns, *queries.block.example_ids.tolist()]
    arrays = [*columns.values(), *(pa.array(column) for column in scores.T)]
    name = f"scores-{block.shard}-{int(block.indices[0]):012d}.parquet"
    with written_atomically(output / name) as temporary:
        pq.write_table(pa.table(arrays, names=names), temporary)


def write_skipped(output: AnyPath, bad: Sequence[BadExample]) -> None:
    """Writes ``skipped-*.parquet``, the examples that could not be used; if there are any."""
    if not bad:
        return
    table = pa.table(
        {
            "example_id": pa.array([example.example_id for example in bad], pa.string()),
            "shard": pa.array([example.shard for example in bad], pa.string()),
            "index": pa.array([example.index for example in bad], pa.int64()),
            "error": pa.array([example.error for example in bad], pa.string()),
        }
    )
    _write_parts(table, output, "skipped")


def join_influence(parts: Sequence[AnyPath], output: AnyPath) -> pa.Table:
    """Writes the ``influence-*.parquet`` of several groups of queries as one result.

    Args:
        parts: Directories of `write_influence`, in the order of the queries.
        output: Result directory.

    Returns:
        The strongest proponent and opponent of each of the first ten queries.
    """
    files = [file for part in parts for file in _files_of(part, "influence")]
    first = []
    for number, file in enumerate(files):
        name = f"influence-{number:05d}-of-{len(files):05d}.parquet"
        table = _read(file)
        first.append(table.filter(pc.equal(table["rank"], 1)).slice(0, 20))
        with written_atomically(output / name) as temporary:
            pq.write_table(table, temporary)
    return pa.concat_tables(first).slice(0, 20)


def read_result(directory: AnyPath, name: str, columns: list[str] | None = None) -> pa.Table:
    """Returns the rows of a result, ``self_influence`` or ``influence``, in their order.

    Args:
        directory: Of the result.
        name: Of the result.
        columns: Those to read; all, if not given.

    Raises:
        InputError: There are no such files.
    """
    return pa.concat_tables([_read(file, columns) for file in _files_of(directory, name)])


def _files_of(directory: AnyPath, name: str) -> list[AnyPath]:
    files: list[AnyPath] = sorted(directory.glob(f"{name}-*.parquet"))
    if not files:
        raise InputError(f"{str(directory)!r} has no {name}-*.parquet")
    return files


def _read(file: AnyPath, columns: list[str] | None = None) -> pa.Table:
    with file.open("rb") as opened:
        return pq.read_table(opened, columns=columns)


def _influence_table(rows: InfluenceRows, direction: str, queries: FactorBlock) -> pa.Table:
    at = rows.query_rows
    ranks = np.arange(len(rows)) - np.searchsorted(at, at) + 1
    return pa.table(
        {
            "query_id": pa.array(queries.example_ids[at].tolist(), pa.string()),
            "query_label": as_column(queries.labels[at]),
            "query_prediction": as_column(queries.predictions[at, -1]),
            "direction": pa.array([direction] * len(rows), pa.string()),
            "rank": as_column(ranks.astype(np.int32)),
            "example_id": pa.array(rows.example_ids.tolist(), pa.string()),
            "label": as_column(rows.labels),
            "prediction": as_column(rows.predictions),
            "influence": as_column(rows.influence),
            **_part_columns(rows.parts, queries.layer_names),
        }
    )


def _part_columns(parts: np.ndarray, layers: Sequence[str]) -> dict[str, pa.Array]:
    """Returns what each checkpoint and, where there are several, each layer contributes."""
    columns = {"per_checkpoint": as_column(parts.sum(axis=2))}
    if len(layers) > 1:
        per_layer = [as_column(part) for part in parts.sum(axis=1).T]
        columns["per_layer"] = pa.StructArray.from_arrays(per_layer, names=list(layers))
    return columns


def _with_ranks(ranking: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yields a ranking's rows with their ranks, from 1; none of the pieces goes into two files."""
    count = 0
    for rows in ranking:
        while len(rows):
            piece = rows.slice(0, _ROWS_PER_FILE - count % _ROWS_PER_FILE)
            ranks = as_column(np.arange(count + 1, count + len(piece) + 1))
            yield piece.add_column(0, "rank", ranks)
            count += len(piece)
            rows = rows.slice(len(piece))


def _write_parts(table: pa.Table, output: AnyPath, name: str) -> None:
    for start in range(0, max(1, len(table)), _ROWS_PER_FILE):
        path = _part_path(output, name, start // _ROWS_PER_FILE, len(table))
        with written_atomically(path) as temporary:
            pq.write_table(table.slice(start, _ROWS_PER_FILE), temporary)


def _part_path(output: AnyPath, name: str, part: int, rows: int) -> AnyPath:
    """Returns the file of a part of a result of so many rows."""
    parts = max(1, -(-rows // _ROWS_PER_FILE))
    return output / f"{name}-{part:05d}-of-{parts:05d}.parquet"
