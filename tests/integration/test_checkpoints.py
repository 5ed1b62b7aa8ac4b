"""`tracin checkpoints` as users run it."""

import json
import shutil
import subprocess

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.integration.conftest import TRACIN, edit_series, tracin


def _checkpoints(*arguments):
    line = [TRACIN, "checkpoints", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def _table(text):
    lines = [line.split() for line in text.splitlines() if line.startswith("  epoch-")]
    return {line[0]: line[1:] for line in lines}


def test_what_was_recorded(trained):
    done = _checkpoints(trained / "run", "--choose=2")
    assert done.returncode == 0, done.stderr
    document = json.loads((trained / "run" / "checkpoints.json").read_text())
    losses = [checkpoint["loss"] for checkpoint in document["checkpoints"]]
    table = _table(done.stdout)
    assert list(table) == ["epoch-002", "epoch-004", "epoch-006"]
    assert [float(row[3]) for row in table.values()] == pytest.approx(losses, abs=1e-4)
    drop = float(table["epoch-004"][4])
    assert drop == pytest.approx(losses[0] - losses[1], abs=2e-4)
    assert "loss-drop:       epoch-004, epoch-006" in done.stdout
    assert "evenly:          epoch-004, epoch-006" in done.stdout
    assert "validation-loss:" not in done.stdout
    assert "--output DIR writes plots" in done.stdout


def test_a_sample_a_page_and_choices_to_use(trained, arguments, tmp_path):
    output = tmp_path / "checkpoints"
    more = ["--examples", arguments["--examples"], "--output", output, "--choose=2"]
    done = _checkpoints(trained / "run", *more)
    assert done.returncode == 0, done.stderr
    assert "of a sample of 280 training examples" in done.stdout
    shares = [float(row[-1].rstrip("%")) for row in _table(done.stdout).values()]
    assert sum(shares) == pytest.approx(100, abs=0.2)

    # The share is that of the self-influence of the same examples.
    arguments["--output"] = str(tmp_path / "self")
    assert tracin("self-influence", arguments).returncode == 0
    table = pq.read_table(tmp_path / "self" / "self_influence-00000-of-00001.parquet")
    parts = np.array(table["per_checkpoint"].to_pylist()).sum(axis=0)
    np.testing.assert_allclose(shares, 100 * parts / parts.sum(), atol=0.06)

    assert sorted(path.name for path in output.iterdir()) == [
        "checkpoints.html",
        "evenly.json",
        "loss-drop.json",
        "manifest.json",
    ]
    page = (output / "checkpoints.html").read_text()
    assert page.count("<svg") == 2
    assert "epoch-004" in page
    chosen = json.loads((output / "evenly.json").read_text())
    assert list(chosen) == ["epoch-004", "epoch-006"]
    arguments["--output"] = str(tmp_path / "chosen")
    weights = f"--checkpoint-weights={output / 'evenly.json'}"
    assert tracin("self-influence", arguments, weights).returncode == 0

    assert "Already done" in _checkpoints(trained / "run", *more).stdout
    other = _checkpoints(trained / "run", *more, "--sample=20")
    assert other.returncode == 1
    assert "sample is 1000 there and 20 here" in other.stderr


def test_validation_losses_and_unknown_rates(trained, tmp_path, arguments):
    shutil.copytree(trained / "run", tmp_path / "run")

    def change(document):
        for checkpoint, loss in zip(document["checkpoints"], (0.5, 0.2, 0.3), strict=True):
            checkpoint.update(validation_loss=loss, learning_rate=None)

    edit_series(tmp_path / "run", change)
    done = _checkpoints(tmp_path / "run", "--choose=1", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "validation-loss: epoch-004" in done.stdout
    assert "validation loss" in done.stdout
    assert "learning rate" not in done.stdout
    chosen = json.loads((tmp_path / "out" / "validation-loss.json").read_text())
    assert chosen == {"epoch-004": 1.0}
    refused = _checkpoints(tmp_path / "run", "--examples", arguments["--examples"])
    assert refused.returncode == 1
    assert "has no learning rate" in refused.stderr
    same = ["--examples", arguments["--examples"], "--checkpoint-weights=equal", "--sample=50"]
    done = _checkpoints(tmp_path / "run", *same)
    assert "of a sample of 50 training examples" in done.stdout


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        ([], 2, "required: RUN"),
        (["run", "--choose=0"], 2, "'0': expected a whole number"),
        (["run", "--direct_num_workers=2"], 2, "unrecognized arguments: --direct_num_workers=2"),
        (["nothing"], 1, "'nothing' has no checkpoints.json"),
    ],
)
def test_wrong_usage(more, status, message):
    done = _checkpoints(*more)
    assert done.returncode == status
    assert message in done.stderr
