"""Models, checkpoints and losses of other kinds, as users give them to the commands."""

import importlib
import json
import re
import shutil
from pathlib import Path

import keras
import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.integration.conftest import edit_series, tracin
from tracin_transforms.models.recorder import CheckpointRecorder

LOSS = "sparse_categorical_crossentropy?from_logits=false"


def _rows(directory, name="influence"):
    return pq.read_table(directory / f"{name}-00000-of-00001.parquet").to_pylist()


def _result(command, arguments, *more):
    done = tracin(command, arguments, *more)
    assert done.returncode == 0, done.stderr
    return _rows(Path(arguments["--output"]), command.replace("-", "_"))


@pytest.mark.parametrize("kind", ["keras", "weights"])
def test_checkpoint_files_without_a_run(trained, arguments, tmp_path, kind):
    expected = _result("self-influence", arguments)
    run = trained / "run"
    more = [f"--loss={LOSS}", "--learning-rates=0.1,0.1,0.1"]
    if kind == "weights":
        files = tmp_path / "weights"
        files.mkdir()
        for path in run.glob("*.keras"):
            keras.saving.load_model(path).save_weights(files / f"{path.stem}.weights.h5")
        more.append(f"--model={run / 'epoch-002.keras'}")
        pattern = files / "*.weights.h5"
    else:
        pattern = run / "*.keras"
    changed = {**arguments, "--checkpoints": pattern, "--output": tmp_path / "files"}
    found = _result("self-influence", changed, *more)
    assert [row["example_id"] for row in found] == [row["example_id"] for row in expected]
    np.testing.assert_allclose(
        [row["per_checkpoint"] for row in found],
        [row["per_checkpoint"] for row in expected],
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    ("checkpoints", "more", "message"),
    [
        ("run/*.keras", [], "files that do not say how they were trained: expected .*--loss"),
        ("run/*.keras", [f"--loss={LOSS}"], "has no learning rate .*--learning-rates"),
        ("run/*.keras", [f"--loss={LOSS}", "--learning-rates=0.1"], "gives 1 for 3 checkpoints"),
        ("run", [f"--loss={LOSS}"], "--loss is for checkpoint files .* change it there"),
        ("run", ["--learning-rates=1,1,1"], "--learning-rates is for checkpoint files"),
        ("run", ["--import=no_such_module"], "--import 'no_such_module' cannot be imported"),
        ("run", ["--checkpoint-weights=1"], "expected recorded, equal or a file; file '1' does"),
    ],
)
def test_what_does_not_fit_is_refused(trained, arguments, tmp_path, checkpoints, more, message):
    arguments["--checkpoints"] = trained / checkpoints
    done = tracin("self-influence", arguments, *more)
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr
    assert not (tmp_path / "out").exists()


def test_queries_may_have_a_loss_of_their_own(trained, arguments, tmp_path):
    arguments["--queries"] = f"npz:{trained / 'queries.npz'}?id=id"
    plain = _result("influence", arguments, "--k=400")
    arguments["--output"] = str(tmp_path / "margin")
    margin = _result("influence", arguments, "--k=400", "--query-loss=margin")
    manifest = json.loads((tmp_path / "margin" / "manifest.json").read_text())
    assert manifest["run"]["query_loss"] == ["margin", False, {}]
    assert manifest["run"]["loss"] == "sparse_categorical_crossentropy"

    # The margin's error signal is that of the cross-entropy, divided by 1 − p at each checkpoint.
    with np.load(trained / "queries.npz") as data:
        inputs, labels, ids = data["x"], data["y"], data["id"]
    rest = {}
    for path in sorted((trained / "run").glob("*.keras")):
        p = keras.saving.load_model(path).predict(inputs, verbose=0)
        for i, query in enumerate(ids):
            rest.setdefault(query, []).append(1 - p[i, labels[i]])
    expected = {
        (row["query_id"], row["example_id"]): np.array(row["per_checkpoint"])
        / rest[row["query_id"]]
        for row in plain
    }
    assert len(margin) == len(plain)
    for row in margin[::37]:
        parts = expected[row["query_id"], row["example_id"]]
        np.testing.assert_allclose(row["per_checkpoint"], parts, rtol=2e-3, atol=1e-6)
    refused = tracin("influence", {**arguments, "--output": tmp_path / "no"}, "--query-loss=luck")
    assert refused.returncode == 1
    assert "loss 'luck' is unknown" in refused.stderr


