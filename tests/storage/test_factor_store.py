"""The store's files: what is written comes back, is found when damaged, and grows."""

import dataclasses
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.factories import WEIGHTS, materialised_gradients, random_block, split
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.factors import FactorBlock, LayerFactors, concatenate_blocks
from tracin_transforms.core.influence import influence, self_influence
from tracin_transforms.core.protocols import BadExample, Shard
from tracin_transforms.storage.factor_store import FactorStore, replaced_store
from tracin_transforms.storage.shard_writer import ShardWriter
from tracin_transforms.storage.store_check import problems
from tracin_transforms.storage.store_description import StoreDescription

IDS = ("epoch-0", "epoch-1", "epoch-2")
FACTORS = {"layers": "last", "dtype": "float16"}


def describe(ids=IDS, shards=("a",), factors=FACTORS, count=None):
    return StoreDescription(
        factors=dict(factors),
        checkpoints=tuple(
            {
                "id": name,
                "path": f"/run/{name}",
                "step": int(name[-1]),
                "learning_rate": WEIGHTS[int(name[-1])],
                "sha256": f"hash of {name}",
            }
            for name in ids
        ),
        shards=tuple(Shard(name, count=count, size=10) for name in shards),
    )


def of_checkpoints(block: FactorBlock, ids) -> FactorBlock:
    """Returns the block with some of its checkpoints."""
    places = [IDS.index(name) for name in ids]
    return dataclasses.replace(
        block,
        predictions=block.predictions[:, places],
        losses=block.losses[:, places],
        gradients=tuple(block.gradients[place] for place in places),
    )


def write(store, name, blocks, ids=None, bad=(), dtype="float16"):
    """Writes the blocks as a shard, as a worker does."""
    shard = next(s for s in store.description.shards if s.name == name)
    new = tuple(ids or store.description.checkpoint_ids)
    known = store.stored_shard(shard)
    weights = store.description.sorting_weights
    with ShardWriter(store.paths(name), shard, weights, dtype, known, new) as writer:
        for block in blocks:
            writer.add(of_checkpoints(block, new))
        return writer.finish(bad)


def read(store, name="a", ids=IDS):
    """Returns the rows of a shard in the order of their indices."""
    block = concatenate_blocks(list(store.shard(name).blocks(ids)))
    return block.rows(np.argsort(block.indices))


def assert_same(found: FactorBlock, block: FactorBlock, rtol):
    assert found.checkpoint_ids == block.checkpoint_ids
    for field in ("indices", "example_ids", "labels", "predictions", "losses"):
        np.testing.assert_array_equal(getattr(found, field), getattr(block, field))
    for a, b in zip(found.gradients, block.gradients, strict=True):
        for x, y in zip(a.layers, b.layers, strict=True):
            assert (x.name, x.has_bias, x.groups) == (y.name, y.has_bias, y.groups)
            for field in ("activations", "error_signals"):
                values, exact = getattr(x, field), getattr(y, field)
                assert values.dtype == exact.dtype
                np.testing.assert_allclose(values, exact, rtol=rtol, atol=1e-9)


