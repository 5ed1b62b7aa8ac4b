"""Gradient factors to the strongest proponents and opponents of each query."""

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator

import apache_beam as beam
import numpy as np
from apache_beam.pvalue import AsSingleton
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.shared import Shared
from apache_beam.utils.windowed_value import WindowedValue

from tracin_transforms.core.factors import FactorBlock
from tracin_transforms.core.likely_pairs import LikelyPairs
from tracin_transforms.core.pruning import Pruner
from tracin_transforms.core.queries import Queries
from tracin_transforms.core.ranking import Thresholds, TopInfluences
from tracin_transforms.core.threads import Threads
from tracin_transforms.core.top_scan import TopScan
from tracin_transforms.storage.factor_file import read_factor_block
from tracin_transforms.storage.factor_shard import StoredShard
from tracin_transforms.storage.factor_store import FactorStore
from tracin_transforms.storage.files import AnyPath
from tracin_transforms.storage.job_notes import JobNotes
from tracin_transforms.storage.rescoring import Shortlist, rescore_shard
from tracin_transforms.storage.results import write_influence, write_score_matrix
from tracin_transforms.storage.shard_scan import scan_shard, scout_shard

_PAIRS = "pairs.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """What is asked of the training examples.

    Attributes:
        queries: File with the queries' gradient factors, read once per process.
        weights: Weight of each checkpoint, shape [K].
        k: Proponents, and opponents, to keep for each query.
        threads: Threads of a worker process: its share of the machine's cores.
    """

    queries: AnyPath
    weights: np.ndarray
    k: int
    threads: int = 1
    _shared: Shared = dataclasses.field(default_factory=Shared, init=False)

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k is {self.k}, expected at least 1")

    def load(self) -> Queries:
        """Returns the queries, which all steps of a process have in common."""
        queries: Queries = self._shared.acquire(
            lambda: Queries.prepare(read_factor_block(self.queries), self.weights)
        )
        return queries


@dataclasses.dataclass(eq=False)
class ScoreInfluence(beam.PTransform):
    """Ranks the training examples of blocks by their influence on each query.

    A worker merges its blocks into one `TopInfluences`; only those are shuffled.

    Attributes:
        question: What is asked.
    """

    question: Question

    def expand(self, blocks: beam.PCollection[FactorBlock]) -> beam.PCollection[TopInfluences]:
        """Wires the steps."""
        return blocks | "ScoreBlocks" >> beam.ParDo(_ScoreBlocks(self.question)) | _MergeAll()


@dataclasses.dataclass(eq=False)
class ScoreStoredInfluence(beam.PTransform):
    """Ranks the training examples of stored shards, given by name, as `ScoreInfluence` does.

    With pruning, some pairs of each shard say how much influence it takes to be among the
    strongest, and then only those are multiplied that can have as much. Between the two passes go
    thresholds alone. The result is that of multiplying all.

    Attributes:
        question: What is asked.
        store: Where the factors are.
        checkpoint_ids: Of the queries, in order.
        prune: Whether to leave out pairs that cannot be among the strongest.
        notes: Where workers note what they have done, or None.
    """

    question: Question
    store: FactorStore
    checkpoint_ids: tuple[str, ...]
    prune: bool = True
    notes: JobNotes | None = None

    def expand(self, names: beam.PCollection[str]) -> beam.PCollection[TopInfluences]:
        """Wires the steps."""
        names = names | "DistributeShards" >> beam.Reshuffle()
        if not self.prune:
            return names | "ScoreShards" >> beam.ParDo(_ScoreShards(self), None) | _MergeAll()
        some = names | "ScoutShards" >> beam.ParDo(_ScoutShards(self))
        scouted = some | "MergeScouted" >> _MergeAll()
        thresholds = scouted | "Thresholds" >> beam.Map(TopInfluences.thresholds)
        scored = names | "ScoreShards" >> beam.ParDo(_ScoreShards(self), AsSingleton(thresholds))
        return (scouted, scored) | beam.Flatten() | _MergeAll()


@dataclasses.dataclass(eq=False)
class RescoreShortlist(beam.PTransform):
    """Scores the pairs of a shortlist in stored shards, given by name; keeps the strongest.

    Attributes:
        question: What is asked, with the queries' gradient factors themselves.
        store: Where those of the training examples are.
        checkpoint_ids: Of the queries, in order.
        shortlist: Directory with what `WriteInfluence` wrote, read once per process.
        notes: Where workers note what they have done, or None.
    """

    question: Question
    store: FactorStore
    checkpoint_ids: tuple[str, ...]
    shortlist: AnyPath
    notes: JobNotes | None = None

    def expand(self, names: beam.PCollection[str]) -> beam.PCollection[TopInfluences]:
        """Wires the steps."""
        names = names | "DistributeShards" >> beam.Reshuffle()
        return names | "RescoreShards" >> beam.ParDo(_RescoreShards(self)) | _MergeAll()


@dataclasses.dataclass(eq=False)
class WriteInfluence(beam.PTransform):
    """Writes the proponents and opponents of all queries as ``influence-*.parquet``.

    Beside them, ``pairs.json`` has the number of pairs that were scored.

    Attributes:
        question: What was asked.
        directory: Where the files go.
    """

    question: Question
    directory: AnyPath

    def expand(self, top: beam.PCollection[TopInfluences]) -> beam.PCollection[None]:
        """Wires the steps."""
        return top | "WriteParquet" >> beam.Map(_write, self.question, self.directory)


@dataclasses.dataclass(eq=False)
class WriteScoreMatrix(beam.PTransform):
    """Writes the influence of all training examples on all queries as ``scores-*.parquet``.

    Attributes:
        question: What is asked; its k does not matter.
        directory: Where the files go, one for each block.
    """

    question: Question
    directory: AnyPath

    def expand(self, blocks: beam.PCollection[FactorBlock]) -> beam.PCollection[None]:
        """Wires the steps."""
        return blocks | "WriteScores" >> beam.ParDo(_WriteScores(self.question, self.directory))


def _write(top: TopInfluences, question: Question, directory: AnyPath) -> None:
    write_influence(directory, top, question.load().block)
    (directory / _PAIRS).write_text(json.dumps(top.pairs), encoding="utf-8")


def read_pairs(directory: AnyPath) -> int:
    """Returns the number of pairs that `WriteInfluence` noted."""
    pairs: int = json.loads((directory / _PAIRS).read_text(encoding="utf-8"))
    return pairs


class _WithQueries(beam.DoFn):
    """Has the queries in memory, once per process."""

    def __init__(self, question: Question) -> None:
        self._question = question

    def setup(self) -> None:
        self._queries = self._question.load()
        self._threads = Threads(self._question.threads)

    def teardown(self) -> None:
        self._threads.close()


class _ScoreBlocks(_WithQueries):
    def start_bundle(self) -> None:
        self._scan = TopScan(self._queries, self._question.k, self._threads)

    def process(self, block: FactorBlock) -> None:
        self._scan.add(block)

    def finish_bundle(self) -> Iterator[WindowedValue]:
        yield _of_bundle(self._scan.top())


class _WithShards(_WithQueries):
    """Has a scan for each bundle of names of stored shards, and gives what it found."""

    def __init__(self, job: ScoreStoredInfluence | RescoreShortlist) -> None:
        super().__init__(job.question)
        self._store = job.store
        self._checkpoint_ids = job.checkpoint_ids
        self._notes = job.notes

    def start_bundle(self) -> None:
        self._scan: TopScan | None = None

    def _scan_of(self, thresholds: Thresholds | None = None) -> TopScan:
        if self._scan is None:
            self._scan = TopScan(self._queries, self._question.k, self._threads, thresholds)
        return self._scan

    def finish_bundle(self) -> Iterator[WindowedValue]:
        if self._scan is not None:
            yield _of_bundle(self._scan.top())

    def _note(self, shard: StoredShard) -> None:
        if self._notes is not None:
            self._notes.finished(shard.sidecar.shard.name, 0, len(shard.rows))


class _ScoutShards(_WithShards):
    def setup(self) -> None:
        super().setup()
        shards = len(self._store.description.shards)
        self._likely = LikelyPairs(self._queries, self._question.k, shards, self._threads)

    def process(self, name: str) -> None:
        shard = self._store.shard(name, with_peaks=True)
        scout_shard(shard, self._checkpoint_ids, self._scan_of(), self._likely)


class _ScoreShards(_WithShards):
    def __init__(self, job: ScoreStoredInfluence) -> None:
        super().__init__(job)
        self._prunes = job.prune

    def setup(self) -> None:
        super().setup()
        self._pruner = None
        if self._prunes:
            tile_rows = TopScan(self._queries, 1, self._threads).tile_rows
            self._pruner = Pruner(self._queries, tile_rows, self._threads)

    def process(self, name: str, thresholds: Thresholds | None) -> None:
        shard = self._store.shard(name, with_peaks=self._prunes)
        scan_shard(shard, self._checkpoint_ids, self._scan_of(thresholds), self._pruner)
        self._note(shard)


class _RescoreShards(_WithShards):
    def __init__(self, job: RescoreShortlist) -> None:
        super().__init__(job)
        self._directory = job.shortlist
        self._shared_shortlist = Shared()

    def setup(self) -> None:
        super().setup()
        self._shortlist: Shortlist = self._shared_shortlist.acquire(
            lambda: Shortlist.read(self._directory, self._queries.block)
        )

    def process(self, name: str) -> None:
        shard = self._store.shard(name)
        rescore_shard(shard, self._checkpoint_ids, self._scan_of(), self._shortlist)
        self._note(shard)


class _WriteScores(_WithQueries):
    def __init__(self, question: Question, directory: AnyPath) -> None:
        super().__init__(question)
        self._directory = directory

    def process(self, block: FactorBlock) -> None:
        write_score_matrix(self._directory, block, self._queries)


def _of_bundle(top: TopInfluences) -> WindowedValue:
    window = GlobalWindow()
    return WindowedValue(top, window.max_timestamp(), [window])


class _MergeAll(beam.PTransform):
    def expand(self, tops: beam.PCollection[TopInfluences]) -> beam.PCollection[TopInfluences]:
        return tops | "MergeTop" >> beam.CombineGlobally(_MergeTop()).without_defaults()


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
