"""TFRecord files: their framing, their features, and what is broken in them."""

import gzip
import tracemalloc

import numpy as np
import pytest
import tensorflow as tf

from tests.examples.writers import encoded_image, record, serialized
from tracin_transforms.core.errors import InputError
from tracin_transforms.examples.decoding import Broken
from tracin_transforms.examples.fields import Fields, InputField
from tracin_transforms.examples.record_file import read_records
from tracin_transforms.examples.spec import parse_spec
from tracin_transforms.examples.tfrecord import TFRecordExamples

IMAGE = encoded_image(np.arange(108, dtype=np.uint8).reshape(6, 6, 3))


def _good(i: int) -> bytes:
    return record(serialized(x=IMAGE, y=i, name=f"n{i}".encode()))


def _read(path, spec="", batch_size=100, **options):
    source = parse_spec(f"tfrecord:{path}{spec}", **options)
    return [batch for shard in source.shards() for batch in source.read(shard, batch_size)]


def _flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]


@pytest.mark.parametrize("compression", ["", "GZIP"])
def test_files_that_tensorflow_writes(tmp_path, compression):
    path = tmp_path / "data.bin"
    data = [bytes([i % 256]) * i for i in range(0, 3000, 7)]
    with tf.io.TFRecordWriter(str(path), compression) as writer:
        for value in data:
            writer.write(value)
    assert list(read_records(path)) == data


def test_a_plain_file_may_begin_like_a_gzipped_one(tmp_path):
    data = [bytes(0x088B1F), b"next"]
    (tmp_path / "a").write_bytes(b"".join(map(record, data)))
    assert (tmp_path / "a").read_bytes()[:3] == b"\x1f\x8b\x08"
    assert list(read_records(tmp_path / "a")) == data


def test_an_empty_file_has_no_records(tmp_path):
    (tmp_path / "a.tfrecord").write_bytes(b"")
    assert _read(tmp_path / "a.tfrecord") == []


def test_a_file_is_never_in_memory_as_a_whole(tmp_path):
    one = record(bytes(2**20))
    with (tmp_path / "a").open("wb") as opened:
        for _ in range(60):
            opened.write(one)
    tracemalloc.start()
    assert sum(1 for _ in read_records(tmp_path / "a")) == 60
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 2**20