@given(
    rows=st.integers(1, 60),
    layers=st.integers(1, 2),
    positions=st.sampled_from([1, 3]),
    has_bias=st.booleans(),
    dtype=st.sampled_from(["float16", "float32"]),
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_stored_comes_back(tmp_path_factory, rows, layers, positions, has_bias, dtype):
    rng = np.random.default_rng(rows)
    block = random_block(rng, rows, has_bias=has_bias, layers=layers, positions=positions)
    store = FactorStore.prepare(tmp_path_factory.mktemp("x") / "store", describe())
    write(store, "a", split(block, min(3, rows)), dtype=dtype)
    assert_same(read(store), block, rtol=0 if dtype == "float32" else 2**-11)
    store.finish()
    assert list(problems(store)) == []


def test_one_hot_activations_grouped_layers_and_labels_of_several_numbers(tmp_path):
    rng = np.random.default_rng(0)
    block = random_block(rng, 9, has_bias=False, positions=3)
    gradients = []
    for gradient in block.gradients:
        layer = gradient.layers[0]
        indices = rng.integers(0, 50_000, (9, 3, 1)).astype(np.int32)
        one_hot = dataclasses.replace(layer, name="embedding", activations=indices)
        grouped = LayerFactors("conv", layer.activations, layer.error_signals, True, groups=2)
        gradients.append(dataclasses.replace(gradient, layers=(one_hot, grouped)))
    block = dataclasses.replace(
        block,
        labels=rng.random((9, 2), dtype=np.float32),
        predictions=rng.random((9, 3, 2), dtype=np.float32),
        gradients=tuple(gradients),
    )
    store = FactorStore.prepare(tmp_path / "store", describe())
    write(store, "a", [block])
    found = read(store)
    assert_same(found, block, rtol=2**-11)
    np.testing.assert_array_equal(
        found.gradients[1].layers[0].activations, block.gradients[1].layers[0].activations
    )


def test_rows_lie_by_falling_self_influence_whatever_blocks_they_came_in(tmp_path):
    block = random_block(np.random.default_rng(1), 500)
    files = []
    for pieces in (1, 4):
        store = FactorStore.prepare(tmp_path / f"{pieces}", describe())
        write(store, "a", split(block, pieces))
        files.append([p.read_bytes() for p in (store.paths("a").factors, store.paths("a").sidecar)])
    assert files[0] == files[1]

    own = self_influence(block, WEIGHTS).sum(axis=(1, 2))
    order = np.argsort(-own)
    rows = store.shard("a").rows
    assert rows.example_ids.tolist() == block.example_ids[order].tolist()
    table = pq.read_table(store.paths("a").sidecar)
    np.testing.assert_allclose(table["self_influence"], own[order], rtol=1e-6)
    norms = (rows.gradient_norms.astype(np.float64) ** 2).sum(axis=2) @ WEIGHTS
    np.testing.assert_allclose(norms, own[order], rtol=1e-6)


def test_influence_from_halves_is_close_to_that_of_materialised_gradients(tmp_path):
    rng = np.random.default_rng(2)
    block, queries = random_block(rng, 80), random_block(rng, 5, "q")
    store = FactorStore.prepare(tmp_path / "store", describe())
    write(store, "a", [block])
    found = influence(read(store), queries, WEIGHTS)
    z, q = (materialised_gradients(part).sum(axis=1) for part in (block, queries))
    exact = np.einsum("k,knp,kqp->nq", WEIGHTS, z, q)
    assert np.abs(found - exact).max() <= 1e-3 * np.abs(exact).max()


def test_a_checkpoint_is_added_to_what_is_there(tmp_path):
    block = random_block(np.random.default_rng(3), 40)
    whole = FactorStore.prepare(tmp_path / "whole", describe())
    write(whole, "a", [block])

    store = FactorStore.prepare(tmp_path / "store", describe(IDS[::2]))
    write(store, "a", [block])
    store.finish()
    assert_same(read(store, ids=IDS[::2]), of_checkpoints(block, IDS[::2]), rtol=2**-11)

    store = FactorStore.prepare(tmp_path / "store", describe())
    assert not (tmp_path / "store" / "manifest.json").exists()
    with pytest.raises(
        InputError,
        match="'epoch-1' has no factors for 1 of 1 shards .first: a.; run the same 'tracin",
    ):
        store.check_complete(IDS)
    assert set(store.check_complete(IDS[::2])) == {"a"}
    write(store, "a", split(block, 3), ids=["epoch-1"])
    for part in ("factors", "sidecar"):
        both = [getattr(s.paths("a"), part).read_bytes() for s in (store, whole)]
        assert both[0] == both[1]
    # A store with more than what is wanted has it.
    assert FactorStore.prepare(tmp_path / "store", describe(IDS[:1])).description == describe()


def test_examples_that_are_bad_at_either_time_are_left_out(tmp_path):
    block = random_block(np.random.default_rng(3), 6)
    store = FactorStore.prepare(tmp_path / "store", describe(IDS[:2]))
    first = BadExample("z00001", "a", 1, "example 'z00001' is bad")
    write(store, "a", [block.rows(np.array([0, 2, 3, 4, 5]))], bad=[first])
    store = FactorStore.prepare(tmp_path / "store", describe())
    second = BadExample("z00004", "a", 4, "example 'z00004' is bad now")
    again = dataclasses.replace(first, error="bad in another way")
    rows = block.rows(np.array([0, 2, 3, 5]))
    write(store, "a", [rows], ids=["epoch-2"], bad=[again, second])
    assert_same(read(store), block.rows(np.array([0, 2, 3, 5])), rtol=2**-11)
    assert store.finish()["skipped"] == 2
    skipped = pq.read_table(tmp_path / "store" / "skipped-00000-of-00001.parquet").to_pylist()
    assert [(row["example_id"], row["shard"], row["index"]) for row in skipped] == [
        ("z00001", "a", 1),
        ("z00004", "a", 4),
    ]
    assert skipped[1]["error"] == "example 'z00004' is bad now"


def test_shards_are_added_but_none_that_is_there_may_go(tmp_path):
    block = random_block(np.random.default_rng(4), 10)
    store = FactorStore.prepare(tmp_path / "store", describe())
    write(store, "a", [block])
    store.finish()
    both = describe(shards=("a", "b"))
    store = FactorStore.prepare(tmp_path / "store", both)
    with pytest.raises(InputError, match="no factors for 1 of 2 shards .first: b."):
        store.check_complete(IDS)
    with pytest.raises(InputError, match="is not finished: run the same"):
        store.check_finished()
    # A shard that never came to be binds nobody.
    store = FactorStore.prepare(tmp_path / "store", describe())
    assert store.finish()["examples"] == 10
    store.check_finished()
    store = FactorStore.prepare(tmp_path / "store", both)
    write(store, "b", [block])
    with pytest.raises(InputError, match="shard 'b' is not among the examples here"):
        FactorStore.prepare(tmp_path / "store", describe())
    with pytest.raises(InputError, match="'z00000' occurs 2 times .10 ids are repeated"):
        store.finish()


def test_a_refused_command_changes_nothing(tmp_path):
    block = random_block(np.random.default_rng(4), 10)
    store = FactorStore.prepare(tmp_path / "store", describe())
    write(store, "a", [block])
    store.finish()
    # A new shard would lack the other checkpoints.
    with pytest.raises(InputError, match="has factors at checkpoint 'epoch-1', too.*first: b"):
        FactorStore.prepare(tmp_path / "store", describe(IDS[:1], shards=("a", "b")))
    with pytest.raises(InputError, match="is being filled by another run with other"):
        FactorStore.prepare(tmp_path / "store", describe(shards=("a", "b")), others=True)
    FactorStore.open(tmp_path / "store").check_finished()


def test_a_checkpoint_that_some_shards_lack_binds_nobody(tmp_path):
    rng = np.random.default_rng(4)
    blocks = {name: random_block(rng, 10, prefix=name) for name in "ab"}
    store = FactorStore.prepare(tmp_path / "store", describe(IDS[:2], shards=("a", "b")))
    for name, block in blocks.items():
        write(store, name, [block])
    store = FactorStore.prepare(tmp_path / "store", describe(shards=("a", "b")))
    write(store, "a", [blocks["a"]], ids=["epoch-2"])
    store = FactorStore.prepare(tmp_path / "store", describe(IDS[:2], shards=("a", "b")))
    assert store.finish()["examples"] == 20
    assert_same(read(store, "a", IDS[:2]), of_checkpoints(blocks["a"], IDS[:2]), rtol=2**-11)


def test_a_first_try_without_a_shard_binds_nobody_but_one_at_work(tmp_path):
    FactorStore.prepare(tmp_path / "store", describe())
    other = describe(factors={**FACTORS, "layers": "all"})
    with pytest.raises(InputError, match='layers is "last" there and "all" here'):
        FactorStore.prepare(tmp_path / "store", other, others=True)
    assert FactorStore.prepare(tmp_path / "store", other).description == other


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (describe(factors={**FACTORS, "layers": "all"}), 'layers is "last" there and "all" here'),
        (describe(count=7), r"shard 'a'\[0\] is null there and 7 here"),
    ],
)
def test_other_factors_are_refused(tmp_path, wanted, message):
    store = FactorStore.prepare(tmp_path / "store", describe())
    write(store, "a", [random_block(np.random.default_rng(0), 3)])
    with pytest.raises(InputError, match=f"holds other gradient factors: {message}"):
        FactorStore.prepare(tmp_path / "store", wanted)


