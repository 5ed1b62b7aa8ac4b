"""Blocks of gradient factors to the strongest proponents and opponents of each query."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator

import apache_beam as beam
import numpy as np
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.shared import Shared
from apache_beam.utils.windowed_value import WindowedValue

from tracin_transforms.core.factors import FactorBlock
from tracin_transforms.core.ranking import TopInfluences, merge_block
from tracin_transforms.storage.factor_file import read_factor_block
from tracin_transforms.storage.files import AnyPath
from tracin_transforms.storage.results import write_influence


@dataclasses.dataclass(eq=False)
class ScoreInfluence(beam.PTransform):
    """Ranks all training examples by their influence on each query.

    A worker merges its blocks into one `TopInfluences`; only those are shuffled.

    Attributes:
        queries: File with the queries' gradient factors, read once per process.
        weights: Weight of each checkpoint, shape [K].
        k: Proponents, and opponents, to keep for each query.
    """

    queries: AnyPath
    weights: np.ndarray
    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k is {self.k}, expected at least 1")

    def expand(self, blocks: beam.PCollection[FactorBlock]) -> beam.PCollection[TopInfluences]:
        """Wires the steps."""
        return (
            blocks
            | "ScoreBlocks" >> beam.ParDo(_ScoreBlocks(self.queries, self.weights, self.k))
            | "MergeTop" >> beam.CombineGlobally(_MergeTop()).without_defaults()
        )


@dataclasses.dataclass(eq=False)
class WriteInfluence(beam.PTransform):
    """Writes the proponents and opponents of all queries as ``influence-*.parquet``.

    Attributes:
        queries: File with the queries' gradient factors.
        directory: Where the files go.
    """

    queries: AnyPath
    directory: AnyPath

    def expand(self, top: beam.PCollection[TopInfluences]) -> beam.PCollection[None]:
        """Wires the steps."""
        return top | "WriteParquet" >> beam.Map(_write, self.queries, self.directory)


def _write(top: TopInfluences, queries: AnyPath, directory: AnyPath) -> None:
    write_influence(directory, top, read_factor_block(queries))


class _ScoreBlocks(beam.DoFn):
    def __init__(self, queries: AnyPath, weights: np.ndarray, k: int) -> None:
        self._path = queries
        self._weights = weights
        self._k = k
        self._shared = Shared()

    def setup(self) -> None:
        self._queries: FactorBlock = self._shared.acquire(lambda: read_factor_block(self._path))
        self._none = TopInfluences.empty(self._queries, self._k)

    def start_bundle(self) -> None:
        self._best = self._none

    def process(self, block: FactorBlock) -> None:
        self._best = merge_block(self._best, block, self._queries, self._weights)

    def finish_bundle(self) -> Iterator[WindowedValue]:
        window = GlobalWindow()
        yield WindowedValue(self._best, window.max_timestamp(), [window])


class _MergeTop(beam.CombineFn):
    """Merges `TopInfluences`; None stands for "nothing yet", which needs no queries to exist."""

    def create_accumulator(self) -> TopInfluences | None:
        return None

    def add_input(
        self, accumulator: TopInfluences | None, element: TopInfluences
    ) -> TopInfluences | None:
        return element if accumulator is None else accumulator.merge(element)

    def merge_accumulators(
        self, accumulators: Iterable[TopInfluences | None]
    ) -> TopInfluences | None:
        found = [accumulator for accumulator in accumulators if accumulator is not None]
        return functools.reduce(TopInfluences.merge, found) if found else None

    def extract_output(self, accumulator: TopInfluences | None) -> TopInfluences | None:
        return accumulator
