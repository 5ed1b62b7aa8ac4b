"""Results in Parquet: self-influence rankings, and proponents and opponents of queries."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.example_ids import check_unique
from tracin_transforms.core.factors import FactorBlock
from tracin_transforms.core.ranking import InfluenceRows, TopInfluences, rank_by_score
from tracin_transforms.storage.files import written_atomically

_ROWS_PER_FILE = 1_000_000

SCORE_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("label", pa.int32()),
        ("prediction", pa.int32()),
        ("loss", pa.float32()),
        ("self_influence", pa.float64()),
        ("per_checkpoint", pa.list_(pa.float64())),
    ]
)
INFLUENCE_SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("query_label", pa.int32()),
        ("query_prediction", pa.int32()),
        ("direction", pa.string()),
        ("rank", pa.int32()),
        ("example_id", pa.string()),
        ("label", pa.int32()),
        ("prediction", pa.int32()),
        ("influence", pa.float64()),
        ("per_checkpoint", pa.list_(pa.float64())),
    ]
)


def write_scores(directory: Path, block: FactorBlock, per_checkpoint: np.ndarray) -> Path:
    """Writes the self-influence of a block's rows, unranked, to the block's own file.

    The name follows from shard and start, so work that is repeated overwrites its own file.

    Args:
        directory: Where the scores of all blocks are gathered.
        block: The scored examples.
        per_checkpoint: What `core.influence.self_influence` returned, shape [n, K].

    Returns:
        The file.
    """
    columns = [
        pa.array(block.example_ids.tolist(), pa.string()),
        pa.array(block.labels),
        pa.array(block.predictions),
        pa.array(block.losses[:, -1]),
        pa.array(per_checkpoint.sum(axis=1)),
        _list_column(per_checkpoint),
    ]
    path = directory / f"scores-{block.shard}-{block.start:012d}.parquet"
    with written_atomically(path) as temporary:
        pq.write_table(pa.table(columns, schema=SCORE_SCHEMA), temporary)
    return path


def write_self_influence(scores: Path, output: Path, expected: int) -> pa.Table:
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
    files = sorted(scores.glob("scores-*.parquet"))
    table = pa.concat_tables([pq.read_table(file) for file in files])
    if len(table) != expected:
        raise RuntimeError(f"{len(table)} of {expected} examples were scored")
    example_ids = np.array(table["example_id"].to_pylist())
    check_unique(example_ids)
    order = rank_by_score(table["self_influence"].to_numpy(), example_ids)
    ranks = pa.array(np.arange(1, len(order) + 1))
    ranking = table.take(pa.array(order)).add_column(0, "rank", ranks)
    _write_parts(ranking, output, "self_influence")
    return ranking


def write_influence(output: Path, top: TopInfluences, queries: FactorBlock) -> pa.Table:
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


def read_result(directory: Path, name: str) -> pa.Table:
    """Returns the rows of a result, ``self_influence`` or ``influence``, in their order.

    Raises:
        InputError: There are no such files.
    """
    files = sorted(directory.glob(f"{name}-*.parquet"))
    if not files:
        raise InputError(f"{str(directory)!r} has no {name}-*.parquet")
    return pa.concat_tables([pq.read_table(file) for file in files])


def _influence_table(rows: InfluenceRows, direction: str, queries: FactorBlock) -> pa.Table:
    at = rows.query_rows
    ranks = np.arange(len(rows)) - np.searchsorted(at, at) + 1
    columns: Sequence[pa.Array] = [
        pa.array(queries.example_ids[at].tolist(), pa.string()),
        pa.array(queries.labels[at]),
        pa.array(queries.predictions[at]),
        pa.array([direction] * len(rows), pa.string()),
        pa.array(ranks.astype(np.int32)),
        pa.array(rows.example_ids.tolist(), pa.string()),
        pa.array(rows.labels),
        pa.array(rows.predictions),
        pa.array(rows.influence),
        _list_column(rows.per_checkpoint),
    ]
    return pa.table(columns, schema=INFLUENCE_SCHEMA)


def _list_column(values: np.ndarray) -> pa.Array:
    rows, width = values.shape
    offsets = np.arange(rows + 1, dtype=np.int32) * width
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.ravel()))


def _write_parts(table: pa.Table, output: Path, name: str) -> None:
    parts = max(1, -(-len(table) // _ROWS_PER_FILE))
    for part in range(parts):
        rows = table.slice(part * _ROWS_PER_FILE, _ROWS_PER_FILE)
        pq.write_table(rows, output / f"{name}-{part:05d}-of-{parts:05d}.parquet")
