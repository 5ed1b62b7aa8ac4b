"""EfficientNet-Lite0 on photographs: exactness against automatic differentiation, and speed.

    .venv/bin/python benchmarks/efficientnet.py MODEL.keras PHOTOGRAPHS WORK_DIR

MODEL.keras is an ImageNet classifier, 4.7 million parameters, that takes 224 x 224 images of 0 to
255 and ends with logits. PHOTOGRAPHS is a directory of 1,000 JPEG files, one for each class, whose
names sort in the order of the classes. The model stands for three checkpoints of a run: it is
loaded three times, and each is computed. Influence among 20 x 20 photographs is compared with
gradients of the last layer that TensorFlow differentiates, materialised, in float64.
"""

import json
import shutil
from pathlib import Path

import numpy as np
from measure import bare_forward, load_models, parser, report_options, run_forward, spec, tracin

CHECKPOINTS = 3
PAIRS = 20
BATCH_SIZE = 32


def main() -> None:
    """Prepares, runs, compares and prints."""
    options = parser(__doc__, "model", "photographs", "work").parse_args()
    if options.forward_only:
        with np.load(options.work / "train.npz") as data:
            run_forward(lambda: load_models(options.work / "run"), data["images"], BATCH_SIZE)
        return
    prepare(options.model, options.photographs, options.work)
    arguments = [str(options.model), str(options.photographs), str(options.work)]
    common = ["--checkpoints", str(options.work / "run"), "--checkpoint-weights", "equal"]
    report_speed(arguments, options.work, common)
    expected = _automatic(options.work)
    report_options(
        options.work, common, options.work / "few.npz", expected, ["", "--precision float64"]
    )


def prepare(model: Path, photographs: Path, work: Path) -> None:
    """Writes the photographs as arrays, and the run, unless that was done before."""
    if (work / "few.npz").exists():
        return
    (work / "run").mkdir(parents=True, exist_ok=True)
    files = sorted(photographs.glob("*.JPEG"))
    images = np.stack([_centre(path) for path in files])
    ids = np.array([path.stem for path in files])
    np.savez(work / "train.npz", images=images, labels=np.arange(len(ids)), ids=ids)
    every = slice(0, len(ids), len(ids) // PAIRS)
    np.savez(
        work / "few.npz",
        images=images[every],
        labels=np.arange(len(ids))[every],
        ids=ids[every],
    )
    checkpoints = []
    for k in range(CHECKPOINTS):
        shutil.copy(model, work / "run" / f"copy-{k}.keras")
        checkpoints.append({"id": f"copy-{k}", "path": f"copy-{k}.keras", "step": k})
    document = {
        "format": 1,
        "loss": "sparse_categorical_crossentropy",
        "from_logits": True,
        "checkpoints": checkpoints,
    }
    (work / "run" / "checkpoints.json").write_text(json.dumps(document))


def report_speed(arguments: list[str], work: Path, common: list[str]) -> None:
    """Times self-influence, and bare forward passes before and after."""
    before = bare_forward(__file__, *arguments)
    examples = ["--examples", spec(work / "train.npz")]
    measured, pipeline = tracin("self-influence", work / "self-influence", *common, *examples)
    after = bare_forward(__file__, *arguments)
    forward, together, whole = ((a + b) / 2 for a, b in zip(before, after, strict=True))
    count = len(np.load(work / "train.npz")["labels"]) * CHECKPOINTS
    print(
        f"self-influence: {count / pipeline:.0f} forward passes a second, bare "
        f"{count / forward:.0f}: throughput {forward / pipeline:.2f} of bare "
        f"({together / pipeline:.2f} of two networks at a time). Whole command "
        f"{measured.seconds:.1f} s, of which {measured.seconds - pipeline:.1f} s before and after "
        f"the pipeline; bare process {whole:.1f} s. Peak memory {measured.peak / 1e9:.2f} GB",
        flush=True,
    )


def _automatic(work: Path) -> np.ndarray:
    """Returns the influence of each photograph on each, shape [PAIRS, PAIRS].

    From materialised gradients of the last layer, in float64.
    """
    import keras
    import tensorflow as tf

    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    saved = keras.saving.load_model(work / "run" / "copy-0.keras", compile=False)
    model = keras.models.clone_model(saved, clone_function=_in_float64)
    model.set_weights(saved.get_weights())
    layer = model.get_layer("logits")
    variables = [layer.kernel.value, layer.bias.value]
    data = np.load(work / "few.npz")
    gradients = []
    for image, label in zip(data["images"], data["labels"], strict=True):
        with tf.GradientTape() as tape:
            logits = model(image[None].astype(np.float64), training=False)
            loss = keras.losses.sparse_categorical_crossentropy(
                np.array([label]), logits, from_logits=True
            )
        parts = tape.gradient(loss, variables)
        gradients.append(np.concatenate([part.numpy().ravel() for part in parts]))
    matrix = np.array(gradients)
    return CHECKPOINTS * matrix @ matrix.T


def _in_float64(layer: object) -> object:
    config = layer.get_config()
    config["dtype"] = "float64"
    return type(layer).from_config(config)


def _centre(path: Path) -> np.ndarray:
    """Returns the middle of a photograph, its shorter side 256 pixels, as 224 x 224 x 3 uint8."""
    from PIL import Image

    image = Image.open(path).convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BILINEAR)
    left, top = ((side - 224) // 2 for side in image.size)
    return np.asarray(image.crop((left, top, left + 224, top + 224)))


if __name__ == "__main__":
    main()
