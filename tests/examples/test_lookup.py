"""Single examples by their ids."""

from dataclasses import dataclass

import numpy as np
import pytest

from tests.examples.writers import record, serialized
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.protocols import BadExample, ExampleBatch, ExampleSource, Shard
from tracin_transforms.examples.lookup import find_examples
from tracin_transforms.examples.npz import NpzExamples
from tracin_transforms.examples.tfrecord import TFRecordExamples

READ: list[str] = []


@dataclass(frozen=True)
class Letters(ExampleSource):
    """Three shards of 300 examples; notes which are read, and how far."""

    def shards(self):
        return tuple(Shard(name, count=300) for name in "abc")

    def read(self, shard, batch_size):
        for i in range(0, 300, batch_size):
            READ.append(f"{shard.name}{i}")
            rows = np.arange(i, min(i + batch_size, 300))
            ids = np.array([f"{shard.name}/{row}" for row in rows])
            bad = (BadExample(f"{shard.name}/bad", shard.name, i, "no letter"),) if i else ()
            yield ExampleBatch(shard.name, rows, ids, rows * 2, rows, bad=bad)


@pytest.fixture(autouse=True)
def _nothing_read():
    READ.clear()


def test_examples_come_in_the_order_of_the_ids():
    found = find_examples(Letters(), ["b/3", "a/70", "b/3"])
    assert [batch.example_ids.tolist() for batch in found] == [["b/3"], ["a/70"], ["b/3"]]
    assert [batch.inputs.tolist() for batch in found] == [[6], [140], [6]]
    assert [batch.bad for batch in found] == [()] * 3
    assert find_examples(Letters(), []) == []


def test_no_more_is_read_than_necessary():
    find_examples(Letters(), ["b/70"])
    assert READ == ["a0", "a64", "a128", "a192", "a256", "b0", "b64"]
    READ.clear()
    find_examples(Letters(), ["b/70"], shard_names={"b"})
    assert READ == ["b0", "b64"]


def test_ids_that_name_their_shard_lead_there(tmp_path):
    for name in "ab":
        content = b"".join(record(serialized(x=[i], y=i)) for i in range(4))
        (tmp_path / f"{name}.tfrecord").write_bytes(content)
    source = TFRecordExamples(f"{tmp_path}/*")
    (tmp_path / "a.tfrecord").write_bytes(b"no record, which reading would show")
    (found,) = find_examples(source, ["b:2"])
    assert found.inputs.tolist() == [[2]]

    np.savez(tmp_path / "data.npz", x=np.arange(30), y=np.arange(30))
    found = find_examples(NpzExamples(str(tmp_path / "data.npz"), shard_size=7), ["data:29"])
    assert found[0].inputs.tolist() == [29]
    assert found[0].shard == "data-00004-of-00005"


def test_ids_that_only_seem_to_name_a_shard_are_found(tmp_path):
    ids = np.array(["data:1", "data:0", "x:3"])
    np.savez(tmp_path / "data.npz", x=np.arange(3), y=np.arange(3), id=ids)
    source = NpzExamples(str(tmp_path / "data.npz"), example_ids="id", shard_size=1)
    found = find_examples(source, ids.tolist())
    assert [batch.inputs.tolist() for batch in found] == [[0], [1], [2]]


def test_ids_that_are_not_there():
    with pytest.raises(InputError, match="example id 'd/1' is not in any of 3 shards"):
        find_examples(Letters(), ["a/1", "d/1", "d/2"])
    with pytest.raises(InputError, match="example id 'a/1' is not in any of 1 shards"):
        find_examples(Letters(), ["a/1"], ["b"])
    with pytest.raises(InputError, match="example 'b/bad' of shard 'b' cannot be read: no letter"):
        find_examples(Letters(), ["b/bad"])
