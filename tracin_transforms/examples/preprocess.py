"""Examples whose inputs go through a function of the user's own before the model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.protocols import ExampleBatch, ExampleSource, Shard
from tracin_transforms.core.user_code import load_function
from tracin_transforms.examples.functions import array_of


@dataclass(frozen=True)
class PreprocessedExamples(ExampleSource):
    """The examples of a source, with their inputs as a function of the user's own makes them.

    Attributes:
        source: Where the examples are.
        function: ``module:function``. It gets the inputs of a batch, a tensor or a dict of them,
            and returns what the model takes, a row for each example.
    """

    source: ExampleSource
    function: str

    def shards(self) -> tuple[Shard, ...]:
        """Returns the shards of the source, after looking for the function.

        Raises:
            InputError: There is no such function; or what the source raises.
        """
        load_function(self.function, "--preprocess")
        return self.source.shards()

    def read(self, shard: Shard, batch_size: int) -> Iterator[ExampleBatch]:
        """Yields the batches of the source, whose bad examples pass through.

        Raises:
            InputError: The function returns something else than a row for each example; or what
                the source raises.
        """
        for batch in self.source.read(shard, batch_size):
            if len(batch):
                yield replace(batch, inputs=self._preprocessed(batch))
            else:
                yield batch

    def describe(self) -> dict[str, Any]:
        """Returns the description of the source, and the function's name."""
        return {**self.source.describe(), "preprocess": self.function}

    def _preprocessed(self, batch: ExampleBatch) -> Any:
        import tensorflow as tf

        found = load_function(self.function, "--preprocess")(
            tf.nest.map_structure(tf.convert_to_tensor, batch.inputs)
        )
        outputs = dict(found) if isinstance(found, Mapping) else {"": found}
        arrays = {name: array_of(output) for name, output in outputs.items()}
        for name, array in arrays.items():
            if array.shape[:1] != (len(batch),):
                where = f" for input {name!r}" if name else ""
                raise InputError(
                    f"--preprocess {self.function!r} returned an array of shape "
                    f"{list(array.shape)}{where} for {len(batch)} examples of shard "
                    f"{batch.shard!r}: expected a row for each example"
                )
        return arrays if isinstance(found, Mapping) else arrays[""]
