"""Results in Parquet: self-influence rankings, and proponents and opponents of queries."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.example_ids import check_unique
from tracin_transforms.core.factors import FactorBlock
from tracin_transforms.core.protocols import BadExample
from tracin_transforms.core.ranking import InfluenceRows, TopInfluences
from tracin_transforms.storage.columns import as_column
from tracin_transforms.storage.files import AnyPath, written_atomically
from tracin_transforms.storage.sidecar import Rows

_ROWS_PER_FILE = 1_000_000


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
    path = directory / f"scores-{name}.parquet"
    with written_atomically(path) as temporary:
        pq.write_table(pa.table(columns), temporary)
    return path


def write_self_influence(scores: AnyPath, output: AnyPath, expected: int) -> pa.Table:
    """Ranks the scores of all blocks and writes ``self_influence-*.parquet``.

    Args:
        scores: Directory with the files of `write_scores`.
        output: Result directory.
        expected: Number of examples that must be there.

    Returns:
        The ranking, columns as in the files, highest self-influence first.

    Raises:
        InputError: An example id occurs twice.
        RuntimeError: Examples are missing.
    """
    files: list[AnyPath] = sorted(scores.glob("scores-*.parquet"))
    table = pa.concat_tables([_read(file) for file in files])
    if len(table) != expected:
        raise RuntimeError(f"{len(table)} of {expected} examples were scored")
    if pc.count_distinct(table["example_id"]).as_py() < expected:
        check_unique(np.array(table["example_id"].to_pylist()))
    ranking = table.sort_by([("self_influence", "descending"), ("example_id", "ascending")])
    ranking = ranking.add_column(0, "rank", pa.array(np.arange(1, expected + 1)))
    _write_parts(ranking, output, "self_influence")
    return ranking


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


def read_result(directory: AnyPath, name: str) -> pa.Table:
    """Returns the rows of a result, ``self_influence`` or ``influence``, in their order.

    Raises:
        InputError: There are no such files.
    """
    files: list[AnyPath] = sorted(directory.glob(f"{name}-*.parquet"))
    if not files:
        raise InputError(f"{str(directory)!r} has no {name}-*.parquet")
    return pa.concat_tables([_read(file) for file in files])


def _read(file: AnyPath) -> pa.Table:
    with file.open("rb") as opened:
        return pq.read_table(opened)


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


def _write_parts(table: pa.Table, output: AnyPath, name: str) -> None:
    parts = max(1, -(-len(table) // _ROWS_PER_FILE))
    for part in range(parts):
        rows = table.slice(part * _ROWS_PER_FILE, _ROWS_PER_FILE)
        with written_atomically(output / f"{name}-{part:05d}-of-{parts:05d}.parquet") as temporary:
            pq.write_table(rows, temporary)
