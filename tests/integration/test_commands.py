"""Both commands as users run them, against the direct computation."""

import json
import os
import signal
import subprocess
import time

import keras
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from tests.integration.conftest import TRACIN, tracin
from tracin_transforms.models.recorder import CheckpointRecorder

WORKERS = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]


def _reference(trained, name):
    """Error signals, activations with the bias's 1, and rates, by Keras and NumPy alone."""
    factors, rates = [], []
    with np.load(trained / name) as data:
        inputs, labels, ids = data["x"], data["y"], data["id"]
    for entry in json.loads((trained / "run" / "checkpoints.json").read_text())["checkpoints"]:
        w1, b1, w2, b2 = (
            w.astype(np.float64)
            for w in keras.saving.load_model(trained / "run" / entry["path"]).get_weights()
        )
        hidden = np.maximum(inputs @ w1 + b1, 0)
        exponentials = np.exp(hidden @ w2 + b2)
        errors = exponentials / exponentials.sum(axis=1, keepdims=True) - np.eye(4)[labels]
        factors.append((errors, np.hstack([hidden, np.ones((len(hidden), 1))])))
        rates.append(entry["learning_rate"])
    return ids, labels, factors, rates


@pytest.mark.parametrize("more", [(), ("--batch-size=3",), tuple(WORKERS)])
def test_influence_equals_the_reference(trained, arguments, tmp_path, more):
    arguments["--queries"] = f"npz:{trained / 'queries.npz'}?id=id"
    done = tracin("influence", arguments, "--k=7", *more)
    assert done.returncode == 0, done.stderr
    assert "The 7 strongest proponents and opponents of each of 20 queries" in done.stdout

    ids, labels, factors, rates = _reference(trained, "train.npz")
    query_ids, query_labels, query_factors, _ = _reference(trained, "queries.npz")
    influence = sum(
        rate * (e @ f.T) * (h @ g.T)
        for rate, (e, h), (f, g) in zip(rates, factors, query_factors, strict=True)
    )
    table = pq.read_table(tmp_path / "out" / "influence-00000-of-00001.parquet")
    rows = table.to_pylist()
    for q, query_id in enumerate(query_ids):
        for direction, sign in (("proponent", 1), ("opponent", -1)):
            mine = [r for r in rows if (r["query_id"], r["direction"]) == (query_id, direction)]
            order = np.argsort(-sign * influence[:, q])[:7]
            assert [r["example_id"] for r in mine] == ids[order].tolist()
            assert [r["label"] for r in mine] == labels[order].tolist()
            np.testing.assert_allclose(
                [r["influence"] for r in mine],
                influence[order, q],
                atol=1e-6 * np.abs(influence[:, q]).max(),
            )
            assert {r["query_label"] for r in mine} == {query_labels[q]}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["run"]["k"] == 7
    assert manifest["summary"]["queries"] == 20
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("more", [(), ("--batch-size=3",), tuple(WORKERS)])
def test_self_influence_equals_the_reference(trained, arguments, tmp_path, more):
    done = tracin("self-influence", arguments, *more)
    assert done.returncode == 0, done.stderr

    ids, _, factors, rates = _reference(trained, "train.npz")
    parts = np.stack(
        [rate * (e**2).sum(1) * (h**2).sum(1) for rate, (e, h) in zip(rates, factors, strict=True)],
        axis=1,
    )
    order = np.argsort(-parts.sum(axis=1))
    rows = pq.read_table(tmp_path / "out" / "self_influence-00000-of-00001.parquet").to_pylist()
    assert [r["example_id"] for r in rows] == ids[order].tolist()
    np.testing.assert_allclose([r["per_checkpoint"] for r in rows], parts[order], rtol=2e-5)
    assert f"1  {rows[0]['self_influence']:>14.6g}" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_regression_model(tmp_path, outputs):
    """From training with the recorder on; labels and predictions are numbers, or lists of them."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((90, 5)).astype(np.float32)
    targets = np.tanh(inputs @ rng.standard_normal((5, outputs))) + 0.1
    targets = targets[:, 0] if outputs == 1 else targets
    np.savez(tmp_path / "train.npz", x=inputs, y=targets)
    np.savez(tmp_path / "queries.npz", x=inputs[:4] + 0.5, y=targets[:4])
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(6, "relu"), keras.layers.Dense(outputs)]
    )
    model.compile(keras.optimizers.SGD(0.1), "mse")
    recorder = CheckpointRecorder(tmp_path / "run")
    model.fit(inputs, targets, epochs=1, verbose=0, callbacks=[recorder])
    specs = [f"npz:{tmp_path / name}.npz" for name in ("train", "queries")]
    names = ("--checkpoints", "--examples", "--queries", "--output")
    arguments = dict(zip(names, (tmp_path / "run", *specs, tmp_path / "out"), strict=True))
    done = tracin("influence", arguments, "--k=5")
    assert done.returncode == 0, done.stderr

    w1, b1, w2, b2 = (w.astype(np.float64) for w in model.get_weights())
    hidden = [np.maximum(x @ w1 + b1, 0) for x in (inputs, inputs[:4] + 0.5)]
    predicted = [h @ w2 + b2 for h in hidden]
    e, f = (
        2 * (y - t.reshape(y.shape)) / outputs
        for y, t in zip(predicted, (targets, targets[:4]), strict=True)
    )
    influence = 0.1 * (e @ f.T) * (hidden[0] @ hidden[1].T + 1)
    rows = pq.read_table(tmp_path / "out" / "influence-00000-of-00001.parquet").to_pylist()
    for q in range(4):
        mine = [r for r in rows if r["query_id"] == f"queries:{q}"]
        first = [r for r in mine if r["direction"] == "proponent"]
        order = np.argsort(-influence[:, q])[: len(first)]
        assert [r["example_id"] for r in first] == [f"train:{i}" for i in order]
        found = np.array([r["label"] for r in first]).reshape(len(first), outputs)
        np.testing.assert_allclose(found, targets[order].reshape(found.shape), rtol=1e-6)
        prediction = np.array(mine[0]["query_prediction"]).ravel()
        np.testing.assert_allclose(prediction, predicted[1][q], rtol=1e-5)


def test_all_dense_layers(trained, arguments, tmp_path):
    """Each layer's self-influence adds up."""
    arguments["--output"] = tmp_path / "all"
    assert tracin("self-influence", arguments, "--layers=all-dense").returncode == 0
    rows = pq.read_table(tmp_path / "all" / "self_influence-00000-of-00001.parquet").to_pylist()
    found = {row["example_id"]: row["self_influence"] for row in rows}
    per_layer = {row["example_id"]: row["per_layer"] for row in rows}
    parts = []
    for name in ("hidden", "outputs"):
        arguments["--output"] = tmp_path / name
        assert tracin("self-influence", arguments, f"--layers={name}").returncode == 0
        table = pq.read_table(tmp_path / name / "self_influence-00000-of-00001.parquet")
        parts.append({row["example_id"]: row["self_influence"] for row in table.to_pylist()})
    for example, value in found.items():
        assert value == pytest.approx(sum(part[example] for part in parts), rel=1e-6)
        assert list(per_layer[example]) == ["hidden", "outputs"]
        for part, own in zip(parts, per_layer[example].values(), strict=True):
            assert own == pytest.approx(part[example], rel=1e-6)
    assert json.loads((tmp_path / "all" / "manifest.json").read_text())["run"]["layers"] == (
        "all-dense"
    )
    arguments["--output"] = tmp_path / "unknown"
    refused = tracin("self-influence", arguments, "--layers=hidden,conv")
    assert refused.returncode == 1
    assert "0 layers are called 'conv': expected one of" in refused.stderr