BROKEN = {
    "data": (_flipped(_good(1), 40), "the checksum of its data is wrong: it is damaged"),
    "no example": (record(b"\xff\xff\xff"), "it is not a tf.train.Example"),
    "no feature": (record(serialized(x=IMAGE, name=b"n1")), "'y' is missing: found name, x"),
    "image": (
        record(serialized(x=IMAGE[:60], y=1, name=b"n1")),
        r"'x' cannot be decoded as an image: Invalid PNG data, size 60",
    ),
    "text": (record(serialized(x=IMAGE, y=b"cat", name=b"n1")), "'y' is b'cat', expected a number"),
    "several": (
        record(serialized(x=[IMAGE, IMAGE], y=1, name=b"n1")),
        "'x' has 2 byte strings, expected one, or --parse",
    ),
    "nothing in it": (
        record(serialized(x=IMAGE, y=np.zeros(0, int), name=b"n1")),
        "'y' is empty: expected a value",
    ),
    "id": (record(serialized(x=IMAGE, y=1, name=1.5)), "expected one string or integer, for an id"),
    "weight": (
        record(serialized(x=IMAGE, y=1, name=b"n1", w=b"heavy")),
        "'w' is b'heavy', expected one number, for a weight",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_broken_records_are_reported_and_those_after_them_read(tmp_path, what, batch_size):
    broken, reason = BROKEN[what]
    good = [record(serialized(x=IMAGE, y=i, name=f"n{i}".encode(), w=0.5)) for i in range(4)]
    content = good[0] + broken + good[2] + good[3]
    (tmp_path / "a.tfrecord").write_bytes(content)
    weight = "&weight=w" if what == "weight" else ""
    batches = _read(tmp_path / "a.tfrecord", f"?id=name{weight}", batch_size)

    assert sum((batch.example_ids.tolist() for batch in batches), []) == ["n0", "n2", "n3"]
    assert sum((batch.indices.tolist() for batch in batches), []) == [0, 2, 3]
    (bad,) = [bad for batch in batches for bad in batch.bad]
    assert (bad.shard, bad.index) == ("a", 1)
    assert bad.example_id == ("a:1" if what in ("data", "no example", "id") else "n1")
    assert reason in bad.error
    sizes = [len(batch) + len(batch.bad) for batch in batches]
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1)


def test_a_bad_record_does_not_shift_the_ids_of_others(tmp_path):
    (tmp_path / "a.tfrecord").write_bytes(_good(0) + _flipped(_good(1), 30) + _good(2))
    (batch,) = _read(tmp_path / "a.tfrecord")
    assert batch.example_ids.tolist() == ["a:0", "a:2"]
    assert batch.targets.tolist() == [0, 2]


@pytest.mark.parametrize("left", [5, 20, 12, -1, -4])
def test_the_record_in_which_the_file_ends_is_bad(tmp_path, left):
    last = _good(2)
    content = _good(0) + _good(1) + last[:left]
    for name, data in {"plain": content, "zipped": gzip.compress(content)}.items():
        (tmp_path / name).write_bytes(data)
        (batch,) = _read(tmp_path / name)
        assert len(batch) == 2
        assert [(bad.example_id, bad.index) for bad in batch.bad] == [(f"{name}:2", 2)]
        assert batch.bad[0].error.startswith("truncated: the file ends")


def test_a_gzipped_file_that_is_cut_is_truncated(tmp_path):
    whole = gzip.compress(b"".join(map(_good, range(50))))
    (tmp_path / "a.gz").write_bytes(whole[: len(whole) // 2])
    *found, last = read_records(tmp_path / "a.gz")
    assert 0 < len(found) < 50
    assert last == Broken("truncated: the file ends before its gzip data do")


def test_a_damaged_length_stops_the_reading(tmp_path):
    content = _good(0) + _flipped(_good(1), 2) + _good(2)
    (tmp_path / "a.tfrecord").write_bytes(content)
    message = rf"a.tfrecord': record 1 at byte {len(_good(0))}: the checksum of its length is wrong"
    with pytest.raises(InputError, match=message):
        _read(tmp_path / "a.tfrecord")
    (tmp_path / "a.tfrecord").write_bytes(gzip.compress(content))
    with pytest.raises(InputError, match=r"\(unzipped\)': record 1 at byte"):
        _read(tmp_path / "a.tfrecord")
    (tmp_path / "a.tfrecord").write_text("x,y\n1,2\n3,4\n")
    with pytest.raises(InputError, match="record 0 at byte 0.*expected a TFRecord file"):
        _read(tmp_path / "a.tfrecord")


def test_damaged_gzip_data_stop_the_reading(tmp_path):
    noise = np.random.default_rng(0).bytes(5000)
    content = gzip.compress(record(noise) + record(noise))
    (tmp_path / "a.gz").write_bytes(_flipped(content, len(content) - 6))
    with pytest.raises(InputError, match="a.gz': the gzip data are damaged.*copy or write"):
        _read(tmp_path / "a.gz")


def test_features_of_all_kinds(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    content = [
        record(
            serialized(
                image=IMAGE,
                raw=(values + i).tobytes(),
                text="größer".encode() * (i + 1),
                numbers=values.reshape(-1) + i,
                tokens=np.arange(4) + i,
                y=[0.5, i],
                w=0.25 * i,
                key=7 + i,
            )
        )
        for i in range(2)
    ]
    (tmp_path / "a.tfrecord").write_bytes(b"".join(content))
    (batch,) = _read(
        tmp_path / "a.tfrecord",
        "?x.i=image&x.r=raw&x.t=text&x.n=numbers&x.k=tokens&id=key&weight=w"
        "&decode.r=float32&shape.r=2x3&decode.t=text&shape.n=3x2&crop=2x4&channels=1",
    )
    assert batch.inputs["i"].shape == (2, 2, 4, 1)
    np.testing.assert_array_equal(batch.inputs["r"], [values, values + 1])
    assert batch.inputs["t"].tolist() == ["größer", "größergrößer"]
    np.testing.assert_array_equal(batch.inputs["n"][1], (values + 1).reshape(3, 2))
    np.testing.assert_array_equal(batch.inputs["k"], [np.arange(4), np.arange(4) + 1])
    assert batch.inputs["n"].dtype == np.float32
    assert batch.inputs["k"].dtype == np.int64
    np.testing.assert_array_equal(batch.targets, np.float32([[0.5, 0], [0.5, 1]]))
    np.testing.assert_array_equal(batch.sample_weights, [0, 0.25])
    assert batch.example_ids.tolist() == ["7", "8"]


@pytest.mark.parametrize(
    ("value", "options", "reason"),
    [
        (b"12345", "decode=uint8&shape=2x3", "'x' has 5 values, expected 6, for shape=2x3"),
        (b"12345", "decode=float32", "'x' has 5 bytes, expected a multiple of 4"),
        (b"\xff", "decode=text", "'x' is not text in UTF-8"),
        ([1, 2], "decode=uint8", "'x' holds numbers, expected bytes, for decode=uint8"),
        ([1, 2], "shape=3", "'x' has 2 values, expected 3"),
        (encoded_image(np.zeros((4, 9, 3), np.uint8)), "crop=6", "is 4x9, smaller than crop=6x6"),
    ],
)
def test_values_that_do_not_fit_are_bad(tmp_path, value, options, reason):
    (tmp_path / "a").write_bytes(record(serialized(x=value, y=0)))
    (batch,) = _read(tmp_path / "a", f"?{options}")
    assert len(batch) == 0
    assert reason in batch.bad[0].error


def test_different_shapes_are_an_error(tmp_path):
    (tmp_path / "a").write_bytes(
        record(serialized(x=[1, 2], y=0)) + record(serialized(x=[1, 2, 3], y=0))
    )
    message = r"inputs differ in shape: \[2\] for example 'a:0', \[3\] for 'a:1'.*give shape="
    with pytest.raises(InputError, match=message):
        _read(tmp_path / "a")
    (tmp_path / "a").write_bytes(
        record(serialized(x=[1], y=0)) + record(serialized(x=[1], y=[0, 1]))
    )
    with pytest.raises(InputError, match=r"targets differ in shape: \[\] for .*\[2\] for 'a:1'"):
        _read(tmp_path / "a")


def test_shards_are_named_after_files(tmp_path):
    for name in ("b/x.tfrecord", "a/x.tfrecords.gz", "a/y-00000-of-00002"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(_good(0))
    shards = TFRecordExamples(f"{tmp_path}/**/*").shards()
    assert [shard.name for shard in shards] == ["a-x", "a-y-00000-of-00002", "b-x"]
    assert [shard.size for shard in shards] == [len(_good(0))] * 3
    assert [shard.count for shard in shards] == [None] * 3
    assert [shard.name for shard in TFRecordExamples(f"{tmp_path}/a/x*").shards()] == ["x"]

    (tmp_path / "a" / "x").write_bytes(_good(0))
    with pytest.raises(InputError, match=r"a/x' and .*gz' would both be named 'x': rename one"):
        TFRecordExamples(f"{tmp_path}/a/*").shards()
    with pytest.raises(InputError, match=r"no file matches '.*/c\*': expected a file or a pattern"):
        TFRecordExamples(f"{tmp_path}/c*").shards()
    with pytest.raises(InputError, match=r"no file matches '.*/a': expected .*/a/\*"):
        TFRecordExamples(f"{tmp_path}/a").shards()


def test_the_same_files_under_another_pattern_are_the_same(tmp_path):
    (tmp_path / "a.tfrecord").write_bytes(_good(0))
    first, second = TFRecordExamples(f"{tmp_path}/*"), TFRecordExamples(f"{tmp_path}/a.*")
    assert first.describe() == second.describe()
    other = TFRecordExamples(f"{tmp_path}/*", Fields(InputField("x", "uint8", (2, 3)), "y", "name"))
    assert other.describe() == {
        "kind": "tfrecord",
        "x": {"field": "x", "decode": "uint8", "shape": [2, 3]},
        "y": "y",
        "id": "name",
    }


def test_a_file_that_changed_is_not_read(tmp_path):
    path = tmp_path / "a.tfrecord"
    path.write_bytes(_good(0))
    source = TFRecordExamples(str(path))
    (shard,) = source.shards()
    path.write_bytes(_good(0) + _good(1))
    with pytest.raises(InputError, match=r"a.tfrecord' changed: it has .* bytes and had"):
        next(source.read(shard, 1))
    path.unlink()
    with pytest.raises(InputError, match=r"a.tfrecord' does not exist"):
        next(source.read(shard, 1))
