"""Data sets that TensorFlow Datasets has prepared."""

import subprocess
import sys

import numpy as np
import pytest

from tests.examples.writers import random_images, record, write_tfds
from tracin_transforms.core.errors import InputError
from tracin_transforms.examples.fields import Fields, InputField
from tracin_transforms.examples.spec import parse_spec
from tracin_transforms.examples.tfds import TFDSExamples


@pytest.fixture(scope="module")
def images():
    return random_images(40)


@pytest.fixture
def spec(tmp_path, images):
    test = random_images(10)
    return write_tfds(tmp_path, {"train": (images, 3), "test": (test, 1)}).partition("?")[0]


def _read(source, batch_size=100):
    return [batch for shard in source.shards() for batch in source.read(shard, batch_size)]


def _ids(source):
    return np.concatenate([batch.example_ids for batch in _read(source)]).tolist()


def test_ids_are_those_of_tensorflow_datasets(spec, tmp_path):
    import tensorflow_datasets as tfds

    expected = {}
    for split in ("train", "train[5:20]"):
        builder = tfds.builder_from_directory(str(tmp_path / "tiny" / "1.0.0"))
        config = tfds.ReadConfig(add_tfds_id=True, interleave_cycle_length=1)
        dataset = builder.as_dataset(split=split, read_config=config)
        expected[split] = [e["tfds_id"].decode() for e in tfds.as_numpy(dataset)]
        assert _ids(parse_spec(spec.replace(":train@", f":{split}@"))) == expected[split]
    assert expected["train"][0] == "tiny-train.tfrecord-00000-of-00003__0"


def test_parts_of_splits(tmp_path, spec, images):
    def shards(split):
        source = parse_spec(spec.replace(":train@", f":{split}@"))
        shards = source.shards()
        found = [
            sum(len(batch) for batch in source.read(shard, 7)) == shard.count for shard in shards
        ]
        assert all(found)
        return [(shard.name.removeprefix("tiny-"), shard.count) for shard in shards]

    assert shards("train[:50%]") == [
        ("train.tfrecord-00000-of-00003", 13),
        ("train.tfrecord-00001-of-00003-0-7", 7),
    ]
    assert shards("train[10:20]+test[5:]") == [
        ("train.tfrecord-00000-of-00003-10-13", 3),
        ("train.tfrecord-00001-of-00003-0-7", 7),
        ("test.tfrecord-00000-of-00001-5-10", 5),
    ]
    named = parse_spec(f"tfds:tiny:1.0.0:train[10:20]@{tmp_path}?id=name")
    assert (named.name, named.split) == ("tiny:1.0.0", "train[10:20]")
    assert _ids(named) == images.ids[10:20].tolist()


def test_features_by_name(spec, images):
    options = "?x.i=image&x.n=name&y=label&id=name&weight=label&resize=6x4&channels=1"
    batches = _read(parse_spec(f"{spec}{options}"))
    assert batches[0].inputs["i"].shape[1:] == (6, 4, 1)
    names = np.concatenate([batch.inputs["n"] for batch in batches])
    assert names.tolist() == images.ids.tolist()
    weights = np.concatenate([batch.sample_weights for batch in batches])
    np.testing.assert_array_equal(weights, images.labels)


def test_description(tmp_path, spec):
    first = parse_spec(spec).describe()
    assert first == {
        "kind": "tfds",
        "name": "tiny/1.0.0",
        "split": "train",
        "x": {"field": "image"},
        "y": "label",
        "images": {"channels": 3},
    }
    assert TFDSExamples("tiny:1.0.0", "train", str(tmp_path)).describe() == first
    fields = Fields(InputField("image"), "label")
    assert TFDSExamples("tiny", "train", str(tmp_path), fields).describe() == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((":train@", ":valid@"), "data set 'tiny' has no split 'valid': found test, train; expec"),
        ((":train@", ":train[:5%@"), r"has no split 'train\[:5%'"),
        (
            ("tiny", "teeny"),
            r"'teeny' is not prepared in .*run once python -c .import tensorflow",
        ),
        (("tiny", "tiny:2.0.0"), r"tfds.builder\('tiny:2.0.0', data_dir='.*'\).download_and_pre"),
        (("?", "?x=picture"), "has no feature 'picture', for x: found image, label, name; name"),
        (("?", "?id=key"), "has no feature 'key', for id"),
        (("?", "?weight=key"), "has no feature 'key', for weight"),
    ],
)
def test_what_is_not_there(spec, change, message):
    with pytest.raises(InputError, match=message):
        parse_spec(f"{spec}?".replace(*change, 1).removesuffix("?")).shards()


def test_without_a_label_of_its_own(spec, tmp_path):
    metadata = tmp_path / "tiny" / "1.0.0" / "dataset_info.json"
    text = metadata.read_text()
    start, end = text.index('"supervisedKeys"'), text.index('"version"')
    metadata.write_text(text[:start] + text[end:])
    with pytest.raises(InputError, match="has no input or label that it names itself, for x: foun"):
        parse_spec(spec).shards()
    assert len(_ids(parse_spec(f"{spec}?x=image&y=label"))) == 40


def _records(path):
    from tracin_transforms.examples.record_file import read_records

    return list(read_records(path))


def test_a_broken_image_is_bad(spec, tmp_path):
    path = tmp_path / "tiny" / "1.0.0" / "tiny-train.tfrecord-00000-of-00003"
    records = _records(path)
    assert records[4].count(b"IDAT") == 1
    records[4] = records[4].replace(b"IDAT", b"IDAX")
    path.write_bytes(b"".join(map(record, records)))
    for parse in (None, "tests.examples.user_functions:of_features"):
        batch = _read(parse_spec(spec, parse=parse))[0]
        (bad,) = batch.bad
        assert (bad.example_id, bad.index) == ("tiny-train.tfrecord-00000-of-00003__4", 4)
        assert "Invalid PNG" in bad.error
        assert len(batch) == 12


def test_damaged_files_stop_the_reading(spec, tmp_path):
    path = tmp_path / "tiny" / "1.0.0" / "tiny-train.tfrecord-00001-of-00003"
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 255
    path.write_bytes(damaged)
    source = parse_spec(spec)
    shard = source.shards()[1]
    with pytest.raises(InputError, match=r"00001-of-00003' is damaged after \d of the 1. examples"):
        list(source.read(shard, 1))
    path.write_bytes(b"".join(map(record, _records(path)[:5])))
    with pytest.raises(InputError, match=r"00001-of-00003' changed|shard .* is no longer what"):
        list(source.read(shard, 1))
    shard = source.shards()[1]
    with pytest.raises(
        InputError, match=r"damaged after \d of the 1. examples .* contained only 5 el"
    ):
        list(source.read(shard, 4))
    path.unlink()
    with pytest.raises(InputError, match="00001-of-00003' cannot be read: .*No such file"):
        source.shards()


def test_without_tensorflow_datasets():
    code = (
        "import sys; sys.modules['tensorflow_datasets'] = None\n"
        "from tracin_transforms.examples.spec import parse_spec\n"
        "parse_spec('tfds:mnist:train').shards()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "InputError: examples tfds: TensorFlow Datasets is not installed" in done.stderr
    assert "pip install 'tracin-transforms[tfds]'" in done.stderr
