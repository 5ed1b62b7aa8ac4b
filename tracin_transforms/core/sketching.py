"""Sketches: gradient factors replaced by random projections of them, which are factors again.

With random matrices A [r₁, C] and B [r₂, d] whose entries are independent and ±1/√r, the weights'
gradient Σ_p e_p h_pᵀ becomes A (Σ_p e_p h_pᵀ) Bᵀ, with factors A e_p and B h_p. The bias's gradient
becomes A Σ_p e_p: its 1 is not projected, which takes no number and is exact but for A. As
E[AᵀA] = E[BᵀB] = I, and A and B are independent, inner products stay what they were in expectation;
with s = e·e', t = h·h', β = 1 where the layer has a bias and 0 where not, one position,

    Var = s² V                                                           only h projected
    Var = U V + s² V + (t + β)² U,  U = (P_e + s² − 2Γ)/r₁                           both

where V = (P_h + t² − 2Η)/r₂, P_e = ‖e‖²‖e'‖², Γ = Σ_i e_i² e'_i², P_h = ‖h‖²‖h'‖²,
Η = Σ_j h_j² h'_j².

Reference:
    Pruthi et al. (2020), appendix F (both factors of a fully connected layer projected).
    Achlioptas (2003), Database-friendly random projections (entries ±1/√r in place of the
    Gaussian ones of Johnson & Lindenstrauss, 1984).
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.factors import FactorBlock, GradientFactors, LayerFactors

ACTIVATIONS, TWO_SIDED = "activations", "two-sided"

_TEXT = re.compile(rf"({TWO_SIDED}:)?([0-9]{{1,9}})")
# A matrix can be as large as the block that it projects, and takes far less time to make again
# than to multiply with: what is kept serves the few checkpoints and layers that most jobs have.
_MATRICES = 16


@dataclass(frozen=True)
class Sketch:
    """How factors are projected. The same sketch projects the same everywhere, at any time.

    Attributes:
        kind: ``activations``: the error signals are kept whole, and the noise of an inner product
            is proportional to theirs; ``two-sided``: both are projected, for layers of very many
            outputs.
        numbers: r₁ + r₂, how many numbers are kept per example, checkpoint, layer and position.
        seed: What the random matrices are drawn from, with the checkpoint's id, the layer's place
            in the order, and the side. Every checkpoint has its own: its errors are independent
            of the others', so that they average out in the sum over checkpoints. The layer's name
            is no part of it, as Keras may name the same layer differently in another session.
    """

    kind: str
    numbers: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in (ACTIVATIONS, TWO_SIDED):
            raise InputError(
                f"sketch of kind {self.kind!r}: expected {ACTIVATIONS!r} or {TWO_SIDED!r}"
            )
        least = 2 if self.kind == TWO_SIDED else 1
        if self.numbers < least:
            raise InputError(
                f"sketch of {self.numbers} numbers: expected at least {least} ({self.kind})"
            )

    @classmethod
    def parse(cls, text: str) -> "Sketch":
        """Returns the sketch that a user names: ``1472``, or ``two-sided:1472``.

        Raises:
            InputError: It is not of that form.
        """
        match = _TEXT.fullmatch(text)
        if match is None:
            raise InputError(
                f"sketch {text!r}: expected how many numbers to keep per example, checkpoint and "
                f"layer, as in 1472 or {TWO_SIDED}:1472"
            )
        return cls(TWO_SIDED if match[1] else ACTIVATIONS, int(match[2]))

    def __str__(self) -> str:
        """Returns what `parse` reads; without the seed."""
        return f"{TWO_SIDED}:{self.numbers}" if self.kind == TWO_SIDED else str(self.numbers)

    def to_json(self) -> dict[str, Any]:
        """Returns the sketch as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Sketch":
        """Returns the sketch that `to_json` gave."""
        return cls(**document)

    def project(self, block: FactorBlock) -> FactorBlock:
        """Returns the block with the factors of each layer projected.

        Layers whose factors are no more numbers than the sketch, layers of several groups, and
        those with one-hot activations are kept whole. Inner products must be taken with blocks
        that the same sketch has projected.

        Args:
            block: n examples at K checkpoints, the factors as they were extracted.

        Returns:
            The same examples. Of a projected layer: error signals [n, r₁] or [n, P, r₁] and
            activations [n, r₂] or [n, P, r₂], float32; the bias as it was.

        Raises:
            InputError: Error signals to be kept whole leave no number for the activations.
        """
        return replace(block, gradients=tuple(map(self._project_gradients, block.gradients)))

    def _project_gradients(self, gradient: GradientFactors) -> GradientFactors:
        layers = tuple(
            self._project_layer(layer, gradient.checkpoint_id, i)
            for i, layer in enumerate(gradient.layers)
        )
        return replace(gradient, layers=layers)

    def _project_layer(self, layer: LayerFactors, checkpoint_id: str, place: int) -> LayerFactors:
        if layer.groups > 1 or layer.is_one_hot:
            return layer
        e, h = layer.error_signals, layer.activations
        outputs, inputs = e.shape[-1], h.shape[-1]
        error_rows, activation_rows = self._rows(layer.name, outputs, inputs)
        drawn_from = (self.seed, checkpoint_id, place)
        if error_rows < outputs:
            e = _projected(e, _matrix(*drawn_from, "error_signals", error_rows, outputs))
        if activation_rows < inputs:
            h = _projected(h, _matrix(*drawn_from, "activations", activation_rows, inputs))
        return replace(layer, error_signals=e, activations=h)

    def _rows(self, layer_name: str, outputs: int, inputs: int) -> tuple[int, int]:
        """Returns r₁ and r₂; a side that has as many numbers already is whole.

        Two-sided, with a = cos(e, e') and b = cos(h, h'), the leading part of the variance is
        b²(1 + a²)/r₁ + a²(1 + b²)/r₂ without a bias, least at r₁/r₂ = 1 where a = b, and at ever
        larger ratios as the error signals of unrelated examples come close to orthogonal. Three
        quarters for them are at most 4/3 of the least variance wherever |a| <= |b|, no other share
        promises less. A bias adds to the first part alone, where t + 1 is larger than t.
        """
        if self.kind == ACTIVATIONS:
            if outputs >= self.numbers:
                raise InputError(
                    f"layer {layer_name!r} has {outputs} outputs, whose error signals a sketch of "
                    f"{self.numbers} numbers keeps whole, with none left for its activations: ask "
                    f"for more than {outputs} numbers, or for {TWO_SIDED}:{self.numbers}"
                )
            return outputs, min(inputs, self.numbers - outputs)
        error_rows = min(outputs, 3 * self.numbers // 4)
        activation_rows = min(inputs, self.numbers - error_rows)
        return min(outputs, self.numbers - activation_rows), activation_rows


def _projected(vectors: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Returns each vector's projection.

    Args:
        vectors: Shape [n, m] or [n, P, m], float32.
        matrix: Shape [r, m], float32.

    Returns:
        Shape [n, r] or [n, P, r], float32.
    """
    # One product for all positions: a stack of them is multiplied example by example.
    found = vectors.reshape(-1, vectors.shape[-1]) @ matrix.T
    return found.reshape(*vectors.shape[:-1], len(matrix))


@lru_cache(maxsize=_MATRICES)
def _matrix(
    seed: int, checkpoint_id: str, place: int, side: str, rows: int, width: int
) -> np.ndarray:
    """Returns a matrix of random entries ±1/√rows, shape [rows, width], float32, read-only."""
    text = json.dumps([seed, checkpoint_id, place, side])
    digest = hashlib.sha256(text.encode()).digest()
    # The raw bits: unlike what Generator makes of them, NumPy promises that they stay the same
    # (NEP 19), and stores outlive its releases.
    philox = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    words = philox.random_raw(-(-rows * width // 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), count=rows * width, bitorder="little")
    scale = np.float32(1 / np.sqrt(rows))
    matrix = bits.astype(np.float32).reshape(rows, width)
    matrix *= 2 * scale
    matrix -= scale
    matrix.flags.writeable = False
    return matrix
