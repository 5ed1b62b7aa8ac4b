import json

import pytest

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.planning import (
    Sample,
    WorkerKind,
    seconds_here,
    seconds_on_workers,
    worker_kinds,
)

SAMPLE = Sample(
    examples=1000,
    seconds=10.0,
    startup_seconds=5.0,
    written_bytes=200.0,
    memory_bytes=10**9,
    cores=2,
)


def test_a_job_takes_its_start_and_its_examples():
    assert SAMPLE.rate == 100
    assert seconds_here(SAMPLE, 6000) == 5 + 60


@pytest.mark.parametrize(
    ("workers", "shards", "expected"),
    [
        # A worker with twice the cores, half as fast, does 100 a second.
        (1, 10, 5 + 60),
        (10, 10, 5 + 6),
        # The seventh shard is alone in the second round of six workers.
        (6, 7, 5 + 2 * 6000 / 7 / 100),
        # More workers than shards are no help.
        (100, 10, 5 + 6),
    ],
)
def test_workers_share_shards(workers, shards, expected):
    kind = WorkerKind("large", cores=4, speed=0.5)
    assert seconds_on_workers(SAMPLE, 6000, workers, kind, shards) == pytest.approx(expected)


def _table(**change):
    table = {
        "date": "2026-11-01",
        "source": "the list of prices",
        "currency": "EUR",
        "kinds": {"large": {"cores": 8, "price_per_hour": 0.4}, "own": {"cores": 4, "speed": 2}},
    }
    return json.dumps({k: v for k, v in (table | change).items() if v is not None})


def test_a_table_of_worker_kinds():
    kinds = worker_kinds(_table())
    assert kinds["large"] == WorkerKind(
        "large", 8, 1.0, 0.4, "EUR", "the list of prices, 2026-11-01"
    )
    assert (kinds["own"].speed, kinds["own"].price_per_hour) == (2.0, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a table of worker kinds"),
        ("{}", "not a table of worker kinds: KeyError"),
        (_table(kinds={"a": {}}), "not a table of worker kinds: KeyError"),
        (_table(kinds={"a": {"cores": 0}}), "'a': expected cores >= 1"),
        (_table(date=None), "'large' has a price: expected the table to have 'date'"),
    ],
)
def test_tables_that_are_none(text, message):
    with pytest.raises(InputError, match=message):
        worker_kinds(text)
