"""Records turned into examples by a function of the user's own, within `tf.data`."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.protocols import BadExample
from tracin_transforms.core.user_code import load_function
from tracin_transforms.examples.assembly import ONLY_INPUT, Example
from tracin_transforms.examples.decoding import Broken, each_element
from tracin_transforms.examples.fields import Record, bad_example, id_of, target_of, weight_of
from tracin_transforms.examples.functions import array_of

_KEYS = {"x", "y", "id", "weight"}


def examples_parsed(
    shard: str,
    records: Sequence[Record],
    tensors: Callable[[list[Any]], Any],
    parse: str,
) -> list[Example | BadExample]:
    """Returns the example that a function makes of each record, or what is wrong with it.

    Args:
        shard: Name of the shard.
        records: Read from it.
        tensors: Makes of the records' values what `tf.data` slices into the function's arguments.
        parse: See `parsed`.

    Raises:
        InputError: There is no such function, or it returns something else than examples.
    """
    import tensorflow as tf

    values = [record.values for record in records if not isinstance(record.values, Broken)]
    outputs: Iterator[Any] = iter(())
    if values:
        slices = tf.data.Dataset.from_tensor_slices(tensors(values))
        outputs = each_element(parsed(slices, parse), len(values))
    return [
        bad_example(shard, record, None, record.values)
        if isinstance(record.values, Broken)
        else example_of(shard, record, next(outputs))
        for record in records
    ]


def parsed(dataset: Any, parse: str) -> Any:
    """Returns a `tf.data.Dataset` of what a function makes of each element.

    Args:
        dataset: A `tf.data.Dataset`.
        parse: ``module:function``, which returns (x, y), or a dict of x, y and perhaps id and
            weight.

    Raises:
        InputError: There is no such function, or it returns something else.
    """
    import tensorflow as tf

    dataset = dataset.map(_traced(parse), num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    spec = dataset.element_spec
    is_pair = isinstance(spec, tuple) and len(spec) == 2
    if not is_pair and not (isinstance(spec, Mapping) and {"x", "y"} <= spec.keys() <= _KEYS):
        raise InputError(
            f"--parse {parse!r} returned {tf.nest.map_structure(_short, spec)}: expected (x, y), "
            "or a dict of x, y and, if there are any, id and weight"
        )
    return dataset


def example_of(shard: str, record: Record, output: Any) -> Example | BadExample:
    """Returns the example that is an element of what `parsed` returned.

    Args:
        shard: Name of the shard.
        record: Its index and default id.
        output: The element, as NumPy arrays, or Broken.
    """
    if isinstance(output, Broken):
        return bad_example(shard, record, None, Broken(f"--parse failed: {output.reason}"))
    if not isinstance(output, Mapping):
        output = dict(zip("xy", output, strict=True))
    x = output["x"] if isinstance(output["x"], Mapping) else {ONLY_INPUT: output["x"]}
    example_id = id_of(output.get("id", record.default_id), "the id of --parse")
    target = target_of(output["y"], "the y of --parse")
    weight = None
    if "weight" in output:
        weight = weight_of(output["weight"], "the weight of --parse")
    for found in (example_id, target, weight):
        if isinstance(found, Broken):
            return bad_example(shard, record, example_id, found)
    inputs = {name: array_of(value) for name, value in x.items()}
    return Example(record.index, example_id, inputs, target, weight)  # type: ignore[arg-type]


@functools.cache
def _traced(parse: str) -> Callable[..., Any]:
    """Returns the function, traced once for all shards of a process."""
    import tensorflow as tf

    return tf.function(load_function(parse, "--parse"))


def _short(spec: Any) -> str:
    return f"{getattr(spec, 'dtype', spec)!r}"
