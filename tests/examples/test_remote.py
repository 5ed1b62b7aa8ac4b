"""Examples in an object store."""

import numpy as np
import pytest

from tests.bucket import emulated_bucket
from tests.examples.writers import (
    random_images,
    write_image_files,
    write_parquet,
    write_tfrecords,
)
from tracin_transforms.core.errors import InputError
from tracin_transforms.examples.spec import parse_spec
from tracin_transforms.storage.files import any_path, files_below


@pytest.fixture(scope="module")
def bucket():
    with emulated_bucket() as bucket:
        yield bucket


@pytest.fixture
def upload(bucket, monkeypatch, tmp_path):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket.address)

    def upload(name):
        for path, _ in files_below(tmp_path):
            place = f"{bucket.uri}/{name}/{path.relative_to(tmp_path)}"
            any_path(place).upload(path)
        return f"{bucket.uri}/{name}"

    return upload


WRITERS = {
    "tfrecord": lambda path, images: write_tfrecords(path, images, 2),
    "tfrecord.gz": lambda path, images: write_tfrecords(path, images, 2, ".tfrecord.gz"),
    "parquet": lambda path, images: write_parquet(path, images, 2),
    "images": lambda path, images: write_image_files(path / "images", images),
}


@pytest.mark.parametrize("form", WRITERS)
def test_examples_are_the_same_as_on_disk(tmp_path, upload, form):
    images = random_images(40)
    spec = WRITERS[form](tmp_path, images)
    local = parse_spec(spec)
    uri = upload(form)
    remote = parse_spec(spec.replace(str(tmp_path), uri))
    described = [
        [(shard.name, shard.count, shard.size) for shard in source.shards()]
        for source in (local, remote)
    ]
    assert described[0] == described[1]
    assert local.describe() == remote.describe()
    batches = [batch for shard in remote.shards() for batch in remote.read(shard, 7)]
    ids = np.concatenate([batch.example_ids for batch in batches])
    assert ids.tolist() == images.ids.tolist()
    np.testing.assert_array_equal(np.concatenate([b.inputs for b in batches]), images.pixels)


def test_what_changes_in_a_bucket_is_noticed(tmp_path, upload, bucket):
    spec = write_tfrecords(tmp_path, random_images(4), 1)
    source = parse_spec(spec.replace(str(tmp_path), upload("changing")))
    (shard,) = source.shards()
    any_path(shard.path).write_bytes(b"less")
    with pytest.raises(InputError, match="data-00000.tfrecord' changed: it has 4 bytes and had"):
        next(source.read(shard, 4))
    with pytest.raises(InputError, match="no file matches 'gs://bucket/nothing"):
        parse_spec(f"tfrecord:{bucket.uri}/nothing/*").shards()
