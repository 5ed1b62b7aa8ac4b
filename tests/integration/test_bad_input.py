"""Each kind of bad input: exit status, message, no traceback, nothing written."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.integration.conftest import edit_series, tracin


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run, to damage."""
    shutil.copytree(trained / "run", tmp_path / "run")
    return tmp_path / "run"


def _refused(command, arguments, *fragments):
    done = tracin(command, arguments)
    assert done.returncode == 1, done.stdout
    # Before it, on a slow machine, a line of progress.
    assert done.stderr.splitlines()[-1].startswith("tracin: error: ")
    for fragment in fragments:
        assert fragment in done.stderr
    output = Path(arguments["--output"])
    assert not output.exists()
    assert not list(output.parent.glob(".out*"))


def _checkpoint(change):
    return lambda document: document["checkpoints"][1].update(change)


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (lambda d: d["checkpoints"].clear(), ["no checkpoints: expected at least one"]),
        (_checkpoint({"id": "epoch-002"}), ["checkpoint id 'epoch-002' occurs 2 times"]),
        (_checkpoint({"path": "gone.keras"}), ["'epoch-004'", "gone.keras' does not exist"]),
        (
            _checkpoint({"learning_rate": None}),
            ["'epoch-004' has no learning rate", "--checkpoint-weights equal"],
        ),
        (lambda d: d.update(loss="nonsense"), ["loss 'nonsense' is unknown: expected"]),
    ],
)
def test_bad_runs(run, arguments, change, fragments):
    edit_series(run, change)
    _refused("self-influence", {**arguments, "--checkpoints": str(run)}, *fragments)


def test_directories_that_are_no_runs(run, arguments):
    (run / "checkpoints.json").unlink()
    _refused(
        "self-influence",
        {**arguments, "--checkpoints": str(run)},
        "no checkpoints.json",
        "CheckpointRecorder",
    )


def test_a_checkpoint_that_is_no_model(run, arguments):
    (run / "epoch-004.keras").write_bytes(b"not a model")
    _refused(
        "self-influence",
        {**arguments, "--checkpoints": str(run)},
        "checkpoint 'epoch-004'",
        "cannot be loaded as a Keras model",
    )


def _npz(path, **change):
    rng = np.random.default_rng(0)
    arrays = {"x": rng.random((50, 5)).astype(np.float32), "y": np.arange(50) % 4, **change}
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return f"npz:{path}"


def _with_nan(value):
    x = np.zeros((50, 5), np.float32)
    x[7, 2] = value
    return x


BAD_EXAMPLES = [
    ({"y": None}, "", ["has no array 'y'", "found x"]),
    ({"y": np.arange(49)}, "", ["'x' has 50, 'y' has 49"]),
    ({"x": np.zeros((50, 6), np.float32)}, "", ["inputs of shape (5,)", "examples have (6,)"]),
    (
        {"y": np.full(50, 4)},
        "",
        ["example 'bad:0' of shard 'bad-", "label 4 is", "expected 0 to 3"],
    ),
    ({"x": _with_nan(np.nan)}, "", ["example 'bad:7'", "NaN or infinite"]),
    ({"x": _with_nan(np.inf)}, "", ["example 'bad:7'", "NaN or infinite"]),
    ({"id": np.array(["a"] * 50)}, "?id=id", ["example id 'a' occurs 50 times"]),
]


@pytest.mark.parametrize(("change", "query", "fragments"), BAD_EXAMPLES)
def test_bad_training_examples(arguments, tmp_path, change, query, fragments):
    arguments["--examples"] = _npz(tmp_path / "bad.npz", **change) + query
    _refused("self-influence", arguments, *fragments)


@pytest.mark.parametrize(("change", "query", "fragments"), BAD_EXAMPLES[2:5])
def test_bad_queries(arguments, tmp_path, change, query, fragments):
    arguments["--queries"] = _npz(tmp_path / "bad.npz", **change) + query
    _refused("influence", arguments, *fragments)


def test_bad_examples_in_a_worker_process(arguments, tmp_path):
    arguments["--examples"] = _npz(tmp_path / "bad.npz", x=_with_nan(np.nan))
    arguments["--direct_running_mode"] = "multi_processing"
    arguments["--direct_num_workers"] = "2"
    _refused("self-influence", arguments, "example 'bad:7'", "NaN or infinite")


def test_bad_files(arguments, tmp_path):
    for spec, fragment in [
        (f"npz:{tmp_path / 'missing.npz'}", "missing.npz' does not exist"),
        (f"npz:{tmp_path / 'text.npz'}", "text.npz' is not a NumPy archive"),
        ("csv:data.csv", "unknown kind of source 'csv'"),
        ("npz:gs://bucket/data.npz", "no Google credentials found"),
    ]:
        (tmp_path / "text.npz").write_text("hello")
        _refused("self-influence", {**arguments, "--examples": spec}, fragment)


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_an_output_with_other_files_is_kept(arguments, more):
    output = Path(arguments["--output"])
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    done = tracin("self-influence", arguments, *more)
    assert done.returncode == 1
    assert "not empty and holds no result" in done.stderr
    assert [p.name for p in output.iterdir()] == ["mine.txt"]
