"""Functions of the user's own: parsing records, preprocessing batches, making sources."""

import pickle
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.examples import user_functions
from tests.examples.writers import random_images, record, serialized, write_tfds, write_tfrecords
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.protocols import fingerprint
from tracin_transforms.examples.npz import NpzExamples
from tracin_transforms.examples.preprocess import PreprocessedExamples
from tracin_transforms.examples.spec import parse_spec

MODULE = "tests.examples.user_functions"
GUIDE = Path(__file__).parents[2] / "docs" / "examples.md"


def _read(source, batch_size=100):
    return [batch for shard in source.shards() for batch in source.read(shard, batch_size)]


def _without_options(spec):
    return spec.partition("?")[0]


def test_parse_makes_pairs_of_records(tmp_path):
    images = random_images(30)
    spec = _without_options(write_tfrecords(tmp_path, images, 3))
    source = pickle.loads(pickle.dumps(parse_spec(spec, parse=f"{MODULE}:pair")))
    user_functions.traces = 0
    batches = _read(source, 4)
    np.testing.assert_array_equal(np.concatenate([b.inputs for b in batches]), images.pixels)
    np.testing.assert_array_equal(np.concatenate([b.targets for b in batches]), images.labels)
    assert batches[3].example_ids.tolist() == [f"data-00001:{i}" for i in range(4)]
    assert user_functions.traces == 1
    assert source.describe() == {"kind": "tfrecord", "parse": f"{MODULE}:pair"}


def test_parse_gives_ids_weights_and_several_inputs(tmp_path):
    images = random_images(10)
    spec = _without_options(write_tfrecords(tmp_path, images, 1))
    (batch,) = _read(parse_spec(spec, parse=f"{MODULE}:everything"))
    assert batch.example_ids.tolist() == images.ids.tolist()
    assert batch.inputs["name"].tolist() == images.ids.tolist()
    np.testing.assert_array_equal(batch.inputs["image"], images.pixels)
    np.testing.assert_array_equal(batch.targets[:, 0], images.labels)
    np.testing.assert_array_equal(batch.sample_weights, [0.5] * 10)


def test_records_that_cannot_be_parsed_are_bad(tmp_path):
    good = [record(serialized(image=i, label=0, name=b"n")) for i in random_images(2).encoded()]
    damaged = bytearray(good[1])
    damaged[30] ^= 255
    content = good[0] + damaged + record(serialized(label=1)) + record(b"\xff") + good[1]
    (tmp_path / "a").write_bytes(content)
    batches = _read(parse_spec(f"tfrecord:{tmp_path}/a", parse=f"{MODULE}:pair"), 2)
    assert [batch.indices.tolist() for batch in batches] == [[0], [], [4]]
    bad = [bad for batch in batches for bad in batch.bad]
    assert [(b.example_id, b.index) for b in bad] == [("a:1", 1), ("a:2", 2), ("a:3", 3)]
    assert "the checksum of its data is wrong" in bad[0].error
    assert re.search("--parse failed: .*image.* required but could not be found", bad[1].error)
    assert "--parse failed: Could not parse example input" in bad[2].error
    (batch,) = _read(parse_spec(f"tfrecord:{tmp_path}/a", parse=f"{MODULE}:with_text_as_label"))
    assert "the y of --parse is b'" in batch.bad[0].error
    assert "expected a number or several, for a label" in batch.bad[0].error


