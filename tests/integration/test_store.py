"""A factor store as users fill and ask it; and what kills, full disks and damage do to it."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.integration.conftest import TRACIN, edit_series, tracin
from tracin_transforms.storage.factor_store import FactorStore

WORKERS = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
ROWS = 3000


@pytest.fixture(scope="module")
def many(trained, tmp_path_factory):
    """More examples, so that there are shards enough to be interrupted between."""
    directory = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(1)
    np.savez(
        directory / "many.npz",
        x=rng.standard_normal((ROWS, 5)).astype(np.float32),
        y=rng.integers(0, 4, ROWS),
    )
    return f"npz:{directory / 'many.npz'}"


@pytest.fixture(scope="module")
def stored(trained, many, tmp_path_factory):
    """A store that was filled without an interruption."""
    directory = tmp_path_factory.mktemp("stored") / "store"
    done = tracin("extract", _arguments(trained, many, directory))
    assert done.returncode == 0, done.stderr
    assert f"Gradient factors of {ROWS:,} training examples at 3 checkpoints" in done.stdout
    assert "0 skipped, 0 shards begun again" in done.stdout
    return directory


def _arguments(trained, examples, store):
    return {"--checkpoints": trained / "run", "--examples": examples, "--output": store}


def content(store: Path) -> dict[str, bytes]:
    """Returns all files of a store, but for where things lie."""
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in store.rglob("*")
        if path.is_file()
    }


def _rows(directory, name):
    return pq.read_table(next(directory.glob(f"{name}-*.parquet"))).to_pylist()


def test_both_questions_are_answered_from_a_store(trained, many, stored, tmp_path):
    asked = {"--queries": f"npz:{trained / 'queries.npz'}?id=id", "--k": 7}
    for command, more in (("self-influence", {}), ("influence", asked)):
        results = []
        for name, inputs in (
            ("direct", {"--checkpoints": trained / "run", "--examples": many}),
            ("stored", {"--store": stored}),
        ):
            output = tmp_path / f"{command}-{name}"
            done = tracin(command, {**inputs, **more, "--output": output})
            assert done.returncode == 0, done.stderr
            results.append(_rows(output, command.replace("-", "_")))
        column = command.replace("-", "_")
        direct, found = ({_key(row): row[column] for row in rows} for rows in results)
        if command == "self-influence":
            assert found.keys() == direct.keys()
        common = found.keys() & direct.keys()
        assert len(common) >= 0.98 * len(direct)
        scale = max(map(abs, direct.values()))
        for key in common:
            assert found[key] == pytest.approx(direct[key], abs=1e-3 * scale)


def _key(row):
    return row.get("query_id"), row.get("direction"), row["example_id"]


def test_queries_from_a_store_need_no_model(trained, stored, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    spec = f"npz:{trained / 'queries.npz'}?id=id"
    arguments = _arguments(trained, spec, tmp_path / "queries") | {"--checkpoints": run}
    done = tracin("extract", arguments, "--dtype=float32")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(run)
    results = []
    for i, queries in enumerate((spec, f"store:{tmp_path / 'queries'}")):
        output = tmp_path / f"out-{i}"
        asked = {"--store": stored, "--queries": queries, "--output": output, "--k": 5}
        done = tracin("influence", asked)
        assert done.returncode == 0, done.stderr
        results.append(_rows(output, "influence"))
    assert [_key(row) for row in results[0]] == [_key(row) for row in results[1]]
    for a, b in zip(*results, strict=True):
        assert a["influence"] == pytest.approx(b["influence"], rel=1e-4)


def test_a_run_that_was_moved(trained, many, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    arguments = _arguments(trained, many, tmp_path / "store") | {"--checkpoints": tmp_path / "run"}
    assert tracin("extract", arguments).returncode == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    spec = f"npz:{trained / 'queries.npz'}"
    asked = {"--store": tmp_path / "store", "--queries": spec, "--output": tmp_path / "out"}
    refused = tracin("influence", asked)
    assert refused.returncode == 1
    assert "is not at" in refused.stderr
    assert "--checkpoints" in refused.stderr
    done = tracin("influence", asked | {"--checkpoints": tmp_path / "moved"})
    assert done.returncode == 0, done.stderr
    next((tmp_path / "moved").glob("*.keras")).write_bytes(b"other")
    shutil.rmtree(tmp_path / "out")
    other = tracin("influence", asked | {"--checkpoints": tmp_path / "moved"})
    assert "no file of it is checkpoint" in other.stderr


def test_the_guide_reads_a_factor_file_with_pyarrow_alone(stored):
    guide = (Path(__file__).parents[2] / "docs" / "store.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(import pyarrow.*?)```", guide, re.S)[1]
    assert len([line for line in code.splitlines() if line]) == 5
    shard = FactorStore.open(stored).shard("many-00001-of-00004")
    checkpoint = shard.sidecar.layout.checkpoint_ids[1]
    for name, value in (
        ("SHARD", "many-00001-of-00004"),
        ("CHECKPOINT/LAYER", f"{checkpoint}/outputs"),
    ):
        code = code.replace(name, value)
    found: dict[str, np.ndarray] = {}
    exec(code.replace('"store/', f'"{stored}/'), found)
    expected = [block.gradients[0].layers[0].error_signals for block in shard.blocks([checkpoint])]
    np.testing.assert_array_equal(found["error_signals"], np.concatenate(expected))


def test_what_a_store_holds(stored):
    done = subprocess.run([TRACIN, "store", "info", stored], capture_output=True, text=True)
    assert f"{ROWS:,} in 4 of 4 shards" in done.stdout
    assert "outputs (4 x 8)" in done.stdout
    assert "none" in done.stdout
    done = subprocess.run([TRACIN, "store", "verify", stored], capture_output=True, text=True)
    assert "is whole: 4 shards" in done.stdout


def test_the_same_again_is_done_another_is_refused(trained, many, stored):
    arguments = _arguments(trained, many, stored)
    before = content(stored)
    assert "Already done" in tracin("extract", arguments, "--batch-size=7").stdout
    other = tracin("extract", arguments, "--layers=all-dense")
    assert other.returncode == 1
    assert 'layers is "last" there and "all-dense" here' in other.stderr
    assert content(stored) == before


def test_checkpoints_are_added(trained, many, stored, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    kept = []
    edit_series(run, lambda series: kept.append(series["checkpoints"].pop(1)))
    arguments = _arguments(trained, many, tmp_path / "store") | {"--checkpoints": run}
    assert tracin("extract", arguments).returncode == 0
    done = tracin("extract", _arguments(trained, many, tmp_path / "store"))
    assert done.returncode == 0, done.stderr
    for part in ("factors", "examples"):
        found, expected = (
            {name: data for name, data in content(store).items() if name.startswith(part)}
            for store in (tmp_path / "store", stored)
        )
        assert found == expected


@pytest.fixture(scope="module")
def long_job(trained, tmp_path_factory):
    """Examples that take some seconds, and a store of them, filled without an interruption."""
    directory = tmp_path_factory.mktemp("long")
    rng = np.random.default_rng(1)
    rows = 400_000
    inputs = rng.standard_normal((rows, 5)).astype(np.float32)
    np.savez(directory / "long.npz", x=inputs, y=rng.integers(0, 4, rows))
    arguments = _arguments(trained, f"npz:{directory / 'long.npz'}", directory / "store")
    done = tracin("extract", arguments)
    assert done.returncode == 0, done.stderr
    return arguments


def _running(directory):
    """Returns the notes of shards at work; none where they are just being removed."""
    with contextlib.suppress(FileNotFoundError):
        return list(directory.glob(".*/notes-*/running/*"))
    return []


def _killed(arguments, directory, seconds, more):
    """Starts an extraction, and kills all its processes so many seconds into its work."""
    line = [TRACIN, "extract", *(f"{k}={v}" for k, v in arguments.items()), *more]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, start_new_session=True)
    while process.poll() is None and not _running(directory):
        os.sched_yield()
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return process.returncode


@pytest.mark.timeout(600)
@pytest.mark.parametrize("more", [[], WORKERS], ids=["in process", "two processes"])
def test_kills_at_random_moments_lose_nothing(long_job, tmp_path, more):
    """Five moments in each mode, of a seeded choice; what is left of the work shrinks."""
    store = tmp_path / "store"
    arguments = long_job | {"--output": store}
    generator = random.Random(7)
    durable: dict[str, int] = {}
    statuses = []
    for _ in range(5):
        statuses.append(_killed(arguments, tmp_path, generator.uniform(0.0, 0.8), more))
        sidecars = list((store / "examples").glob("[!.]*"))
        now = {path.name: path.stat().st_mtime_ns for path in sidecars}
        # What was durable has not been computed again.
        assert {name: now[name] for name in durable} == durable
        durable = now
    assert statuses.count(-signal.SIGKILL) >= 3
    done = tracin("extract", arguments, *more)
    assert done.returncode == 0, done.stderr
    assert content(store) == content(long_job["--output"])
    # Nor is anything left of the dead.
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_an_interrupt_leaves_no_half_file(long_job, tmp_path):
    arguments = long_job | {"--output": tmp_path / "store"}
    line = [TRACIN, "extract", *(f"{k}={v}" for k, v in arguments.items())]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob("store/examples/[!.]*")):
        os.sched_yield()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130, errors
    assert "'tracin extract' goes on" in errors
    assert [path.name for path in tmp_path.rglob(".*")] == []
    unfinished = {"--store": tmp_path / "store", "--output": tmp_path / "out"}
    refused = tracin("self-influence", unfinished)
    assert "run the same 'tracin extract' again to fill them" in refused.stderr


def test_what_fails_first_does_not_bind(trained, many, stored, tmp_path):
    """A forgotten option, corrected; and a finished store that a failed overwriting leaves."""
    store = tmp_path / "store"
    arguments = _arguments(trained, many, store)
    failed = tracin("extract", arguments, "--preprocess=numpy:sum")
    assert failed.returncode == 1
    assert tracin("extract", arguments).returncode == 0
    assert content(store) == content(stored)
    failed = tracin("extract", arguments, "--preprocess=numpy:sum", "--overwrite")
    assert failed.returncode == 1
    assert content(store) == content(stored)
    replaced = tracin("extract", arguments, "--dtype=float32", "--overwrite")
    assert replaced.returncode == 0, replaced.stderr
    (store / "factors" / "mine.txt").write_text("mine")
    refused = tracin("extract", arguments, "--overwrite")
    assert "holds 'factors/mine.txt', which is no part of the store" in refused.stderr
    assert (store / "factors" / "mine.txt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"store"}


def test_two_at_once_do_no_harm(trained, many, stored, tmp_path):
    arguments = _arguments(trained, many, tmp_path / "store")
    line = [TRACIN, "extract", *(f"{k}={v}" for k, v in arguments.items())]
    both = [subprocess.Popen(line, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    assert content(tmp_path / "store") == content(stored)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_worker_process_that_dies_names_its_shard(trained, many, tmp_path):
    arguments = _arguments(trained, many, tmp_path / "store")
    line = [TRACIN, "extract", *(f"{k}={v}" for k, v in arguments.items()), *WORKERS]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    # The killed process holds a shard at this moment, or had one; both end the job or not.
    while process.poll() is None:
        running = [path.name.split("~") for path in _running(tmp_path)]
        if running:
            os.kill(int(running[0][1]), signal.SIGKILL)
            break
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "its worker process died, perhaps killed because memory ran out" in errors
    assert "shard 'many-0000" in errors
    assert "Traceback" not in errors
    assert tracin("extract", arguments).returncode == 0


def test_damage_is_found_and_mended(trained, many, stored, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(stored, store)
    file = sorted((store / "factors").iterdir())[2]
    os.truncate(file, file.stat().st_size - 100)
    found = subprocess.run([TRACIN, "store", "verify", store], capture_output=True, text=True)
    assert found.returncode == 1
    assert f"shard {file.stem!r}: its factor file has" in found.stderr
    done = tracin("extract", _arguments(trained, many, store))
    assert "in 4 shard(s), 3 of them from before" in done.stdout
    assert content(store) == content(stored)


@pytest.fixture
def small_disk(tmp_path):
    """A file system that holds 300 kB, less than the store."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(directory)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can only be mounted by root")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def test_a_disk_that_is_full(trained, many, stored, small_disk):
    store = small_disk / "store"
    done = tracin("extract", _arguments(trained, many, store))
    assert done.returncode == 1
    assert "cannot be written: [Errno 28] No space left on device" in done.stderr
    assert str(store / "factors") in done.stderr or str(store / "examples") in done.stderr
    whole = content(stored)
    # What is complete stays, and is as it should be.
    kept = {name: data for name, data in content(store).items() if name.startswith("examples")}
    assert all(data == whole[name] for name, data in kept.items())
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    assert tracin("extract", _arguments(trained, many, store)).returncode == 0
    assert content(store) == whole


