"""Whether a factor store is what its manifest and sidecars say."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.example_ids import check_unique
from tracin_transforms.core.protocols import Shard
from tracin_transforms.storage.factor_shard import StoredShard
from tracin_transforms.storage.factor_store import FactorStore
from tracin_transforms.storage.files import sha256, version
from tracin_transforms.storage.row_layout import FLOAT16

_READERS = 2
# All bits of a float16's exponent: infinite, or no number.
_NOT_FINITE = np.int16(0x7C00)


def problems(store: FactorStore) -> Iterator[str]:
    """Yields what is wrong with a store: nothing, if every byte is as it was written.

    Reads everything: compares sizes and checksums, counts rows, looks for numbers that are not
    finite and for example ids that occur twice.
    """
    known = store.checksums()
    if known is None:
        yield "manifest.json is missing: 'tracin extract' did not end yet"
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda shard: _check(store, shard, known), store.description.shards)
        ids = []
        for shard, (problem, example_ids) in zip(store.description.shards, found, strict=True):
            if problem is not None:
                yield f"shard {shard.name!r}: {problem}"
            ids.append(example_ids)
    try:
        check_unique(np.concatenate(ids))
    except InputError as error:
        yield str(error)


def _check(
    store: FactorStore, shard: Shard, known: dict[str, str] | None
) -> tuple[str | None, np.ndarray]:
    """Returns what is wrong with a shard, or None, and its example ids."""
    paths = store.paths(shard.name)
    again = "run the same 'tracin extract' again"
    anew = f"remove {str(paths.sidecar)!r} and {again}, which computes the shard anew"
    nothing = np.empty(0, dtype="U1")
    try:
        stored = store.shard(shard.name)
    except FileNotFoundError:
        return f"it is missing; {again}", nothing
    except InputError as error:
        return str(error), nothing
    ids = stored.rows.example_ids
    if known is not None and sha256(paths.sidecar) != known.get(shard.name):
        return f"its sidecar is not the one that the manifest names; {anew}", ids
    lacking = {*store.description.checkpoint_ids} - {*stored.sidecar.layout.checkpoint_ids}
    if lacking:
        return f"it has no factors at checkpoint {min(lacking)!r}; {again}", ids
    try:
        problem = _check_factors(stored)
    except FileNotFoundError:
        problem = "its factor file is missing"
    except (InputError, pa.ArrowException) as error:
        problem = str(error)
    return problem and f"{problem}; {anew}", ids


def _check_factors(shard: StoredShard) -> str | None:
    path, file = shard.paths.factors, shard.sidecar.file
    size, _ = version(path)
    if size != file.size:
        return f"its factor file has {size} bytes, expected {file.size}"
    if sha256(path) != file.sha256:
        return "its factor file has another checksum than its sidecar says"
    rows = 0
    for _, batch in shard.batches():
        rows += batch.num_rows
        for column in shard.sidecar.layout.columns:
            numbers = batch.column(column.name).values.to_numpy(zero_copy_only=True)
            if not _all_finite(numbers, column.dtype):
                return f"column {column.name!r} has numbers that are not finite"
    if rows != len(shard.rows):
        return f"its factor file has {rows} rows, its sidecar {len(shard.rows)}"
    return None


def _all_finite(numbers: np.ndarray, dtype: str) -> bool:
    if dtype == FLOAT16:
        return not ((numbers.view(np.int16) & _NOT_FINITE) == _NOT_FINITE).any()
    return bool(np.isfinite(numbers).all())