def test_parse_gets_the_columns_of_a_row(tmp_path):
    table = pa.table(
        {
            "a": pa.array([1, 2, None, 4], pa.int32()),
            "name": ["one", "two", "three", "four"],
            "several": [[1.0], [2.0, 3.0], [4.0], [0.5, 0.5]],
            "nested": [[[1], [2]]] * 4,
            "unused": pa.array([None, 1, 1, 1], pa.int64()),
            "when": pa.array([1] * 4, pa.timestamp("s")),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    spec = f"parquet:{tmp_path}/a.parquet?columns=a,name,several,nested"
    (batch,) = _read(parse_spec(spec, parse=f"{MODULE}:of_columns"))
    np.testing.assert_array_equal(batch.inputs, [[2], [7], [5]])
    assert batch.example_ids.tolist() == ["one", "two", "four"]
    assert batch.targets.tolist() == [2, 2, 2]
    assert [(bad.example_id, bad.error) for bad in batch.bad] == [("a:2", "'a' is null")]
    every = parse_spec(_without_options(spec), parse=f"{MODULE}:of_columns")
    (batch,) = _read(every)
    assert batch.example_ids.tolist() == ["two", "four"]
    with pytest.raises(InputError, match="column 'when' has type timestamp"):
        parse_spec(f"{_without_options(spec)}?columns=when", parse="m:f").shards()


def test_parse_gets_the_features_of_a_data_set(tmp_path):
    images = random_images(12)
    spec = _without_options(write_tfds(tmp_path, {"train": (images, 2)}))
    plain = [batch.example_ids.tolist() for batch in _read(parse_spec(spec))]
    batches = _read(parse_spec(spec, parse=f"{MODULE}:of_features"))
    found = np.concatenate([batch.inputs for batch in batches])
    np.testing.assert_allclose(found, images.pixels / 255, atol=1e-6)
    assert [batch.example_ids.tolist() for batch in batches] == plain
    assert parse_spec(spec, parse="m:f").describe()["parse"] == "m:f"


@pytest.mark.parametrize(
    ("parse", "message"),
    [
        (f"{MODULE}:only_x", r"--parse '.*only_x' returned .*int32.*expected \(x, y\), or a dict"),
        (f"{MODULE}:missing", "--parse '.*missing': module .* has no function"),
        ("no_such_module:f", "--parse 'no_such_module' cannot be imported: No module named"),
        ("function", "--parse 'function': expected module:function"),
    ],
)
def test_bad_parse_functions(tmp_path, parse, message):
    spec = _without_options(write_tfrecords(tmp_path, random_images(3), 1))
    with pytest.raises(InputError, match=message):
        _read(parse_spec(spec, parse=parse))


def test_preprocess_is_for_every_source(tmp_path):
    images = random_images(9)
    np.savez(tmp_path / "a.npz", x=images.pixels, y=images.labels)
    specs = [f"npz:{tmp_path}/a.npz", write_tfrecords(tmp_path, images, 1)]
    found = []
    for spec in specs:
        source = pickle.loads(pickle.dumps(parse_spec(spec, preprocess=f"{MODULE}:scaled")))
        found.append(np.concatenate([batch.inputs for batch in _read(source, 4)]))
        assert source.describe()["preprocess"] == f"{MODULE}:scaled"
        assert source.describe() != parse_spec(spec).describe()
    assert found[0].shape == (9, 3, 3, 3)
    np.testing.assert_array_equal(found[0], found[1])
    # 12 x 12 to 3 x 3, bilinear without antialiasing: the middle four of each 4 x 4.
    expected = images.pixels.reshape(9, 3, 4, 3, 4, 3)[:, :, 1:3, :, 1:3].mean(axis=(2, 4)) / 255
    np.testing.assert_allclose(found[0], expected, atol=1e-6)


def test_preprocess_of_several_inputs_and_texts(tmp_path):
    np.savez(tmp_path / "a.npz", name=np.array(["ab", "cde"]), y=np.arange(2))
    source = NpzExamples(str(tmp_path / "a.npz"), (("name", "name"),))
    (batch,) = _read(PreprocessedExamples(source, f"{MODULE}:lengths"))
    assert batch.inputs["length"].tolist() == [2, 3]
    assert batch.inputs["name"].tolist() == ["AB", "CDE"]


def test_preprocess_passes_bad_examples_through(tmp_path):
    (tmp_path / "a").write_bytes(record(b"\xff") + record(serialized(x=[1, 2], y=0)))
    source = parse_spec(f"tfrecord:{tmp_path}/a", preprocess=f"{MODULE}:halved")
    batches = _read(source, 1)
    assert [(len(batch), len(batch.bad)) for batch in batches] == [(0, 1), (1, 0)]


def test_preprocess_has_to_keep_the_rows(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((5, 2)), y=np.arange(5))
    source = parse_spec(f"npz:{tmp_path}/a.npz", preprocess=f"{MODULE}:halved")
    message = r"halved' returned an array of shape \[3, 2\] for 5 examples of shard 'a-00000-of"
    with pytest.raises(InputError, match=message):
        _read(source)
    with pytest.raises(InputError, match="--preprocess .* has no function"):
        parse_spec(f"npz:{tmp_path}/a.npz", preprocess=f"{MODULE}:none").shards()


def test_own_sources(tmp_path):
    source = parse_spec(f"source:{MODULE}:Nothing?path=here")
    assert isinstance(source, user_functions.Nothing)
    assert source.path == "here"
    assert source.describe() == {"kind": f"{MODULE}:Nothing", "path": "'here'"}
    with pytest.raises(InputError, match="is 'a source': expected an instance of a class that"):
        parse_spec(f"source:{MODULE}:no_source")
    with pytest.raises(InputError, match="missing a required argument: 'path': expected the argu"):
        parse_spec(f"source:{MODULE}:Nothing")
    with pytest.raises(InputError, match="got an unexpected keyword argument 'color'"):
        parse_spec(f"source:{MODULE}:Nothing?path=a&color=b")
    with pytest.raises(InputError, match="examples source: 'nothing': expected module:function"):
        parse_spec("source:nothing")


def test_the_source_in_the_guide_reads(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?class .*?)```", GUIDE.read_text(), re.S)
    (tmp_path / "guide_source.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "points.csv").write_text("a,1,2.5,0\nb,3,4,1\nc,5,6,0\n")
    (spec,) = re.findall(r"(source:guide_source:\S+?)['`]", GUIDE.read_text())
    source = pickle.loads(pickle.dumps(parse_spec(spec)))
    batches = _read(source, 2)
    assert [batch.example_ids.tolist() for batch in batches] == [["a", "b"], ["c"]]
    np.testing.assert_array_equal(batches[0].inputs, [[1, 2.5], [3, 4]])
    assert batches[1].targets.tolist() == [0]
    assert fingerprint(source, source.shards()) == fingerprint(source, source.shards())