def test_a_file_of_weights_chooses_checkpoints(trained, arguments, tmp_path):
    everything = {row["example_id"]: row for row in _result("self-influence", arguments)}
    (tmp_path / "weights.json").write_text('{"epoch-002": 2.0, "epoch-006": 0.1}')
    arguments["--output"] = str(tmp_path / "chosen")
    weights = f"--checkpoint-weights={tmp_path / 'weights.json'}"
    for row in _result("self-influence", arguments, weights):
        first, _, last = everything[row["example_id"]]["per_checkpoint"]
        np.testing.assert_allclose(row["per_checkpoint"], [20 * first, last], rtol=1e-6)
    for text, message in [
        ('{"epoch-009": 1}', "no checkpoint 'epoch-009' in the run: expected some of epoch-002"),
        ('{"epoch-002": -1}', "'epoch-002' has the weight -1, expected a finite number >= 0"),
        ('{"epoch-002": 0}', "no checkpoint has a weight above 0"),
        ("[1]", "expected an object of weights by checkpoint id"),
        ("{", "Expecting property name"),
    ]:
        (tmp_path / "weights.json").write_text(text)
        done = tracin("self-influence", arguments, weights)
        assert done.returncode == 1
        assert message in done.stderr


def test_several_inputs_and_outputs_weights_and_a_module_of_the_users(tmp_path, monkeypatch):
    """All at once: two inputs by name, one output of two, a loss and a layer from a module."""
    (tmp_path / "mine.py").write_text(
        "import keras\n"
        "@keras.saving.register_keras_serializable('mine')\n"
        "class Twice(keras.layers.Layer):\n"
        "    def call(self, inputs): return 2 * inputs\n"
        "@keras.saving.register_keras_serializable('mine')\n"
        "class Quartic(keras.losses.Loss):\n"
        "    def call(self, y_true, y_pred):\n"
        "        return keras.ops.mean((y_true - y_pred) ** 4, axis=-1)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    mine = importlib.import_module("mine")
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal((60, n)).astype(np.float32) for n in (4, 3))
    size, weight = rng.standard_normal((60, 1)), rng.random(60)
    a, b = keras.Input((4,), name="left"), keras.Input((3,), name="right")
    x = keras.layers.Dense(5, "tanh")(keras.layers.Concatenate()([mine.Twice()(a), b]))
    outputs = {"kind": keras.layers.Dense(3)(x), "size": keras.layers.Dense(1, name="head")(x)}
    model = keras.Model({"left": a, "right": b}, outputs)
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), {"kind": cross_entropy, "size": mine.Quartic()})
    recorder = CheckpointRecorder("run", output="size")
    targets = {"kind": np.zeros(60, int), "size": size}
    model.fit({"left": left, "right": right}, targets, verbose=0, callbacks=[recorder])
    np.savez("train.npz", l=left, r=right, size=size, w=weight)
    arguments = {
        "--checkpoints": "run",
        "--examples": "npz:train.npz?x.left=l&x.right=r&y=size&weight=w",
        "--output": "out",
        "--direct_running_mode": "multi_processing",
        "--direct_num_workers": "2",
    }
    refused = tracin("self-influence", arguments)
    assert "Could not locate class 'Twice': name the module" in refused.stderr
    found = _result("self-influence", arguments, "--import=mine")

    wide = keras.Model(model.input, x).predict({"left": left, "right": right}, verbose=0)
    error = 4 * (model.predict({"left": left, "right": right}, verbose=0)["size"] - size) ** 3
    expected = 0.1 * (weight * error[:, 0]) ** 2 * ((wide.astype(float) ** 2).sum(axis=1) + 1)
    order = np.argsort(-expected)
    assert [row["example_id"] for row in found] == [f"train:{i}" for i in order]
    np.testing.assert_allclose([r["self_influence"] for r in found], expected[order], rtol=1e-3)


def test_class_weights_of_the_run(trained, arguments, tmp_path):
    plain = {row["example_id"]: row for row in _result("self-influence", arguments)}
    shutil.copytree(trained / "run", tmp_path / "run")
    edit_series(tmp_path / "run", lambda document: document.update(class_weights={"1": 3.0}))
    arguments |= {"--checkpoints": str(tmp_path / "run"), "--output": str(tmp_path / "weighted")}
    for row in _result("self-influence", arguments):
        before = plain[row["example_id"]]
        factor = 3.0 if row["label"] == 1 else 1.0
        assert row["self_influence"] == pytest.approx(
            factor**2 * before["self_influence"], rel=1e-5
        )
        assert row["loss"] == pytest.approx(factor * before["loss"], rel=1e-5)
    edit_series(tmp_path / "run", lambda document: document.update(class_weights={"x": 1}))
    refused = tracin("self-influence", arguments, "--overwrite")
    assert "'class_weights' is {'x': 1}, expected an object of class indices" in refused.stderr
