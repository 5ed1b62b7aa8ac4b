"""Peak memory over 60,000 and over 600,000 examples: it is bounded by blocks, not by the data.

    .venv/bin/python benchmarks/memory.py MNIST.npz WORK_DIR

WORK_DIR is that of benchmarks/mnist.py, which trains the network. MNIST, ten times over, stands for
the larger data: 470 MB of images. Two checkpoints are enough to see how memory grows.
"""

from pathlib import Path

import numpy as np
from measure import parser, spec, tracin

TIMES = (1, 10)


def main() -> None:
    """Runs both commands over the smaller and the larger data, and prints their peaks."""
    options = parser(__doc__, "mnist", "work").parse_args()
    weights = options.work / "two.json"
    weights.write_text('{"epoch-004": 1.0, "epoch-012": 1.0}')
    peaks: dict[str, list[int]] = {}
    for times in TIMES:
        train = options.work / f"times-{times}.npz"
        count = repeat(options.mnist, train, times)
        common = ["--checkpoints", str(options.work / "run"), "--examples", spec(train)]
        common += ["--checkpoint-weights", str(weights)]
        queries = ["--queries", spec(options.work / "queries.npz"), "--k", "20"]
        for job, more in (("self-influence", []), ("influence", queries)):
            measured, pipeline = tracin(job, options.work / job, *common, *more)
            peaks.setdefault(job, []).append(measured.peak)
            print(
                f"{job}, {count:,} examples: peak {measured.peak / 1e6:,.0f} MB, "
                f"{count / pipeline:,.0f} examples a second",
                flush=True,
            )
    for job, (small, large) in peaks.items():
        print(
            f"{job}: {(large - small) / 1e6:+,.0f} MB for {TIMES[-1]} times the examples, "
            f"{large / small:.2f} of the memory"
        )


def repeat(mnist: Path, train: Path, times: int) -> int:
    """Writes MNIST several times over, with ids of its own for each, and returns how many."""
    with np.load(mnist) as data:
        images, labels = data["train_images"], data["train_labels"].astype(np.int64)
    count = len(images) * times
    if not train.exists():
        np.savez(
            train,
            images=np.tile(images, (times, 1, 1)),
            labels=np.tile(labels, times),
            ids=np.array([f"mnist-{i:07d}" for i in range(count)]),
        )
    return count


if __name__ == "__main__":
    main()
