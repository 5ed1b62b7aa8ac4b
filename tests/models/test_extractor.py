import keras
import numpy as np
import pytest

from tests.models.conftest import SPARSE, batch_of, conv_model, image_batch, save_series
from tests.models.reference import assert_factors, example_gradients, load_model
from tracin_transforms.core.checkpoints import Checkpoint, CheckpointSeries
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.losses import LOSSES, LossFormula, categorical_focal_crossentropy
from tracin_transforms.models import layer_factors
from tracin_transforms.models.extractor import KerasFactorExtractor

ONE_HOT = "categorical_crossentropy"
ENDS = [("linear", True), ("dense softmax", False), ("softmax layer", False)]
ENDS.append(("activation layer", False))


@pytest.mark.parametrize(("end", "from_logits"), ENDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("loss", [SPARSE, ONE_HOT])
def test_factors_equal_float64_automatic_differentiation(tmp_path, end, from_logits, bias, loss):
    models = [conv_model(end, bias) for _ in range(2)]
    series = save_series(tmp_path, models, loss, from_logits)
    batch = image_batch(one_hot=loss == ONE_HOT)
    block = KerasFactorExtractor(series, batch_size=16).load().extract(batch)

    function = getattr(keras.losses, loss)
    for checkpoint, gradient in zip(series.checkpoints, block.gradients, strict=True):
        exact = load_model(checkpoint, exact=True)
        layer = gradient.layers[0]
        assert layer.has_bias == bias
        kernel, *biases = example_gradients(
            exact,
            batch,
            exact.get_layer("logits").trainable_variables,
            lambda t, y: function(t, y, from_logits=from_logits),
        )
        assert_factors(layer, kernel.transpose(0, 2, 1), *biases)


def test_losses_labels_and_predictions_are_those_of_keras(tmp_path):
    model = conv_model()
    series = save_series(tmp_path, [conv_model(), model])
    batch = image_batch()
    block = KerasFactorExtractor(series).load().extract(batch)
    logits = model.predict(batch.inputs, verbose=0)
    losses = keras.losses.sparse_categorical_crossentropy(batch.targets, logits, from_logits=True)

    assert block.labels.tolist() == batch.targets.tolist()
    assert block.predictions[:, 1].tolist() == logits.argmax(axis=1).tolist()
    np.testing.assert_allclose(block.losses[:, 1], losses, rtol=1e-5)
    assert block.checkpoint_ids == ("epoch-0", "epoch-1")


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_batch_size_does_not_matter(tmp_path, batch_size):
    series = save_series(tmp_path, [conv_model()])
    batch = image_batch()
    whole = (
        KerasFactorExtractor(series, batch_size=1000).load().extract(batch).gradients[0].layers[0]
    )
    parts = (
        KerasFactorExtractor(series, batch_size=batch_size)
        .load()
        .extract(batch)
        .gradients[0]
        .layers[0]
    )

    np.testing.assert_allclose(parts.activations, whole.activations, atol=1e-6)
    np.testing.assert_allclose(parts.error_signals, whole.error_signals, atol=1e-6)


def test_float64_agrees_and_is_exact_to_the_last_digit_stored(tmp_path):
    series = save_series(tmp_path, [conv_model()])
    batch = image_batch()
    single = KerasFactorExtractor(series).load().extract(batch).gradients[0].layers[0]
    double = KerasFactorExtractor(series, float64=True).load().extract(batch).gradients[0].layers[0]
    logits = load_model(series.checkpoints[0], exact=True).predict(batch.inputs, verbose=0)
    assert logits.dtype == np.float64
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)

    np.testing.assert_allclose(single.error_signals, double.error_signals, atol=1e-6)
    expected = probabilities - np.eye(5)[batch.targets]
    np.testing.assert_allclose(double.error_signals, expected, rtol=2e-7)


def test_integer_images_are_cast_as_keras_does(tmp_path):
    series = save_series(tmp_path, [conv_model()])
    images = np.random.default_rng(0).integers(0, 9, (10, 6, 6, 2)).astype(np.uint8)
    targets = np.zeros(10, int)
    extractor = KerasFactorExtractor(series).load()
    integer = extractor.extract(batch_of(images, targets))
    floating = extractor.extract(batch_of(images.astype(np.float32), targets))

    np.testing.assert_array_equal(integer.losses, floating.losses)


def _functional(*tail):
    source = keras.Input((3,))
    x = keras.layers.Dense(4, activation="relu")(source)
    for layer in tail:
        x = layer(x)
    return keras.Model(source, x)


def _two_outputs():
    source = keras.Input((3,))
    return keras.Model(source, [keras.layers.Dense(5, name=name)(source) for name in "ab"])


@pytest.mark.parametrize(
    ("model", "from_logits", "message"),
    [
        (
            lambda: keras.Sequential([keras.Input((3,)), keras.layers.ReLU()]),
            True,
            "the model has no Dense or EinsumDense layer",
        ),
        (
            _two_outputs,
            True,
            "has the outputs 'a', 'b': name the one whose loss counts.*--model-output",
        ),
        (lambda: conv_model("linear"), False, "no softmax at its end.*takes probabilities"),
        (lambda: conv_model("dense softmax"), True, "a softmax at its end.*takes logits"),
        (lambda: conv_model("linear"), None, "'from_logits' of loss .* is missing"),
    ],
)
def test_models_that_are_not_supported_are_refused(tmp_path, model, from_logits, message):
    series = save_series(tmp_path, [model()], from_logits=from_logits)
    with pytest.raises(InputError, match=message):
        KerasFactorExtractor(series).load()


