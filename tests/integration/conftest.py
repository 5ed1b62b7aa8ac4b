import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from tracin_transforms.models.recorder import CheckpointRecorder

TRACIN = str(Path(sys.executable).with_name("tracin"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A small network trained on random blobs: run/, train.npz and queries.npz."""
    directory = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((4, 5)) * 2
    labels = rng.integers(0, 4, 300)
    inputs = (centres[labels] + rng.standard_normal((300, 5))).astype(np.float32)
    ids = np.array([f"z{i:03d}" for i in range(300)])
    np.savez(directory / "train.npz", x=inputs[:280], y=labels[:280], id=ids[:280])
    np.savez(directory / "queries.npz", x=inputs[280:], y=labels[280:], id=ids[280:])
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(8, activation="relu", name="hidden"),
            keras.layers.Dense(4, activation="softmax", name="outputs"),
        ]
    )
    model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
    recorder = CheckpointRecorder(directory / "run", every=2)
    model.fit(inputs[:280], labels[:280], batch_size=32, epochs=6, verbose=0, callbacks=[recorder])
    return directory


@pytest.fixture
def arguments(trained, tmp_path):
    """What a user types for the job, as a dictionary to change."""
    return {
        "--checkpoints": str(trained / "run"),
        "--examples": f"npz:{trained / 'train.npz'}?id=id",
        "--output": str(tmp_path / "out"),
    }


def tracin(command, arguments, *more):
    """Runs the installed console script; gives what it printed, and fails on a traceback."""
    line = [TRACIN, command, *(f"{name}={value}" for name, value in arguments.items()), *more]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def edit_series(run, change):
    """Changes a run's checkpoints.json."""
    path = run / "checkpoints.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
