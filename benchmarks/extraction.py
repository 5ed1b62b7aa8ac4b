"""Where the time of an extraction goes, step by step, without Beam.

    .venv/bin/python benchmarks/extraction.py RUN SPEC [--layers LAYERS]

RUN and SPEC are what `tracin self-influence` takes. The steps run one after the other here; a
pipeline extracts the next block while it scores one.
"""

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
BLOCK_ROWS = 2048


def main() -> None:
    """Runs the steps over all examples, and prints the seconds of each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run")
    parser.add_argument("spec")
    parser.add_argument("--layers", default="last")
    options = parser.parse_args()
    seconds: dict[str, float] = {}
    with timed("imports", seconds):
        from tracin_transforms import KerasFactorExtractor, read_checkpoint_series, self_influence
        from tracin_transforms.examples.spec import parse_spec
    series, source = read_checkpoint_series(options.run), parse_spec(options.spec)
    weights = series.weights("recorded")
    with timed("loading the checkpoints", seconds):
        extractor = KerasFactorExtractor(series, options.layers).load()
    rows = extractor.block_rows(BLOCK_ROWS)
    with timed("first batch: tracing, batch size, gradient check", seconds):
        shards = source.shards()
        extractor.extract(next(source.read(shards[0], rows)).rows(slice(0, 64)))
    for shard in shards:
        batches = source.read(shard, rows)
        while True:
            with timed("reading", seconds):
                batch = next(batches, None)
            if batch is None:
                break
            with timed("networks and factors", seconds):
                block = extractor.extract(batch)
            with timed("self-influence", seconds):
                self_influence(block, weights)
    count = sum(shard.count for shard in shards)
    print(f"{count:,} examples at {len(weights)} checkpoints, layers: {options.layers}")
    for step, value in seconds.items():
        print(f"  {value:6.2f} s  {step}")


@contextmanager
def timed(step: str, seconds: dict[str, float]) -> Iterator[None]:
    """Adds what the block takes to the seconds of a step."""
    start = time.perf_counter()
    yield
    seconds[step] = seconds.get(step, 0.0) + time.perf_counter() - start


if __name__ == "__main__":
    main()
