"""One `FactorBlock` in one file: how the queries' gradient factors travel to the workers."""

import numpy as np

from tracin_transforms.core.factors import FactorBlock, GradientFactors, LayerFactors
from tracin_transforms.storage.files import AnyPath, written_atomically


def write_factor_block(path: AnyPath, block: FactorBlock) -> None:
    """Writes a block as an uncompressed NumPy archive, all arrays in their own dtype."""
    arrays: dict[str, np.ndarray] = {
        "shard": np.array(block.shard),
        "indices": block.indices,
        "example_ids": block.example_ids,
        "labels": block.labels,
        "predictions": block.predictions,
        "losses": block.losses,
        "checkpoint_ids": np.array(block.checkpoint_ids),
        # Shape [K, layers]: Keras may name the same layer otherwise in another session.
        "layer_names": np.array([[layer.name for layer in g.layers] for g in block.gradients]),
        "has_bias": np.array([[layer.has_bias for layer in g.layers] for g in block.gradients]),
        "groups": np.array([[layer.groups for layer in g.layers] for g in block.gradients]),
    }
    for k, gradient in enumerate(block.gradients):
        for i, layer in enumerate(gradient.layers):
            arrays[f"activations_{k}_{i}"] = layer.activations
            arrays[f"error_signals_{k}_{i}"] = layer.error_signals
    with written_atomically(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_factor_block(path: AnyPath) -> FactorBlock:
    """Returns the block that `write_factor_block` wrote."""
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        names, has_bias, groups = (arrays[name] for name in ("layer_names", "has_bias", "groups"))
        return FactorBlock(
            shard=str(arrays["shard"]),
            indices=arrays["indices"],
            example_ids=arrays["example_ids"],
            labels=arrays["labels"],
            predictions=arrays["predictions"],
            losses=arrays["losses"],
            gradients=tuple(
                GradientFactors(
                    checkpoint_id=str(checkpoint_id),
                    layers=tuple(
                        LayerFactors(
                            name=str(names[k, i]),
                            activations=arrays[f"activations_{k}_{i}"],
                            error_signals=arrays[f"error_signals_{k}_{i}"],
                            has_bias=bool(has_bias[k, i]),
                            groups=int(groups[k, i]),
                        )
                        for i in range(names.shape[1])
                    ),
                )
                for k, checkpoint_id in enumerate(arrays["checkpoint_ids"])
            ),
        )
