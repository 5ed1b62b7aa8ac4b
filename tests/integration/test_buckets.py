"""The commands on gs://, against an emulated Google Cloud Storage that can be told to fail."""

import os
import subprocess

import pyarrow.parquet as pq
import pytest

from tests.bucket import emulated_bucket
from tests.integration.conftest import TRACIN, tracin
from tracin_transforms.storage.files import files_below, matching_files
from tracin_transforms.storage.remote import RemotePath


@pytest.fixture
def bucket(monkeypatch, trained):
    """A bucket with the run and the examples, as the commands find it."""
    with emulated_bucket() as served:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", served.address)
        # No credentials are looked for, on this machine or elsewhere.
        monkeypatch.setenv("CLOUDSDK_CONFIG", "/nonexistent")
        root = RemotePath(served.uri)
        for path in [*(trained / "run").iterdir(), *trained.glob("*.npz")]:
            (root / str(path.relative_to(trained))).upload(path)
        yield served


def _content(directory):
    return {
        str(path).removeprefix(str(directory)): path.read_bytes()
        for path, _ in files_below(directory)
    }


def test_everything_in_a_bucket(bucket, trained, tmp_path):
    inputs = {
        "--checkpoints": f"{bucket.uri}/run",
        "--examples": f"npz:{bucket.uri}/train.npz?id=id",
    }
    store = f"{bucket.uri}/stores/one"
    done = tracin("extract", {**inputs, "--output": store})
    assert done.returncode == 0, done.stderr
    assert "Already done" in tracin("extract", {**inputs, "--output": store}).stdout

    local = {"--checkpoints": trained / "run", "--examples": f"npz:{trained / 'train.npz'}?id=id"}
    assert tracin("extract", {**local, "--output": tmp_path / "store"}).returncode == 0
    found, expected = _content(RemotePath(store)), _content(tmp_path / "store")
    same = [name for name in expected if name.startswith(("/factors", "/examples"))]
    assert len(same) == 4
    assert {name: found[name] for name in same} == {name: expected[name] for name in same}
    # Nothing but the store: no half files, no notes of the job.
    assert found.keys() == expected.keys()
    assert len(files_below(RemotePath(f"{bucket.uri}/stores"))) == len(found)

    asked = {"--queries": f"npz:{bucket.uri}/queries.npz?id=id", "--store": store}
    answer = f"{bucket.uri}/answer"
    done = tracin("influence", {**asked, "--output": answer})
    assert done.returncode == 0, done.stderr
    assert "Already done" in tracin("influence", {**asked, "--output": answer}).stdout
    assert tracin("influence", {**asked, "--output": answer, "--overwrite": "yes"}).returncode == 2
    assert tracin("influence", {**asked, "--output": answer}, "--overwrite").returncode == 0
    here = {
        "--queries": f"npz:{trained / 'queries.npz'}?id=id",
        "--store": tmp_path / "store",
        "--output": tmp_path / "answer",
    }
    assert tracin("influence", here).returncode == 0
    with RemotePath(f"{answer}/influence-00000-of-00001.parquet").open() as file:
        rows = pq.read_table(file).to_pylist()
    assert (
        rows == pq.read_table(tmp_path / "answer" / "influence-00000-of-00001.parquet").to_pylist()
    )

    for command, line in (("self-influence", {**inputs}), ("self-influence", {"--store": store})):
        output = f"{bucket.uri}/{len(line)}"
        assert tracin(command, {**line, "--output": output}).returncode == 0
    rankings = [
        pq.read_table(path.open())["example_id"].to_pylist()
        for path, _ in matching_files(f"{bucket.uri}/[12]/self_influence-*.parquet")
    ]
    assert len(rankings) == 2
    assert rankings[0] == rankings[1]


def test_a_bucket_that_fails_for_a_while(bucket, trained, tmp_path):
    """503 at several moments, downloads that are cut and slow: no difference in the end."""
    inputs = {
        "--checkpoints": f"{bucket.uri}/run",
        "--examples": f"npz:{bucket.uri}/train.npz?id=id",
    }
    store = f"{bucket.uri}/store"
    line = [TRACIN, "extract", *(f"{k}={v}" for k, v in inputs.items()), f"--output={store}"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    bucket.fail(refuse=2, cut=2, slow=1)
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment)
    # Once more, when the first shards are being written.
    while process.poll() is None and not files_below(RemotePath(f"{store}/factors")):
        pass
    bucket.fail(refuse=2)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert bucket.done() == {"refuse": 4, "cut": 2, "slow": 1}
    verified = subprocess.run([TRACIN, "store", "verify", store], capture_output=True, text=True)
    assert "is whole" in verified.stdout, verified.stderr


def test_what_is_not_in_the_bucket_is_named(bucket, tmp_path):
    for name, arguments, message in (
        ("run", {"--checkpoints": f"{bucket.uri}/nothing"}, "has no checkpoints.json"),
        ("examples", {"--examples": f"npz:{bucket.uri}/nothing.npz"}, "does not exist"),
        ("bucket", {"--examples": "npz:gs://other/x.npz"}, "does not exist"),
    ):
        line = {
            "--checkpoints": f"{bucket.uri}/run",
            "--examples": f"npz:{bucket.uri}/train.npz",
            "--output": tmp_path / name,
        }
        done = tracin("self-influence", line | arguments)
        assert done.returncode == 1
        assert message in done.stderr
