"""Blocks of gradient factors to files of self-influence scores."""

import dataclasses
from pathlib import Path

import apache_beam as beam
import numpy as np

from tracin_transforms.core.factors import FactorBlock
from tracin_transforms.core.influence import self_influence
from tracin_transforms.storage.results import write_scores


@dataclasses.dataclass(eq=False)
class ScoreSelfInfluence(beam.PTransform):
    """Writes the self-influence of every example, one file per block, and gives their paths.

    Only the paths travel on; `storage.results.write_self_influence` ranks the files.

    Attributes:
        weights: Weight of each checkpoint, shape [K].
        directory: Where the files go.
    """

    weights: np.ndarray
    directory: Path

    def expand(self, blocks: beam.PCollection[FactorBlock]) -> beam.PCollection[Path]:
        """Wires the steps."""
        return blocks | "ScoreBlock" >> beam.Map(_score_block, self.weights, self.directory)


def _score_block(block: FactorBlock, weights: np.ndarray, directory: Path) -> Path:
    return write_scores(directory, block, self_influence(block, weights))
