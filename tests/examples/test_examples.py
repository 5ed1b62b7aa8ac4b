import numpy as np
import pytest

from tracin_transforms.core.errors import InputError
from tracin_transforms.examples.npy_rows import StoredRows
from tracin_transforms.examples.npz import NpzExamples
from tracin_transforms.examples.spec import parse_spec


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {"x": rng.random((23, 3, 2)), "y": np.arange(23) % 4, "name": np.arange(23) + 100}


@pytest.fixture
def path(tmp_path, arrays):
    np.savez(tmp_path / "data.npz", **arrays)
    return tmp_path / "data.npz"


@pytest.mark.parametrize("shard_size", [1, 5, 23, 100])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_every_example_once_and_in_order(path, arrays, shard_size, batch_size):
    source = NpzExamples(str(path), example_ids="name", shard_size=shard_size)
    shards = source.shards()
    batches = [batch for shard in shards for batch in source.read(shard, batch_size)]

    assert len({shard.name for shard in shards}) == len(shards)
    np.testing.assert_array_equal(np.concatenate([b.inputs for b in batches]), arrays["x"])
    np.testing.assert_array_equal(np.concatenate([b.targets for b in batches]), arrays["y"])
    ids = np.concatenate([b.example_ids for b in batches])
    assert ids.tolist() == [str(i) for i in range(100, 123)]
    assert all(len(b) <= batch_size for b in batches)
    assert all(len(b) == len(b.inputs) for b in batches)


def _save_in_another_order(path, **arrays):
    np.savez(path, **{name: np.asfortranarray(array) for name, array in arrays.items()})


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed, _save_in_another_order])
def test_rows_are_those_of_the_arrays_however_they_lie(tmp_path, arrays, save):
    arrays = {
        **arrays,
        "text": np.array([f"text {i}" for i in range(23)]),
        "weight": np.linspace(0, 1, 23, dtype=np.float32),
    }
    path = tmp_path / "data.npz"
    save(path, **arrays)
    source = NpzExamples(str(path), (("a", "x"), ("b", "text")), "y", "name", "weight", 10)
    batches = [batch for shard in source.shards() for batch in source.read(shard, 4)]
    for name, array in (("a", "x"), ("b", "text")):
        found = np.concatenate([batch.inputs[name] for batch in batches])
        np.testing.assert_array_equal(found, arrays[array])
        assert found.dtype == arrays[array].dtype
    weights = np.concatenate([batch.sample_weights for batch in batches])
    np.testing.assert_array_equal(weights, arrays["weight"])


def test_only_the_rows_that_are_wanted_are_read(tmp_path):
    """A file of 8 GB, nearly all of it a hole, is opened and read from at once."""
    rows = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (2_000_000, 1000))
    rows[1_500_000] = 7
    rows.flush()
    header = (tmp_path / "x.npy").stat().st_size - rows.nbytes
    found = StoredRows(tmp_path / "x.npy", header, rows.dtype, rows.shape)[1_499_999:1_500_001]
    np.testing.assert_array_equal(found[:, 0], [0, 7])


def test_small_data_have_several_shards(path):
    counts = [shard.count for shard in NpzExamples(str(path), shard_size=None).shards()]
    assert counts == [23]
    np.savez(path, x=np.zeros((5000, 1)), y=np.zeros(5000, int))
    assert [shard.count for shard in NpzExamples(str(path)).shards()] == [1250] * 4
    np.savez(path, x=np.zeros((50_000, 1)), y=np.zeros(50_000, int))
    assert {shard.count for shard in NpzExamples(str(path)).shards()} == {8192, 50_000 % 8192}


def test_default_ids_do_not_depend_on_the_shards(path):
    source = NpzExamples(str(path), shard_size=7)
    batch = next(source.read(source.shards()[1], 2))
    assert batch.example_ids.tolist() == ["data:7", "data:8"]
    assert (batch.shard, batch.indices[0]) == ("data-00001-of-00004", 0)


def test_a_changed_file_is_read_again(path, arrays):
    before = NpzExamples(str(path))
    assert before.shards()[0].count == 23
    old = before.describe()
    np.savez(path, x=arrays["x"][:5], y=arrays["y"][:5])
    assert before.shards()[0].count == 5
    assert before.describe()["sha256"] != old["sha256"]


def test_spec_names_the_arrays(path):
    assert parse_spec(f"npz:{path}?x=a&y=b&id=c") == NpzExamples(str(path), "a", "b", "c")
    assert parse_spec(f"npz:{path}") == NpzExamples(str(path))
    several = parse_spec(f"npz:{path}?x.left=a&x.right=b&weight=w")
    assert several == NpzExamples(str(path), (("left", "a"), ("right", "b")), sample_weights="w")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("csv:a.csv", r"unknown kind of source 'csv', expected one of images:, npz:, parquet:, "),
        ("data.npz", "unknown kind of source ''"),
        ("npz:", "expected a path"),
        ("npz:a.npz?z=1", "unknown option 'z', expected x .*y, id or weight"),
        ("npz:a.npz?x", "not of the form name=value"),
        ("npz:a.npz?x=a&x.b=b", "x and x.NAME: expected either"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(InputError, match=message):
        parse_spec(spec)


@pytest.mark.parametrize(
    ("change", "ids", "message"),
    [
        ({"y": None}, None, r"has no array 'y': found x, name"),
        ({"y": np.arange(22)}, None, "arrays differ in length: 'x' has 23, 'y' has 22"),
        ({"x": np.zeros((0, 2)), "y": np.zeros(0, int)}, None, "array 'y' is empty"),
        ({"x": np.array([1j] * 23)}, None, "array 'x' has dtype complex128, expected numbers"),
        ({"y": np.array(["a"] * 23)}, None, "array 'y' has dtype <U1, expected numbers"),
        ({"x": np.float64(3)}, None, "arrays differ in length"),
        ({"y": np.array([None] * 23)}, None, "cannot be read: expected plain numbers"),
        ({"name": np.zeros(23, int)}, "name", "example id '0' occurs 23 times"),
        ({"name": np.zeros((23, 2), int)}, "name", "expected one value for each example"),
        ({"name": np.zeros(23)}, "name", "expected one string or integer for each example"),
        ({"name": np.arange(3)}, "name", "'name' has 3"),
    ],
)
def test_bad_arrays(path, arrays, change, ids, message):
    changed = {k: v for k, v in {**arrays, **change}.items() if v is not None}
    np.savez(path, **changed)
    with pytest.raises(InputError, match=message):
        NpzExamples(str(path), example_ids=ids).shards()


def test_bad_files(path, tmp_path):
    with pytest.raises(InputError, match=r"examples file '.*missing.npz' does not exist"):
        NpzExamples(str(tmp_path / "missing.npz")).shards()
    whole = path.read_bytes()
    for name, content in {"half": whole[: len(whole) // 2], "text": b"hello", "empty": b""}.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
        with pytest.raises(InputError, match="is not a NumPy archive, or truncated"):
            NpzExamples(str(tmp_path / f"{name}.npz")).shards()
    damaged = bytearray(whole)
    damaged[300:320] = bytes(20)
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="cannot be read: .* complete file"):
        NpzExamples(str(path)).shards()
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(InputError, match=r"is not a NumPy archive.*expected an .npz"):
        NpzExamples(str(tmp_path / "single.npy")).shards()
    with pytest.raises(InputError, match="shard_size is 0"):
        NpzExamples(str(path), shard_size=0)
