"""`tracin store`: what a factor store holds, and whether it is whole."""

import argparse
import sys
from collections.abc import Sequence

from tracin_transforms.core.errors import InputError
from tracin_transforms.storage.factor_store import FactorStore
from tracin_transforms.storage.sidecar import Sidecar
from tracin_transforms.storage.store_check import problems
from tracin_transforms.storage.store_description import StoreDescription


def run(options: argparse.Namespace, beam_args: Sequence[str] = ()) -> str:
    """Describes or verifies a store, and returns the text for the user.

    Raises:
        InputError: There is no store, or it is not whole.
    """
    store = FactorStore.open(options.directory)
    return _verify(store) if options.action == "verify" else _info(store)


def _verify(store: FactorStore) -> str:
    found = []
    for problem in problems(store):
        found.append(problem)
        print(problem, file=sys.stderr)
    if found:
        raise InputError(f"store {str(store.directory)!r} has {len(found)} problem(s), see above")
    shards = len(store.description.shards)
    return f"{store.directory} is whole: {shards} shards, every byte as it was written."


def _info(store: FactorStore) -> str:
    description = store.description
    stored = store.stored()
    examples = sum(sidecar.count for sidecar in stored.values())
    skipped = sum(len(sidecar.bad) for sidecar in stored.values())
    size = sum(sidecar.file.size for sidecar in stored.values())
    factors = description.factors
    missing = store.missing(description.checkpoint_ids, stored)
    lines = [
        f"Factor store {store.directory}",
        f"  examples     {examples:,} in {len(stored)} of {len(description.shards)} shards"
        + (f", {skipped:,} more could not be used" if skipped else ""),
        f"  size         {size / 1e6:,.1f} MB, {factors['dtype']}",
        f"  loss         {factors['loss']}",
        f"  layers       {factors['layers']}: {_layers(stored)}",
        *_sketch(description),
        f"  examples of  {factors['examples'].get('kind', '?')}",
        f"  {'checkpoint':<24}  {'step':>8}  {'learning rate':>13}  shards missing",
    ]
    for checkpoint in description.checkpoints:
        rate = checkpoint["learning_rate"]
        lines.append(
            f"  {checkpoint['id']:<24}  {checkpoint['step']:>8}  "
            f"{'unknown' if rate is None else format(rate, '.4g'):>13}  "
            f"{len(missing[checkpoint['id']]) or 'none'}"
        )
    if any(missing.values()):
        lines.append("Run the same 'tracin extract' again to fill it.")
    return "\n".join(lines)


def _sketch(description: StoreDescription) -> list[str]:
    sketch = description.sketch
    if sketch is None:
        return []
    return [f"  sketch       {sketch}: at most {sketch.numbers:,} numbers of each layer"]


def _layers(stored: dict[str, Sidecar]) -> str:
    """Returns the layers' names and widths, as a complete shard has them."""
    layouts = [sidecar.layout for sidecar in stored.values() if sidecar.layout.layers]
    if not layouts:
        return "not known yet"
    layout = layouts[0]
    first = layout.of_checkpoints(layout.checkpoint_ids[:1])
    return ", ".join(
        f"{layer.name} ({layer.error_signals[-1]} x {layer.activations[-1]})"
        for layer in first.layers
    )


if __name__ == "__main__":
    from pipelines.cli import main

    sys.exit(main(["store", *sys.argv[1:]]))
