"""What holds for every kind of source."""

import pickle

import numpy as np
import pytest

from tests.examples.writers import (
    FORMS,
    random_images,
)
from tracin_transforms.core.protocols import ExampleBatch, fingerprint
from tracin_transforms.examples.lookup import find_examples
from tracin_transforms.examples.spec import parse_spec

COUNT = 2000


@pytest.fixture(scope="module")
def images():
    return random_images(COUNT)


def _all(source, batch_size=128) -> ExampleBatch:
    """Reads everything, and checks what batches promise."""
    shards = source.shards()
    assert len({shard.name for shard in shards}) == len(shards)
    found = []
    for shard in shards:
        batches = list(source.read(shard, batch_size))
        sizes = [len(batch) + len(batch.bad) for batch in batches]
        assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
        assert 0 < sizes[-1] <= batch_size
        assert shard.count in (None, sum(sizes))
        indices = np.concatenate([batch.indices for batch in batches])
        np.testing.assert_array_equal(indices, np.arange(sum(sizes)))
        assert {batch.shard for batch in batches} == {shard.name}
        found += batches
    assert not any(batch.bad for batch in found)
    return ExampleBatch(
        "",
        np.arange(sum(map(len, found))),
        np.concatenate([batch.example_ids for batch in found]),
        np.concatenate([batch.inputs for batch in found]),
        np.concatenate([batch.targets for batch in found]),
    )


SHARDED = ("tfrecord", "tfrecord.gz", "parquet", "tfds")


@pytest.mark.parametrize(
    ("form", "shards"),
    [(form, n) for form in FORMS for n in ((1, 3, 64) if form in SHARDED else (1,))],
)
def test_the_same_images_come_from_every_form(tmp_path, images, form, shards):
    source = pickle.loads(pickle.dumps(parse_spec(FORMS[form](tmp_path, images, shards))))
    if form in SHARDED:
        assert len(source.shards()) == shards
    found = _all(source)
    assert found.example_ids.tolist() == images.ids.tolist()
    np.testing.assert_array_equal(found.inputs, images.pixels)
    np.testing.assert_array_equal(found.targets, images.labels)
    assert found.inputs.dtype == np.uint8
    assert found.targets.dtype.kind == "i"


@pytest.mark.parametrize("form", FORMS)
def test_a_source_is_small_and_its_fingerprint_is_stable(tmp_path, form):
    few = random_images(30)
    source = parse_spec(FORMS[form](tmp_path, few, 3))
    assert len(pickle.dumps(source)) < 2000
    first = fingerprint(source, source.shards())
    assert first == fingerprint(source, source.shards())
    assert first["kind"] == form.removesuffix(".gz")
    other = parse_spec(FORMS[form](tmp_path / "more", few, 3)) if form == "images" else None
    if other is not None:
        assert fingerprint(other, other.shards()) == first


@pytest.mark.parametrize("form", FORMS)
def test_single_examples_are_found_by_their_ids(tmp_path, form):
    images = random_images(200)
    source = parse_spec(FORMS[form](tmp_path, images, 3))
    wanted = [150, 3, 99]
    found = find_examples(source, images.ids[wanted].tolist())
    assert [batch.example_ids.tolist() for batch in found] == [[i] for i in images.ids[wanted]]
    for batch, i in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(batch.inputs, images.pixels[i : i + 1])
        assert batch.targets.tolist() == [images.labels[i]]
