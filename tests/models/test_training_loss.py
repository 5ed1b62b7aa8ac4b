"""Every loss, on every kind of end, against automatic differentiation by Keras alone."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.core.test_losses import ALL, random_case
from tests.models.conftest import batch_of
from tests.models.reference import example_gradients, kernels_and_biases, load_model
from tracin_transforms.core.checkpoints import Checkpoint, CheckpointSeries
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.losses import LOSSES
from tracin_transforms.core.targets import target_rows
from tracin_transforms.models.batch_size import BatchSize
from tracin_transforms.models.extractor import KerasFactorExtractor
from tracin_transforms.models.factor_function import FactorFunction, Targets
from tracin_transforms.models.training_loss import (
    TrainingLoss,
    loss_of_model,
    loss_of_series,
)

# The usual end of a model with the loss, and others that the loss takes too.
ENDS = {"poisson": ["exponential", "softplus"], "kl_divergence": ["softmax", "sigmoid"]}
OTHERS = ["mean_squared_logarithmic_error", "mean_absolute_percentage_error"]


def _cases():
    for name in [*ALL, *OTHERS]:
        end = LOSSES[name].end if name in LOSSES else None
        if end:
            yield from [(name, "linear", True), (name, end, False), (name, f"{end} layer", False)]
        else:
            for activation in ENDS.get(name, ["linear", "tanh"]):
                yield name, activation, None


def _model(end, bias, dtype="float32"):
    keras.utils.set_random_seed(1)
    layers = keras.layers
    last, more = ("linear", [end.split()[0]]) if "layer" in end else (end, [])
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(6, "tanh", use_bias=bias, dtype=dtype, name="hidden"),
            layers.Dense(5, last, use_bias=bias, name="outputs", dtype=dtype),
            *[layers.Activation(name, dtype=dtype) for name in more],
        ]
    )
    for variable in model.weights:
        variable.assign(variable + 0.3 * keras.random.normal(variable.shape, seed=2))
    return model


def _save(model, path, name, from_logits=None, options=None):
    model.save(path / "model.keras")
    checkpoint = Checkpoint("a", str(path / "model.keras"), 0.1, 1)
    return CheckpointSeries((checkpoint,), name, from_logits, loss_options=options or {})


def _batch(name, n=12):
    targets = random_case(name, n)[1] if name in LOSSES else random_case("huber", n)[1]
    inputs = np.random.default_rng(3).standard_normal((n, 4)).astype(np.float32)
    return batch_of(inputs, targets + 2 if name in OTHERS else targets)


def _differences(series, batch, reference, choice="last", float64=False):
    """Differences of gradients' entries from automatic differentiation, relative to the largest.

    The reference is Keras's model, in float64 or as it is.
    """
    block = KerasFactorExtractor(series, choice, float64=float64).load().extract(batch)
    options = {} if series.from_logits is None else {"from_logits": series.from_logits}
    options |= series.loss_options
    function = getattr(keras.losses, series.loss)
    names = ["hidden", "outputs"] if choice == "all-dense" else ["outputs"]
    assert [layer.name for layer in block.gradients[0].layers] == names
    found = []
    for layer in block.gradients[0].layers:
        kernel, *bias = example_gradients(
            reference,
            batch,
            reference.get_layer(layer.name).trainable_variables,
            lambda t, y: function(t, _wide(y), **options),
        )
        kernels, biases = kernels_and_biases(layer)
        expected = kernel.transpose(0, 2, 1).reshape(len(batch), -1)
        kernels = kernels.reshape(len(batch), -1)
        assert layer.has_bias == bool(bias)
        if bias:
            expected, kernels = np.hstack([expected, bias[0]]), np.hstack([kernels, biases])
        found.append(((kernels - expected) / np.abs(expected).max()).ravel())
    return np.concatenate(found)


def _wide(outputs):
    """Keras gives outputs to a loss in float32, or wider; and looks for logits on them."""
    if outputs.dtype != "bfloat16":
        return outputs
    wide = tf.cast(outputs, "float32")
    if hasattr(outputs, "_keras_logits"):
        wide._keras_logits = tf.cast(outputs._keras_logits, "float32")
    return wide


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("name", "end", "from_logits"), list(_cases()))
def test_factors_equal_float64_automatic_differentiation(tmp_path, name, end, from_logits, bias):
    series = _save(_model(end, bias), tmp_path, name, from_logits)
    exact = load_model(series.checkpoints[0], exact=True)
    for choice in ("last", "all-dense"):
        assert np.abs(_differences(series, _batch(name), exact, choice)).max() < 1e-5
    assert np.abs(_differences(series, _batch(name), exact, float64=True)).max() < 2e-7


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", [*ALL, *OTHERS])
def test_factors_of_bfloat16_are_the_models_own(tmp_path, name, bias):
    """Keras rounds signals and gradients to bfloat16 (1/256) at every step; factors do not.

    The largest differences are those of two or three such roundings. All together are far less.
    """
    _, end, from_logits = next(case for case in _cases() if case[0] == name)
    series = _save(_model(end, bias, "mixed_bfloat16"), tmp_path, name, from_logits)
    model = load_model(series.checkpoints[0])
    for choice in ("last", "all-dense"):
        differences = _differences(series, _batch(name), model, choice)
        assert np.sqrt(np.mean(differences**2)) < 2e-3
        assert np.abs(differences).max() < 1.2e-2


@pytest.mark.parametrize("name", ALL)
def test_factors_of_mixed_precision_are_exact_from_the_loss_on(name):
    """The error signals are those of Keras's loss, in float64, at the model's own outputs."""
    options = {"from_logits": True} if LOSSES[name].end else {}
    loss = TrainingLoss(name, options.get("from_logits"), {})
    end = ENDS.get(name, ["linear"])[0]
    batch = _batch(name)
    targets = target_rows(LOSSES[name].targets, batch.targets, (len(batch), 5))
    model = _model(end, True, "mixed_bfloat16")
    values = [variable.value for variable in model.variables]
    function = FactorFunction(model, loss, "m")
    weights = np.ones(len(batch))
    labels = Targets(LOSSES[name].targets, batch.targets, targets, weights)
    found = function(values, batch.inputs, labels, BatchSize(7))
    compiled = function.compiled(batch.inputs, labels).function
    outputs = compiled(tf.constant(batch.inputs), *labels.tensors(), values)[1]
    with tf.GradientTape() as tape:
        tape.watch(outputs)
        losses = getattr(keras.losses, name)(tf.constant(batch.targets), outputs, **options)
    expected = tape.gradient(losses, outputs).numpy()

    np.testing.assert_allclose(found.losses, losses, rtol=1e-6)
    if end == "linear":
        largest = np.abs(expected).max()
        assert np.abs(found.layers[0].error_signals - expected).max() < 1e-6 * largest


@pytest.mark.parametrize(
    ("loss", "name", "from_logits", "options"),
    [
        ("mse", "mean_squared_error", None, {}),
        (keras.losses.Huber(delta=0.3), "huber", None, {"delta": 0.3}),
        (
            keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1),
            "categorical_crossentropy",
            True,
            {"label_smoothing": 0.1},
        ),
        (
            keras.losses.BinaryFocalCrossentropy(gamma=1.5, apply_class_balancing=True),
            "binary_focal_crossentropy",
            False,
            {"gamma": 1.5, "apply_class_balancing": True},
        ),
        (
            keras.losses.SparseCategoricalCrossentropy(ignore_class=3),
            "sparse_categorical_crossentropy",
            False,
            {"ignore_class": 3},
        ),
    ],
)
def test_options_are_recorded_and_used(tmp_path, loss, name, from_logits, options):
    end = LOSSES[name].end if from_logits is False else "linear"
    model = _model(end or "linear", True)
    model.compile(loss=loss)
    found = loss_of_model(model)
    assert (found.name, found.from_logits, found.options) == (name, from_logits, options)

    series = _save(model, tmp_path, found.name, found.from_logits, found.options)
    exact = load_model(series.checkpoints[0], exact=True)
    assert np.abs(_differences(series, _batch(name), exact)).max() < 1e-5


@pytest.mark.parametrize(
    ("name", "from_logits", "options", "message"),
    [
        ("nonsense", None, {}, "loss 'nonsense' is unknown"),
        ("huber", None, {"gamma": 1}, "loss 'huber' has no option 'gamma'"),
        ("huber", True, {}, "loss 'huber' has no such option"),
        ("dice", None, {}, "gives one number for a batch"),
    ],
)
def test_losses_that_cannot_be_used(tmp_path, name, from_logits, options, message):
    series = _save(_model("sigmoid", True), tmp_path, name, from_logits, options)
    batch = _batch("binary_crossentropy")
    with pytest.raises(InputError, match=message):
        KerasFactorExtractor(series).load().extract(batch)


def test_formulas_are_the_same_in_a_compiled_call():
    for name in ALL:
        formula = LOSSES[name]
        y, targets = random_case(name)
        rows = target_rows(formula.targets, targets, y.shape)
        compiled = tf.function(formula.formula.__get__(keras.ops))
        for a, b in zip(formula.formula(np, y, rows), compiled(y, rows), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_the_series_names_the_function():
    series = CheckpointSeries((Checkpoint("a", "a.keras", 0.1, 1),), "mse", None)
    assert loss_of_series(series).name == "mean_squared_error"
