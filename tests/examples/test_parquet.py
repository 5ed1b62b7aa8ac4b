"""Parquet files: row groups, columns of all types, and rows that cannot be used."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.examples.writers import encoded_image
from tracin_transforms.core.errors import InputError
from tracin_transforms.examples.fields import Fields, InputField
from tracin_transforms.examples.parquet import ParquetExamples
from tracin_transforms.examples.spec import parse_spec


def _write(path, row_group_size=None, **columns):
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def _read(spec, batch_size=100):
    source = parse_spec(spec)
    return [batch for shard in source.shards() for batch in source.read(shard, batch_size)]


def _value(x, y=0, **columns):
    return {"x": pa.array([x]), "y": [y], **columns}


def test_shards_are_runs_of_row_groups(tmp_path):
    _write(tmp_path / "a.parquet", 4000, x=np.arange(25_000), y=np.arange(25_000))
    _write(tmp_path / "b.parquet", 30_000, x=np.arange(12_000), y=np.arange(12_000))
    _write(tmp_path / "c.parquet", x=np.zeros(0), y=np.zeros(0))
    source = ParquetExamples(f"{tmp_path}/*")
    shards = source.shards()
    assert [(shard.name, shard.start, shard.count) for shard in shards] == [
        ("a-00000-of-00003", 0, 8000),
        ("a-00001-of-00003", 8000, 8000),
        ("a-00002-of-00003", 16000, 9000),
        ("b-00000-of-00001", 0, 12_000),
    ]
    assert all(shard.size > 0 for shard in shards)
    batches = list(source.read(shards[1], 3000))
    assert [len(batch) for batch in batches] == [3000, 3000, 2000]
    assert batches[1].example_ids[:2].tolist() == ["a:11000", "a:11001"]
    assert batches[1].indices[0] == 3000
    np.testing.assert_array_equal(
        np.concatenate([batch.inputs for batch in batches]), np.arange(8000, 16000)
    )


def test_columns_of_all_types(tmp_path):
    pixels = np.arange(108, dtype=np.uint8).reshape(6, 6, 3)
    image = encoded_image(pixels)
    path = _write(
        tmp_path / "a.parquet",
        image=pa.array([image, image], pa.large_binary()),
        hub=[{"bytes": image, "path": "a"}, {"bytes": image, "path": None}],
        raw=[b"\1\2", b"\3\4"],
        text=pa.array(["a", "bß"]).dictionary_encode(),
        numbers=pa.array([[1, 2, 3, 4], [5, 6, 7, 8]], pa.list_(pa.int16())),
        fixed=pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32(), 2)),
        nested=[[[1, 2], [3, 4]], [[5, 6], [7, 8]]],
        age=pa.array([3, 4], pa.int8()),
        size=[0.5, 1.5],
        is_new=[True, False],
        key=[10, 11],
        w=[1, 0],
    )
    (batch,) = _read(
        f"parquet:{path}?x.image=image&x.hub=hub&x.raw=raw&x.text=text&x.numbers=numbers"
        "&x.fixed=fixed&x.nested=nested&x.table=age,size,is_new&x.age=age"
        "&decode.raw=uint8&shape.numbers=2x2&shape.age=1&y=is_new&id=key&weight=w"
    )
    inputs = batch.inputs
    np.testing.assert_array_equal(inputs["image"], [pixels, pixels])
    np.testing.assert_array_equal(inputs["hub"], [pixels, pixels])
    np.testing.assert_array_equal(inputs["raw"], [[1, 2], [3, 4]])
    assert inputs["text"].tolist() == ["a", "bß"]
    np.testing.assert_array_equal(inputs["numbers"], [[[1, 2], [3, 4]], [[5, 6], [7, 8]]])
    np.testing.assert_array_equal(inputs["fixed"], [[1, 2], [3, 4]])
    np.testing.assert_array_equal(inputs["nested"], [[[1, 2], [3, 4]], [[5, 6], [7, 8]]])
    np.testing.assert_array_equal(inputs["table"], np.float32([[3, 0.5, 1], [4, 1.5, 0]]))
    assert (inputs["table"].dtype, inputs["numbers"].dtype) == (np.float32, np.int16)
    np.testing.assert_array_equal(inputs["age"], [[3], [4]])
    assert batch.targets.tolist() == [1, 0]
    assert batch.example_ids.tolist() == ["10", "11"]
    assert batch.sample_weights.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("columns", "options", "reason"),
    [
        ({"y": pa.array([1, None, 3])}, "", "'y' is null"),
        ({"x": pa.array([1, None, 3])}, "", "'x' is null"),
        ({"key": pa.array(["a", None, "c"])}, "&id=key", "'key' is null"),
        ({"w": pa.array([1.0, None, 1.0])}, "&weight=w", "'w' is null"),
        ({"z": pa.array([1, None, 3])}, "&x=x,z", "'z' is null"),
        ({"x": pa.array([[1], [], [3]])}, "", "'x' is empty: expected values"),
        ({"x": pa.array([[1], [None], [3]])}, "", "'x' has a value in it that is missing"),
        ({"x": pa.array([[[1, 2]], [[1], [2, 3]], [[3, 4]]])}, "", "'x' holds lists of different"),
        ({"x": pa.array([[1, 2], [3], [4, 5]])}, "&shape=2", "'x' has 1 values, expected 2"),
        ({"x": pa.array([b"a", b"\xff", b"c"])}, "&decode=text", "'x' is not text in UTF-8"),
        ({"x": pa.array([{"bytes": b"a"}, None, {"bytes": b"b"}])}, "&decode=text", "is null"),
    ],
)
def test_rows_that_cannot_be_used_are_bad(tmp_path, columns, options, reason):
    columns = {"x": np.arange(3), "y": np.arange(3), **columns}
    path = _write(tmp_path / "a.parquet", **columns)
    batches = _read(f"parquet:{path}?{options.lstrip('&')}", 2)
    assert [batch.indices.tolist() for batch in batches] == [[0], [2]]
    (bad,) = batches[0].bad
    assert (bad.example_id, bad.shard, bad.index) == ("a:1", "a-00000-of-00001", 1)
    assert reason in bad.error
    # Integers stay what they are beside a null.
    assert batches[1].targets.dtype == np.int64


def test_a_broken_image_is_bad(tmp_path):
    image = encoded_image(np.zeros((4, 4, 3), np.uint8))
    path = _write(tmp_path / "a.parquet", x=[image, image[:40]], y=[0, 1], key=["one", "two"])
    (batch,) = _read(f"parquet:{path}?id=key")
    assert batch.example_ids.tolist() == ["one"]
    assert batch.bad[0].example_id == "two"
    assert "'x' cannot be decoded as an image" in batch.bad[0].error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("x=z", "a.parquet': no column 'z': found x, y, when, deep; name the columns as in"),
        ("x=x,z", "no column 'z'"),
        ("x=when", "column 'when' has type timestamp.*, expected integer or number or text"),
        ("x=x,t", "column 't' has type string, expected integer or number"),
        ("y=t", "column 't' has type string, expected integer or number or list"),
        ("x=deep", "column 'deep' has type struct"),
        ("id=f", "column 'f' has type double, expected integer or text"),
        ("weight=t", "column 't' has type string, expected integer or number"),
    ],
)
def test_bad_columns(tmp_path, options, message):
    columns = {"x": [1], "y": [1], "when": pa.array([1], pa.timestamp("s")), "deep": [{"a": 1}]}
    more = {} if "z" in options else {"t": ["a"], "f": [0.5]}
    path = _write(tmp_path / "a.parquet", **columns, **more)
    with pytest.raises(InputError, match=message):
        parse_spec(f"parquet:{path}?{options}").shards()


def test_bad_files(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_text("x,y")
    with pytest.raises(InputError, match=r"a.parquet' cannot be read: .*[Pp]arquet"):
        ParquetExamples(str(path)).shards()
    _write(path, x=np.zeros(0), y=np.zeros(0))
    with pytest.raises(InputError, match="has no rows: expected examples"):
        ParquetExamples(str(path)).shards()


def test_a_file_that_changed_is_not_read(tmp_path):
    path = _write(tmp_path / "a.parquet", x=np.arange(9), y=np.arange(9))
    source = ParquetExamples(str(path))
    (shard,) = source.shards()
    _write(path, x=np.arange(10), y=np.arange(10))
    with pytest.raises(InputError, match="changed: shard 'a-00000-of-00001' is no longer"):
        next(source.read(shard, 4))


def test_damaged_data_stop_the_reading(tmp_path):
    content = io.BytesIO()
    table = pa.table({"x": np.random.default_rng(0).random(5000), "y": np.arange(5000)})
    pq.write_table(table, content, write_page_checksum=True)
    damaged = bytearray(content.getvalue())
    damaged[2000:2100] = bytes(100)
    (tmp_path / "a.parquet").write_bytes(damaged)
    source = ParquetExamples(str(tmp_path / "a.parquet"))
    (shard,) = source.shards()
    with pytest.raises(InputError, match=r"a.parquet' cannot be read"):
        list(source.read(shard, 1000))


def test_description(tmp_path):
    fields = Fields(InputField("a,b"), "c", images=parse_spec("images:d?crop=8").images)
    assert ParquetExamples("x", fields).describe() == {
        "kind": "parquet",
        "x": {"field": "a,b"},
        "y": "c",
        "images": {"crop": [8, 8]},
    }
    assert ParquetExamples("x", parse="m:f", columns=("a",)).describe() == {
        "kind": "parquet",
        "parse": "m:f",
        "columns": ["a"],
    }