def test_keras_configured_for_another_backend(arguments, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    done = tracin("self-influence", arguments)
    assert done.returncode == 0, done.stderr


def test_the_same_again_is_done_and_another_is_refused(arguments, tmp_path):
    assert tracin("self-influence", arguments).returncode == 0
    before = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns

    again = tracin("self-influence", arguments, "--batch-size=5")
    assert (again.returncode, "Already done" in again.stdout) == (0, True)
    other = tracin("self-influence", arguments, "--checkpoint-weights=equal")
    assert other.returncode == 1
    assert "holds the result of another run: checkpoints[0].weight is 0.1" in other.stderr
    assert "--overwrite" in other.stderr
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == before

    replaced = tracin("self-influence", arguments, "--checkpoint-weights=equal", "--overwrite")
    assert replaced.returncode == 0
    weights = json.loads((tmp_path / "out" / "manifest.json").read_text())["run"]["checkpoints"]
    assert [c["weight"] for c in weights] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("more", [[], WORKERS])
def test_interrupting_leaves_nothing_behind(trained, arguments, tmp_path, sent, more):
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "large.npz", x=rng.random((1_000_000, 5), np.float32), y=np.zeros(1_000_000, int)
    )
    arguments["--examples"] = f"npz:{tmp_path / 'large.npz'}"
    line = [TRACIN, "self-influence", *(f"{k}={v}" for k, v in arguments.items()), *more]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True)
    _wait_for(lambda: list(tmp_path.glob(".*.out.work/notes/blocks/*")), process)
    family = psutil.Process(process.pid).children(recursive=True)

    start = time.monotonic()
    # A terminal's Ctrl-C goes to the workers too; `kill` names one process.
    (os.killpg if sent == signal.SIGINT else os.kill)(process.pid, sent)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - start < 5
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert "Run the same command again" in errors
    gone, alive = psutil.wait_procs(family, timeout=5)
    assert not alive
    assert bool(family) == bool(more)
    assert [p.name for p in tmp_path.iterdir()] == ["large.npz"]


def _wait_for(condition, process):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        os.sched_yield()
