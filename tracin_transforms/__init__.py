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
    ExampleBatch,
    ExampleSource,
    FactorExtractor,
    LoadedExtractor,
    Shard,
)
from tracin_transforms.core.ranking import InfluenceRows, TopInfluences, merge_block

if TYPE_CHECKING:
    from tracin_transforms.beam.extract import ExtractFactors, SharedExtractor
    from tracin_transforms.beam.influence import ScoreInfluence, WriteInfluence
    from tracin_transforms.beam.self_influence import ScoreSelfInfluence
    from tracin_transforms.examples.npz import NpzExamples
    from tracin_transforms.models.extractor import KerasFactorExtractor
    from tracin_transforms.models.recorder import CheckpointRecorder
    from tracin_transforms.storage.checkpoint_series import read_checkpoint_series

_LAZY = {
    "CheckpointRecorder": "tracin_transforms.models.recorder",
    "ExtractFactors": "tracin_transforms.beam.extract",
    "KerasFactorExtractor": "tracin_transforms.models.extractor",
    "NpzExamples": "tracin_transforms.examples.npz",
    "ScoreInfluence": "tracin_transforms.beam.influence",
    "ScoreSelfInfluence": "tracin_transforms.beam.self_influence",
    "SharedExtractor": "tracin_transforms.beam.extract",
    "WriteInfluence": "tracin_transforms.beam.influence",
    "read_checkpoint_series": "tracin_transforms.storage.checkpoint_series",
}

__all__ = [
    "Checkpoint",
    "CheckpointRecorder",
    "CheckpointSeries",
    "ExampleBatch",
    "ExampleSource",
    "ExtractFactors",
    "FactorBlock",
    "FactorExtractor",
    "GradientFactors",
    "InfluenceRows",
    "InputError",
    "KerasFactorExtractor",
    "LayerFactors",
    "LoadedExtractor",
    "NpzExamples",
    "ScoreInfluence",
    "ScoreSelfInfluence",
    "Shard",
    "SharedExtractor",
    "TopInfluences",
    "WriteInfluence",
    "influence",
    "merge_block",
    "pair_influence",
    "read_checkpoint_series",
    "self_influence",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