def test_another_file_of_the_same_checkpoint_is_refused_another_place_is_not(tmp_path):
    store = FactorStore.prepare(tmp_path / "store", describe())
    write(store, "a", [random_block(np.random.default_rng(0), 3)])
    wanted = describe()
    moved = tuple({**c, "path": "/elsewhere"} for c in wanted.checkpoints)
    FactorStore.prepare(tmp_path / "store", dataclasses.replace(wanted, checkpoints=moved))
    other = tuple({**c, "sha256": "other"} for c in wanted.checkpoints)
    with pytest.raises(InputError, match="checkpoint 'epoch-0'.sha256 is"):
        FactorStore.prepare(tmp_path / "store", dataclasses.replace(wanted, checkpoints=other))


def test_directories_that_are_no_stores(tmp_path):
    with pytest.raises(InputError, match=r"is no factor store: it has no store\.json"):
        FactorStore.open(tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no factor store"):
        FactorStore.prepare(tmp_path, describe())
    with pytest.raises(InputError, match="is a file: expected a directory"):
        FactorStore.prepare(tmp_path / "mine.txt", describe())
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        FactorStore.open(tmp_path)
    (tmp_path / "store.json").write_text('{"format": 9}')
    with pytest.raises(InputError, match="has format 9, expected 2"):
        FactorStore.open(tmp_path)
    (tmp_path / "store.json").write_text('{"format": 2}')
    with pytest.raises(InputError, match="is damaged: KeyError"):
        FactorStore.open(tmp_path)
    with pytest.raises(InputError, match="holds 'mine.txt', which is no part of the store"):
        replaced_store(tmp_path).__enter__()


def test_a_shard_without_examples_that_can_be_used(tmp_path):
    store = FactorStore.prepare(tmp_path / "store", describe(IDS[:2], shards=("a", "b")))
    bad = [BadExample("x", "a", 0, "it is broken")]
    write(store, "a", [], bad=bad)
    with pytest.raises(InputError, match="no factors for 1 of 2 shards"):
        store.finish()
    write(store, "b", [])
    with pytest.raises(InputError, match="no training example can be used"):
        store.finish()
    block = random_block(np.random.default_rng(0), 4)
    store.paths("b").sidecar.unlink()
    write(store, "b", [block])
    assert store.finish()["skipped"] == 1
    assert list(store.shard("a").blocks(IDS[:2])) == []
    assert list(problems(store)) == []
    # Another checkpoint cannot bring back what is bad at the first.
    store = FactorStore.prepare(tmp_path / "store", describe(shards=("a", "b")))
    write(store, "a", [block], ids=["epoch-2"])
    write(store, "b", [block], ids=["epoch-2"])
    assert store.finish()["examples"] == 4
    assert_same(read(store, "b"), block, rtol=2**-11)


def test_unknown_checkpoints_and_blocks_that_differ(tmp_path):
    store = FactorStore.prepare(tmp_path / "store", describe())
    with pytest.raises(InputError, match="has no checkpoint 'epoch-9': it has epoch-0, epoch-1"):
        store.check_complete(["epoch-9"])
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="shard 's': the gradient factors of its examples differ"):
        write(store, "a", [random_block(rng, 2), random_block(rng, 2, positions=2)])
    assert list((tmp_path / "store" / "factors").iterdir()) == []