def test_files_that_are_not_models_are_refused(tmp_path):
    lambda_model = _functional(keras.layers.Lambda(lambda x: x * 2), keras.layers.Dense(5))
    series = save_series(tmp_path, [lambda_model])
    with pytest.raises(InputError, match="'epoch-0'.*a Lambda layer.*--allow-unsafe-model"):
        KerasFactorExtractor(series).load()
    path = tmp_path / "text.keras"
    path.write_text("not a model")
    series = CheckpointSeries((Checkpoint("bad", str(path), 0.1, 1),), SPARSE, True)
    with pytest.raises(InputError, match=r"checkpoint 'bad': '.*text.keras' cannot be loaded"):
        KerasFactorExtractor(series).load()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"inputs": np.zeros((4, 6, 6), np.float32)},
            r"takes inputs of shape \(6, 6, 2\), the examples have \(6, 6\)",
        ),
        (
            {"targets": np.array([0, 1, 2, 5])},
            "example 'z003' of shard 'shard-0': label 5 is out of range",
        ),
        (
            {"targets": np.array([0, 1, -2, 4])},
            "example 'z002' of shard 'shard-0': label -2 is out of range",
        ),
        ({"targets": np.zeros(4)}, "labels have shape"),
    ],
)
def test_examples_that_do_not_fit_are_named(tmp_path, change, message):
    extractor = KerasFactorExtractor(save_series(tmp_path, [conv_model()])).load()
    fields = {"inputs": np.zeros((4, 6, 6, 2), np.float32), "targets": np.arange(4), **change}
    with pytest.raises(InputError, match=message):
        extractor.extract(batch_of(**fields))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_inputs_are_named(tmp_path, value):
    extractor = KerasFactorExtractor(save_series(tmp_path, [conv_model()])).load()
    batch = image_batch(5)
    batch.inputs[3, 2, 2, 1] = value
    with pytest.raises(InputError, match="example 'z003' of .*: has a NaN or infinite"):
        extractor.extract(batch)


def test_weights_that_diverged_name_the_checkpoint(tmp_path):
    model = conv_model()
    model.get_layer("logits").kernel.assign(np.full((7, 5), np.nan))
    extractor = KerasFactorExtractor(save_series(tmp_path, [conv_model(), model])).load()
    with pytest.raises(
        InputError, match="example 'z000' has a non-finite .* at checkpoint 'epoch-1'"
    ):
        extractor.extract(image_batch(5))


@pytest.mark.parametrize("float64", [False, True])
@pytest.mark.parametrize(("end", "from_logits"), ENDS)
def test_confidently_wrong_examples_pass_the_check(tmp_path, end, from_logits, float64):
    """Their label's probability is below what Keras clips where it does not see the logits."""
    model = conv_model(end)
    kernel = model.get_layer("logits").kernel
    kernel.assign(100 * kernel)
    series = save_series(tmp_path, [model], from_logits=from_logits)
    block = KerasFactorExtractor(series, float64=float64).load().extract(image_batch())
    assert block.losses.max() > 50


@pytest.mark.parametrize("wrong", ["another loss", "other activations"])
def test_a_wrong_factor_is_noticed(tmp_path, monkeypatch, wrong):
    """The check compares with what Keras computes for the whole model."""
    if wrong == "another loss":
        formula = LossFormula(categorical_focal_crossentropy, "index", "softmax")
        monkeypatch.setitem(LOSSES, SPARSE, formula)
    else:
        joined = layer_factors._joined

        def doubled(*arguments):
            h, e = joined(*arguments)
            return 2 * h, e

        monkeypatch.setattr(layer_factors, "_joined", doubled)
    extractor = KerasFactorExtractor(save_series(tmp_path, [conv_model()])).load()
    with pytest.raises(InputError, match=r"factored gradients of layer .* differ from automatic"):
        extractor.extract(image_batch())


def test_checkpoints_of_different_models_are_refused(tmp_path):
    other = keras.Sequential(
        [keras.Input((6, 6, 2)), keras.layers.Flatten(), keras.layers.Dense(4)]
    )
    extractor = KerasFactorExtractor(save_series(tmp_path, [conv_model(), other])).load()
    with pytest.raises(InputError, match=r"different shapes: \[\(4,\), \(5,\)\]"):
        extractor.extract(image_batch())


def test_classes_that_are_not_known_are_named(tmp_path):
    class Unknown(keras.layers.Layer):
        pass

    layers = [keras.Input((3,)), Unknown(), keras.layers.Dense(5)]
    series = save_series(tmp_path, [keras.Sequential(layers)])
    with pytest.raises(InputError, match="Could not locate class 'Unknown'.*--import"):
        KerasFactorExtractor(series).load()


def test_batch_sizes_below_one_are_refused(tmp_path):
    with pytest.raises(InputError, match="batch size is 0"):
        KerasFactorExtractor(save_series(tmp_path, [conv_model()]), batch_size=0)
