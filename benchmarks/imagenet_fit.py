"""Fits an ImageNet-shaped generator to photographs, and compares its rows with them.

    .venv/bin/python benchmarks/imagenet_fit.py DATA_DIR WORK_DIR

DATA_DIR holds efficientnet_lite0.keras and imagenet_sample/, 1,000 photographs, one of each class.
The generator is fitted to the network's last layer on them, once, and saved in WORK_DIR; loading it
takes no TensorFlow.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
from imagenet_latent import CLASSES, WIDTH, Photographs
from imagenet_shape import (
    ACCURACIES,
    CHECKPOINTS,
    FILE,
    PIECE,
    SAME_CLASS,
    ImageNetShape,
    Knobs,
    to_error_signals,
)
from measure import parser
from threadpoolctl import threadpool_limits

_QUANTILES = (1, 10, 25, 50, 75, 90, 99)
_SPEED_PIECES = 10


def main() -> None:
    """Fits the generator unless that was done, and prints tables."""
    options = parser(__doc__, "data", "work").parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    shape = fitted(options.data, options.work)
    report(shape)
    report_speed(shape)


def fitted(data: Path, work: Path) -> ImageNetShape:
    """Returns the generator that is saved in `work`; first fits it, if none is."""
    if not (work / FILE).exists():
        fit(Photographs.computed(data)).save(work)
    return ImageNetShape.load(work)


def fit(photographs: Photographs) -> ImageNetShape:
    """Returns the generator whose rows at the last checkpoint are most as the photographs."""
    from scipy.optimize import minimize

    shape = ImageNetShape(photographs, Knobs())
    names = [field.name for field in fields(Knobs) if field.name != "behind"]
    wanted = _features(_of_photographs(photographs))

    def distance(logs: np.ndarray) -> float:
        tried = shape.with_knobs(replace(Knobs(), **dict(zip(names, np.exp(logs), strict=True))))
        found = _features(_of_rows(tried, 1000, 2))
        return float(np.sum((found - wanted) ** 2)) + 10 * max(0.0, logs[0] + 0.01) ** 2

    start = np.log([getattr(shape.knobs, name) for name in names])
    simplex = start + 0.15 * np.eye(len(names) + 1, len(names), k=-1)
    options = {"maxfev": 400, "adaptive": True, "fatol": 1e-3, "initial_simplex": simplex}
    found = minimize(distance, start, method="Nelder-Mead", options=options)
    knobs = replace(Knobs(), **dict(zip(names, np.exp(found.x).tolist(), strict=True)))
    print(f"fitted to {found.fun:.3f} after {found.nfev} trials", flush=True)
    behind = [_behind(shape.with_knobs(knobs), accuracy) for accuracy in ACCURACIES[:-1]]
    return shape.with_knobs(replace(knobs, behind=(*behind, 0.0)))


def _behind(shape: ImageNetShape, accuracy: float) -> float:
    """Returns how much less the pull is at a checkpoint that has an accuracy."""
    low, high = 0.0, 8.0
    for _ in range(8):
        middle = (low + high) / 2
        tried = shape.with_knobs(replace(shape.knobs, behind=(middle,)))
        rows = tried.rows(4096, (2, 0), checkpoints=(0,))
        better = (rows.predictions[:, 0] == rows.labels).mean() > accuracy
        low, high = (middle, high) if better else (low, middle)
    return middle


def _of_photographs(photographs: Photographs) -> dict[str, np.ndarray]:
    labels = np.arange(CLASSES)
    signals = photographs.logits.copy()
    predictions, losses = to_error_signals(signals, labels)
    found = statistics(photographs.activations, signals, predictions, losses, labels)
    found["cosine, same class"] = np.full(1, SAME_CLASS)
    return found


def _of_rows(shape: ImageNetShape, n: int, checkpoint: int) -> dict[str, np.ndarray]:
    rows = shape.rows(n, (3, 0), checkpoints=(checkpoint,))
    return statistics(
        rows.activations[0],
        rows.error_signals[0],
        rows.predictions[:, 0],
        rows.losses[:, 0],
        rows.labels,
    )


def statistics(
    activations: np.ndarray,
    signals: np.ndarray,
    predictions: np.ndarray,
    losses: np.ndarray,
    labels: np.ndarray,
) -> dict[str, np.ndarray]:
    """Returns samples of the quantities that are compared, by their names.

    Args:
        activations: Shape [n, d].
        signals: Error signals, shape [n, CLASSES].
        predictions: Shape [n].
        losses: Shape [n].
        labels: Shape [n].
    """
    norms = np.linalg.norm(activations, axis=1)
    squares = -np.partition(-(signals**2), 8, axis=1)[:, :9]
    squares = -np.sort(-squares, axis=1)
    whole = (signals**2).sum(axis=1)
    wrong = signals.copy()
    wrong[np.arange(len(labels)), labels] = 0
    wrong = -np.sort(-np.partition(wrong, CLASSES - 20, axis=1)[:, -20:], axis=1)
    mass = -signals[np.arange(len(labels)), labels]
    units = activations / norms[:, None]
    cosines = units @ units.T
    upper = np.triu(np.ones(cosines.shape, bool), 1)
    same = labels[:, None] == labels
    rms = np.sqrt(np.mean(norms**2) / activations.shape[1])
    return {
        "p of the label": np.exp(-losses),
        "‖e‖": np.sqrt(whole),
        "‖h‖": norms,
        **{f"share of ‖e‖² in {k}": squares[:, :k].sum(axis=1) / whole for k in (1, 2, 8)},
        **{f"wrong p in {k}": wrong[:, :k].sum(axis=1) / mass for k in (1, 5, 20)},
        "entries of h / rms": activations.ravel()[::7] / rms,
        "cosine, other class": cosines[upper & ~same],
        "cosine, same class": cosines[upper & same],
        "accuracy": np.full(1, (predictions == labels).mean()),
    }


def _features(found: dict[str, np.ndarray]) -> np.ndarray:
    """Returns numbers whose squared distance says how alike two sets of statistics are."""
    parts = []
    for name, values in found.items():
        if name in ("cosine, same class", "accuracy"):
            parts.append(np.array([20 * np.mean(values)]))
            continue
        q = np.percentile(values, _QUANTILES).clip(1e-6)
        if name.startswith(("p of", "share", "wrong")):
            parts.append(0.5 * np.log(q / (1 - q).clip(1e-5)))
        elif name == "cosine, other class":
            parts.append(5 * q)
        elif name == "‖e‖":
            parts.append(np.log(q))
        elif name == "‖h‖":
            parts.append(6 * np.log(q))
    # Few photographs tell the outermost quantiles.
    for part in parts:
        part[[0, -1]] *= 0.5 if len(part) > 1 else 1.0
    return np.concatenate(parts)


def report(shape: ImageNetShape) -> None:
    """Prints quantiles of the photographs, and of rows at each checkpoint."""
    print(shape.knobs)
    sources = {"photographs": _of_photographs(shape.photographs)}
    sources |= {name: _of_rows(shape, 5000, k) for k, name in enumerate(CHECKPOINTS)}
    print(f"{'':32}" + "".join(f"{q:>8} %" for q in _QUANTILES))
    for what in sources["photographs"]:
        for i, (name, found) in enumerate(sources.items()):
            values = found[what]
            if len(values) > 1:
                text = "".join(f"{v:10.4f}" for v in np.percentile(values, _QUANTILES))
            else:
                text = f"{values[0]:10.4f}" + (" assumed" if "same" in what and not i else "")
            print(f"{what if not i else '':20}{name:12}{text}")


def report_speed(shape: ImageNetShape) -> None:
    """Prints how fast rows are made, beside bare matrix products in as many threads."""
    a, b = (np.ones(s, np.float32) for s in ((PIECE, WIDTH), (WIDTH, CLASSES)))
    seconds = bare = 0.0
    for i in range(_SPEED_PIECES):
        start = time.perf_counter()
        shape.rows(4 * PIECE, (4, 0), first=4 * i)
        seconds += time.perf_counter() - start
        start = time.perf_counter()
        with threadpool_limits(1), ThreadPoolExecutor() as pool:
            list(pool.map(lambda _: a @ b, range(4 * len(CHECKPOINTS))))
        bare += time.perf_counter() - start
    rows = 4 * PIECE * _SPEED_PIECES
    flop = 2 * rows * len(CHECKPOINTS) * WIDTH * CLASSES
    print(
        f"{rows / seconds:,.0f} rows/s of {len(CHECKPOINTS)} checkpoints in {os.cpu_count()} "
        f"threads; bare products of the logits alone {rows / bare:,.0f} rows/s "
        f"({flop / bare / 1e9:,.0f} GFLOP/s), load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