def test_a_directory_that_cannot_be_written(trained, many, tmp_path):
    place = "/proc/store" if os.geteuid() == 0 else tmp_path / "closed" / "store"
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
    done = tracin("extract", _arguments(trained, many, place))
    assert done.returncode == 1
    assert "cannot be written" in done.stderr


def test_a_shard_that_takes_too_long(trained, many, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    arguments = _arguments(trained, "source:slow:source", tmp_path / "store")
    line = [TRACIN, "extract", *(f"{k}={v}" for k, v in arguments.items()), "--shard-timeout=3"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert done.returncode == 1
    assert "shard 'endless' took longer than the 3 s" in done.stderr


SLOW = """
import time
from tracin_transforms import ExampleSource, Shard

class Endless(ExampleSource):
    def shards(self):
        return (Shard("endless"),)

    def read(self, shard, batch_size):
        while True:
            time.sleep(1)
        yield

def source():
    return Endless()
"""


def test_a_plan_says_what_the_command_does(trained, many, tmp_path):
    arguments = _arguments(trained, many, tmp_path / "store")
    plan = tracin("plan", arguments, "--workers=8")
    assert plan.returncode == 0, plan.stderr
    assert "'tracin extract' will take:" in plan.stdout
    assert f"{ROWS:,} in 4 shard(s)" in plan.stdout
    assert "8 workers have 4 shards to share: 4 of them have nothing to do" in plan.stdout
    assert not (tmp_path / "store").exists()
    dry = tracin("self-influence", arguments, "--dry-run")
    assert "'tracin self-influence' will take:" in dry.stdout
    assert [path for path in tmp_path.iterdir() if path.name != "kinds.json"] == []

    table = {
        "date": "2026-11-01",
        "source": "a list",
        "currency": "EUR",
        "kinds": {"large": {"cores": 16, "price_per_hour": 3600}},
    }
    (tmp_path / "kinds.json").write_text(json.dumps(table))
    priced = tracin(
        "plan",
        arguments,
        "--workers=2",
        "--worker-kind=large",
        f"--worker-kinds={tmp_path / 'kinds.json'}",
    )
    assert "EUR (a list, 2026-11-01)" in priced.stdout
    unknown = tracin(
        "plan",
        arguments,
        "--workers=2",
        "--worker-kind=tiny",
        f"--worker-kinds={tmp_path / 'kinds.json'}",
    )
    assert "--worker-kind 'tiny': expected one of large" in unknown.stderr


def test_a_plan_warns_where_the_disk_is_too_small(trained, many, small_disk):
    plan = tracin("plan", _arguments(trained, many, small_disk / "store"))
    assert "warning: the store does not fit" in plan.stdout
