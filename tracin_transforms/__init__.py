"""TracIn training-data attribution for Keras models, on Apache Beam.

Everything listed here is the public API. What needs TensorFlow or Beam is imported when it is
first used, so that this import is fast and the method works without either.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tracin_transforms.core.checkpoints import Checkpoint, CheckpointSeries
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.factors import FactorBlock, GradientFactors, LayerFactors
from tracin_transforms.core.influence import influence, pair_influence, self_influence
from tracin_transforms.core.protocols import (
    BadExample,
    ExampleBatch,
    ExampleSource,
    FactorExtractor,
    LoadedExtractor,
    Shard,
)
from tracin_transforms.core.queries import Queries
from tracin_transforms.core.ranking import InfluenceRows, TopInfluences
from tracin_transforms.core.sketching import Sketch
from tracin_transforms.core.threads import Threads
from tracin_transforms.core.top_scan import TopScan

if TYPE_CHECKING:
    from tracin_transforms.beam.extract import ExtractFactors, Extraction, SharedExtractor
    from tracin_transforms.beam.influence import (
        Question,
        RescoreShortlist,
        ScoreInfluence,
        ScoreStoredInfluence,
        WriteInfluence,
        WriteScoreMatrix,
    )
    from tracin_transforms.beam.self_influence import ScoreSelfInfluence, ScoreStored
    from tracin_transforms.beam.store import ReadFactors, WriteFactors
    from tracin_transforms.examples.images import ImageExamples
    from tracin_transforms.examples.lookup import find_examples
    from tracin_transforms.examples.npz import NpzExamples
    from tracin_transforms.examples.parquet import ParquetExamples
    from tracin_transforms.examples.spec import parse_spec
    from tracin_transforms.examples.tfds import TFDSExamples
    from tracin_transforms.examples.tfrecord import TFRecordExamples
    from tracin_transforms.models.extractor import KerasFactorExtractor
    from tracin_transforms.models.recorder import CheckpointRecorder
    from tracin_transforms.storage.checkpoint_series import read_checkpoint_series
    from tracin_transforms.storage.factor_store import FactorStore

_LAZY = {
    "CheckpointRecorder": "tracin_transforms.models.recorder",
    "ExtractFactors": "tracin_transforms.beam.extract",
    "Extraction": "tracin_transforms.beam.extract",
    "FactorStore": "tracin_transforms.storage.factor_store",
    "ImageExamples": "tracin_transforms.examples.images",
    "KerasFactorExtractor": "tracin_transforms.models.extractor",
    "NpzExamples": "tracin_transforms.examples.npz",
    "ParquetExamples": "tracin_transforms.examples.parquet",
    "Question": "tracin_transforms.beam.influence",
    "ReadFactors": "tracin_transforms.beam.store",
    "RescoreShortlist": "tracin_transforms.beam.influence",
    "ScoreInfluence": "tracin_transforms.beam.influence",
    "ScoreSelfInfluence": "tracin_transforms.beam.self_influence",
    "ScoreStored": "tracin_transforms.beam.self_influence",
    "ScoreStoredInfluence": "tracin_transforms.beam.influence",
    "SharedExtractor": "tracin_transforms.beam.extract",
    "TFDSExamples": "tracin_transforms.examples.tfds",
    "TFRecordExamples": "tracin_transforms.examples.tfrecord",
    "WriteFactors": "tracin_transforms.beam.store",
    "WriteInfluence": "tracin_transforms.beam.influence",
    "WriteScoreMatrix": "tracin_transforms.beam.influence",
    "find_examples": "tracin_transforms.examples.lookup",
    "parse_spec": "tracin_transforms.examples.spec",
    "read_checkpoint_series": "tracin_transforms.storage.checkpoint_series",
}

__all__ = [
    "BadExample",
    "Checkpoint",
    "CheckpointRecorder",
    "CheckpointSeries",
    "ExampleBatch",
    "ExampleSource",
    "ExtractFactors",
    "Extraction",
    "FactorBlock",
    "FactorExtractor",
    "FactorStore",
    "GradientFactors",
    "ImageExamples",
    "InfluenceRows",
    "InputError",
    "KerasFactorExtractor",
    "LayerFactors",
    "LoadedExtractor",
    "NpzExamples",
    "ParquetExamples",
    "Queries",
    "Question",
    "ReadFactors",
    "RescoreShortlist",
    "ScoreInfluence",
    "ScoreSelfInfluence",
    "ScoreStored",
    "ScoreStoredInfluence",
    "Shard",
    "SharedExtractor",
    "Sketch",
    "TFDSExamples",
    "TFRecordExamples",
    "Threads",
    "TopInfluences",
    "TopScan",
    "WriteFactors",
    "WriteInfluence",
    "WriteScoreMatrix",
    "find_examples",
    "influence",
    "pair_influence",
    "parse_spec",
    "read_checkpoint_series",
    "self_influence",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
