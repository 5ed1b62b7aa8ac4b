"""The same images in every form that is read: the same factors and the same results."""

import keras
import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.examples.writers import (
    CLASSES,
    FORMS,
    encoded_image,
    random_images,
    record,
    serialized,
    write_npz,
)
from tests.integration.conftest import tracin
from tracin_transforms.core.factors import concatenate_blocks
from tracin_transforms.examples.spec import parse_spec
from tracin_transforms.models.extractor import KerasFactorExtractor
from tracin_transforms.models.recorder import CheckpointRecorder
from tracin_transforms.storage.checkpoint_series import read_checkpoint_series

COUNT = 2000


@pytest.fixture(scope="module")
def images():
    return random_images(COUNT)


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """Two checkpoints of a small network for these images."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((12, 12, 3), dtype="uint8"),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(len(CLASSES)),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss)
    directory = tmp_path_factory.mktemp("run")
    model.fit(
        images.pixels,
        images.labels,
        epochs=2,
        verbose=0,
        callbacks=[CheckpointRecorder(directory)],
    )
    return directory


@pytest.fixture(scope="module")
def extractor(run):
    return KerasFactorExtractor(read_checkpoint_series(run)).load()


def _by_id(extractor, source):
    blocks = [
        extractor.extract(batch)
        for shard in source.shards()
        for batch in source.read(shard, 256)
        if len(batch)
    ]
    block = concatenate_blocks(blocks)
    return block.rows(np.argsort(block.example_ids))


@pytest.fixture(scope="module")
def expected(extractor, images, tmp_path_factory):
    spec = write_npz(tmp_path_factory.mktemp("npz"), images)
    return _by_id(extractor, parse_spec(spec))


@pytest.mark.parametrize("shards", [1, 3, 64])
@pytest.mark.parametrize("form", [form for form in FORMS if form != "npz"])
def test_every_source_gives_the_same_factors(form, shards, images, extractor, expected, tmp_path):
    found = _by_id(extractor, parse_spec(FORMS[form](tmp_path, images, shards)))
    np.testing.assert_array_equal(found.example_ids, np.sort(images.ids))
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_array_equal(found.predictions, expected.predictions)
    # A call of the network rounds by how many examples it has beside it.
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)
    for a, b in zip(found.gradients, expected.gradients, strict=True):
        for name in ("activations", "error_signals"):
            x, y = (getattr(gradient.layers[0], name) for gradient in (a, b))
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_every_source_gives_the_same_results(run, images, tmp_path):
    rankings = {}
    for form, write in FORMS.items():
        (tmp_path / form).mkdir()
        arguments = {
            "--checkpoints": run,
            "--examples": write(tmp_path / form, images, 3),
            "--output": tmp_path / form / "out",
        }
        done = tracin("self-influence", arguments)
        assert done.returncode == 0, done.stderr
        table = pq.read_table(tmp_path / form / "out" / "self_influence-00000-of-00001.parquet")
        rankings[form] = {
            row["example_id"]: (row["label"], row["prediction"], row["self_influence"])
            for row in table.to_pylist()
        }
    for found in rankings.values():
        assert found.keys() == rankings["npz"].keys()
        for name, (label, prediction, value) in found.items():
            assert (label, prediction) == rankings["npz"][name][:2]
            assert value == pytest.approx(rankings["npz"][name][2], rel=1e-4)


BAD = 20_000 // 100
KINDS = {
    "truncated": "is not a tf.train.Example",
    "checksum": "the checksum of its data is wrong",
    "missing": "'y' is missing",
    "image": "cannot be decoded as an image",
    "label": "is out of range: the model has 4 classes",
    "nan": "has a NaN or infinite input",
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """20,000 records in four files; each hundredth is broken in one of six ways."""
    directory = tmp_path_factory.mktemp("damaged")
    rng = np.random.default_rng(0)
    picture = encoded_image(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    where = {}
    for shard in range(4):
        with (directory / f"part-{shard}.tfrecord").open("wb") as file:
            for i in range(5000):
                broken = i % 100 == 37
                kind = list(KINDS)[(shard * 50 + i // 100) % 6] if broken else None
                where |= {(f"part-{shard}", i): kind} if broken else {}
                file.write(_record(kind, f"{shard}-{i:04d}", picture, rng))
    return directory, where


def _record(kind, name, picture, rng):
    features = {
        "id": name.encode(),
        "image": picture[: len(picture) // 2] if kind == "image" else picture,
        "extra": np.array([np.nan if kind == "nan" else 0.5], np.float32),
        "y": 4 if kind == "label" else int(rng.integers(0, 4)),
    }
    if kind == "missing":
        del features["y"]
    data = serialized(**features)
    framed = record(data[: len(data) // 2] if kind == "truncated" else data)
    return framed[:-5] + b"!" + framed[-4:] if kind == "checksum" else framed


@pytest.fixture(scope="module")
def run_of_two(tmp_path_factory):
    """A network with an image and a number as inputs."""
    keras.utils.set_random_seed(0)
    image, extra = keras.Input((12, 12, 3), name="image"), keras.Input((1,), name="extra")
    pooled = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 255)(image))
    outputs = keras.layers.Dense(4)(keras.layers.Concatenate()([pooled, extra]))
    model = keras.Model([image, extra], outputs)
    model.compile(
        keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    directory = tmp_path_factory.mktemp("run_of_two")
    inputs = {"image": np.zeros((8, 12, 12, 3), np.float32), "extra": np.ones((8, 1), np.float32)}
    model.fit(inputs, np.arange(8) % 4, verbose=0, callbacks=[CheckpointRecorder(directory)])
    return directory


@pytest.mark.parametrize("command", ["extract", "self-influence"])
def test_broken_records_of_six_kinds(command, damaged, run_of_two, tmp_path):
    directory, where = damaged
    arguments = {
        "--checkpoints": run_of_two,
        "--examples": f"tfrecord:{directory}/part-*?x.image=image&x.extra=extra&id=id",
        "--output": tmp_path / "out",
    }
    stopped = tracin(command, arguments)
    assert stopped.returncode == 1
    assert "--max-bad-examples N leaves out as many as N" in stopped.stderr
    assert any(f"part-{shard}" in stopped.stderr for shard in range(4)), stopped.stderr
    few = tracin(command, arguments, f"--max-bad-examples={BAD - 1}")
    assert few.returncode == 1
    assert f"--max-bad-examples allows {BAD - 1}" in few.stderr

    done = tracin(command, arguments, f"--max-bad-examples={BAD}")
    assert done.returncode == 0, done.stderr
    assert f"{BAD} examples could not be used" in done.stdout
    skipped = pq.read_table(tmp_path / "out" / "skipped-00000-of-00001.parquet").to_pylist()
    assert {(row["shard"], row["index"]) for row in skipped} == where.keys()
    for row in skipped:
        assert KINDS[where[row["shard"], row["index"]]] in row["error"]
    if command == "self-influence":
        table = pq.read_table(tmp_path / "out" / "self_influence-00000-of-00001.parquet")
        ids = table["example_id"].to_pylist()
    else:
        ids = [
            name
            for path in (tmp_path / "out" / "examples").iterdir()
            for name in pq.read_table(path)["example_id"].to_pylist()
        ]
    good = {
        f"{shard}-{i:04d}"
        for shard in range(4)
        for i in range(5000)
        if (f"part-{shard}", i) not in where
    }
    assert len(ids) == len(good) == 20_000 - BAD
    assert set(ids) == good