@pytest.fixture
def finished(tmp_path):
    rng = np.random.default_rng(5)
    store = FactorStore.prepare(tmp_path / "store", describe(shards=("a", "b")))
    for name in ("a", "b"):
        write(store, name, [random_block(rng, 30, prefix=name)])
    store.finish()
    assert list(problems(store)) == []
    return store


def _flip_byte(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": (lambda paths: _cut(paths.factors), "has .* bytes, expected"),
    "flipped": (lambda paths: _flip_byte(paths.factors, 2000), "another checksum than its sidecar"),
    "no factors": (lambda paths: paths.factors.unlink(), "its factor file is missing"),
    "no sidecar": (lambda paths: paths.sidecar.unlink(), "it is missing"),
    "sidecar": (lambda paths: _cut(paths.sidecar), "cannot be read as the sidecar"),
    "sidecar flipped": (lambda paths: _flip_byte(paths.sidecar, 100), "sidecar"),
}


def _cut(path):
    path.write_bytes(path.read_bytes()[:-50])


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_named(finished, kind):
    damage, message = DAMAGE[kind]
    damage(finished.paths("b"))
    found = list(problems(finished))
    assert len(found) == 1
    assert re.search(message, found[0])
    assert found[0].startswith("shard 'b': ")
    assert found[0].count("run the same 'tracin extract' again") >= 1
    assert ("remove " in found[0]) == (kind != "no sidecar")
    # What has another size, or is no sidecar, is computed anew without being told.
    anew = kind in ("truncated", "no factors", "no sidecar", "sidecar")
    assert ("b" in finished.stored()) == (not anew)
    assert ("b" in finished.stored(whole=True)) == (kind == "flipped")


def test_a_reader_is_told_of_a_file_that_is_another_one(finished):
    """As when a checkpoint is added after the sidecar was read."""
    shard = finished.shard("a")
    _cut(finished.paths("a").factors)
    with pytest.raises(InputError, match="has .* bytes, its sidecar says"):
        list(shard.blocks(IDS))


def test_numbers_that_are_not_finite_are_found(tmp_path):
    store = FactorStore.prepare(tmp_path / "store", describe())
    block = random_block(np.random.default_rng(0), 5)
    block.gradients[1].layers[0].activations[2, 3] = np.inf
    with np.errstate(all="ignore"):
        write(store, "a", [block], dtype="float32")
    store.finish()
    assert "column 'epoch-1/dense-0/activations' has numbers that are not finite" in next(
        problems(store)
    )


def test_ids_that_occur_in_two_shards_are_found(finished):
    block = random_block(np.random.default_rng(6), 30, prefix="a")
    for name in ("factors", "sidecar"):
        getattr(finished.paths("b"), name).unlink()
    write(finished, "b", [block])
    found = list(problems(finished))
    assert "its sidecar is not the one that the manifest names" in found[0]
    assert "'a00000' occurs 2 times" in found[1]


def test_a_factor_file_is_an_arrow_file_of_fixed_width_without_compression(finished):
    reader = pa.ipc.open_file(str(finished.paths("a").factors))
    assert reader.schema.field("epoch-0/dense-0/activations").type == pa.list_(pa.float16(), 6)
    assert sum(reader.get_batch(i).num_rows for i in range(reader.num_record_batches)) == 30
