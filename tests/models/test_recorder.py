import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.protocols import ExampleBatch
from tracin_transforms.models.extractor import KerasFactorExtractor
from tracin_transforms.models.layers import candidate_layers
from tracin_transforms.models.loading import ModelLoading, load_checkpoints
from tracin_transforms.models.recorder import CheckpointRecorder
from tracin_transforms.storage.checkpoint_series import read_checkpoint_series

X = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, 4, 50)


def _model(loss=None, learning_rate=0.1, softmax=False, optimizer=None):
    keras.utils.set_random_seed(0)
    activation = "softmax" if softmax else None
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, activation)])
    model.compile(
        optimizer or keras.optimizers.SGD(learning_rate),
        loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def _fit(model, recorder, epochs=6, **kwargs):
    return model.fit(X, Y, batch_size=16, epochs=epochs, verbose=0, callbacks=[recorder], **kwargs)


def test_records_what_tracin_needs(tmp_path):
    model = _model()
    history = _fit(model, CheckpointRecorder(tmp_path / "run", every=2))
    series = read_checkpoint_series(tmp_path / "run")

    assert [c.id for c in series.checkpoints] == ["epoch-002", "epoch-004", "epoch-006"]
    assert [c.step for c in series.checkpoints] == [8, 16, 24]
    assert [c.epoch for c in series.checkpoints] == [2, 4, 6]
    assert [c.loss for c in series.checkpoints] == pytest.approx(history.history["loss"][1::2])
    np.testing.assert_allclose(series.weights("recorded"), [0.1] * 3)
    assert (series.loss, series.from_logits) == ("sparse_categorical_crossentropy", True)
    assert (series.batch_size, series.optimizer) == (16, "sgd")
    last = keras.saving.load_model(series.checkpoints[-1].path)
    np.testing.assert_array_equal(last.get_weights()[0], model.get_weights()[0])
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "checkpoints.json",
        "epoch-002.keras",
        "epoch-004.keras",
        "epoch-006.keras",
    ]


def test_records_chosen_epochs(tmp_path):
    _fit(_model(), CheckpointRecorder(tmp_path, epochs=[1, 5]))
    series = read_checkpoint_series(tmp_path)
    assert [c.id for c in series.checkpoints] == ["epoch-001", "epoch-005"]


def test_the_rate_is_that_of_the_last_step_of_a_schedule(tmp_path):
    """4 steps an epoch, rate 1/(1 + step): the 4th step is step number 3."""
    schedule = keras.optimizers.schedules.InverseTimeDecay(1.0, 1, 1.0)
    _fit(_model(learning_rate=schedule), CheckpointRecorder(tmp_path), epochs=2)
    rates = read_checkpoint_series(tmp_path).weights("recorded")
    np.testing.assert_allclose(rates, [1 / 4, 1 / 8])


@pytest.mark.parametrize("first", [True, False])
def test_the_rate_is_that_before_another_callback_lowers_it(tmp_path, first):
    recorder = CheckpointRecorder(tmp_path)
    lower = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2 if epoch else rate)

    class LowerAtTheEnd(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.optimizer.learning_rate = 1e-9

    callbacks = [lower, LowerAtTheEnd(), recorder] if first else [recorder, lower]
    _model_ = _model()
    _model_.fit(X, Y, batch_size=16, epochs=2, verbose=0, callbacks=callbacks)
    rates = read_checkpoint_series(tmp_path).weights("recorded")
    np.testing.assert_allclose(rates, [0.1, 0.5e-9] if first else [0.1, 0.05], rtol=1e-6)


@pytest.mark.parametrize(("together", "expected"), [(2, 1 / 3), (3, 1 / 4), (9, 1.0)])
def test_several_steps_in_one_execution(tmp_path, together, expected):
    """The rate is that of the first step of the last execution: 4 steps, rate 1/(1 + step)."""
    model = _model(learning_rate=keras.optimizers.schedules.InverseTimeDecay(1.0, 1, 1.0))
    model.compile(model.optimizer, model.loss, steps_per_execution=together)
    _fit(model, CheckpointRecorder(tmp_path), epochs=1)
    series = read_checkpoint_series(tmp_path)
    assert series.checkpoints[0].step == 4
    np.testing.assert_allclose(series.weights("recorded"), [expected])


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_data_that_end_early(tmp_path):
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(16)
    _model_ = _model()
    recorder = CheckpointRecorder(tmp_path)
    _model_.fit(data, epochs=1, steps_per_epoch=7, shuffle=False, verbose=0, callbacks=[recorder])
    np.testing.assert_allclose(read_checkpoint_series(tmp_path).weights("recorded"), [0.1])


@pytest.mark.parametrize("kwargs", [{}, {"initial_epoch": 2}])
def test_a_second_fit_continues_the_run(tmp_path, kwargs):
    model, recorder = _model(), CheckpointRecorder(tmp_path, every=2)
    _fit(model, recorder, epochs=2)
    model.compile(keras.optimizers.SGD(0.01), model.loss)
    _fit(model, recorder, epochs=4 if kwargs else 2, **kwargs)
    series = read_checkpoint_series(tmp_path)
    assert [(c.id, c.epoch, c.step) for c in series.checkpoints] == [
        ("epoch-002", 2, 8),
        ("epoch-004", 4, 16),
    ]
    np.testing.assert_allclose(series.weights("recorded"), [0.1, 0.01])
    first, last = (keras.saving.load_model(c.path).get_weights()[0] for c in series.checkpoints)
    assert np.abs(first - last).max() > 0
    np.testing.assert_array_equal(last, model.get_weights()[0])


def test_another_model_needs_another_recorder(tmp_path):
    recorder = CheckpointRecorder(tmp_path)
    _fit(_model(), recorder, epochs=1)
    before = (tmp_path / "checkpoints.json").read_bytes()
    with pytest.raises(InputError, match="has recorded another model"):
        _fit(_model(), recorder, epochs=1)
    assert (tmp_path / "checkpoints.json").read_bytes() == before


@pytest.mark.parametrize("kwargs", [{"every": 7}, {"epochs": [7, 9]}])
def test_a_run_without_checkpoints_is_refused(tmp_path, kwargs):
    with pytest.raises(InputError, match="ends after 6 epochs, but .* due after 7"):
        _fit(_model(), CheckpointRecorder(tmp_path, **kwargs))


def test_models_that_could_not_be_used_are_refused_before_training(tmp_path):
    with pytest.raises(InputError, match="'sequential.*': there is a softmax at its end"):
        _fit(_model(softmax=True), CheckpointRecorder(tmp_path / "run"))
    model = keras.Sequential([keras.Input((3,)), keras.layers.ReLU()])
    model.compile("sgd", "mse")
    with pytest.raises(InputError, match="'sequential.*': the model has no Dense, convol"):
        _fit(model, CheckpointRecorder(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# Keras says so whenever a data set of unknown length ends.
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_steps_of_unknown_number(tmp_path):
    """A filtered data set does not know its length."""
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(16).filter(lambda x, y: True)
    model = _model()
    model.fit(data, epochs=1, verbose=0, shuffle=False, callbacks=[CheckpointRecorder(tmp_path)])
    series = read_checkpoint_series(tmp_path)
    assert series.checkpoints[0].step == int(model.optimizer.iterations)
    np.testing.assert_allclose(series.weights("recorded"), [0.1])
    assert series.batch_size == 16


@pytest.mark.parametrize(
    ("loss", "softmax", "expected"),
    [
        ("sparse_categorical_crossentropy", True, ("sparse_categorical_crossentropy", False)),
        (keras.losses.sparse_categorical_crossentropy, True, None),
        (keras.losses.SparseCategoricalCrossentropy(), True, None),
    ],
)
def test_losses_over_probabilities(tmp_path, loss, softmax, expected):
    _fit(_model(loss, softmax=softmax), CheckpointRecorder(tmp_path), epochs=1)
    series = read_checkpoint_series(tmp_path)
    assert (series.loss, series.from_logits) == (
        expected or ("sparse_categorical_crossentropy", False)
    )


def test_other_losses_and_their_options(tmp_path):
    model = _model(keras.losses.Huber(delta=0.5))
    targets = np.random.default_rng(2).standard_normal((50, 4))
    model.fit(X, targets, epochs=1, verbose=0, callbacks=[CheckpointRecorder(tmp_path)])
    series = read_checkpoint_series(tmp_path)
    assert (series.loss, series.from_logits, series.loss_options) == ("huber", None, {"delta": 0.5})


def test_losses_that_cannot_be_recorded_are_refused_before_training(tmp_path):
    with pytest.raises(InputError, match="expected one loss"):
        _fit(_model(["mse"]), CheckpointRecorder(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_directory_with_a_run_is_refused(tmp_path):
    recorder = CheckpointRecorder(tmp_path)
    _fit(_model(), recorder, epochs=1)
    with pytest.raises(InputError, match="already holds a training run"):
        _fit(_model(), CheckpointRecorder(tmp_path))
    before = json.loads((tmp_path / "checkpoints.json").read_text())
    assert len(before["checkpoints"]) == 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"every": 0}, "every is 0: expected whole numbers"),
        ({"every": 2, "epochs": [3]}, r"every=2, epochs=\[3\]: expected one of every, epochs"),
        ({"epochs": [0]}, r"epochs is \[0\]"),
        ({"steps": []}, r"steps is \[\]"),
        ({"loss_drop": 1.5}, "loss_drop is 1.5: expected a share"),
        ({"keep": 0}, "keep is 0"),
        ({"keep": 2, "keep_by": "luck"}, "keep_by is 'luck': expected one of loss-drop"),
        ({"every_steps": 2, "keep_by": "validation-loss"}, "known after epochs only"),
    ],
)
def test_bad_arguments(tmp_path, kwargs, message):
    with pytest.raises(InputError, match=message):
        CheckpointRecorder(tmp_path, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "steps"),
    [({"every_steps": 3}, [3, 6, 9, 12]), ({"steps": [1, 5, 11]}, [1, 5, 11])],
)
@pytest.mark.parametrize("together", [1, 2])
def test_steps(tmp_path, kwargs, steps, together):
    """4 steps an epoch; where Keras takes two at a time, after the second of them."""
    model = _model(learning_rate=keras.optimizers.schedules.InverseTimeDecay(1.0, 1, 1.0))
    model.compile(model.optimizer, model.loss, steps_per_execution=together)
    weights = {}

    class Keep(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            weights[int(self.model.optimizer.iterations)] = self.model.get_weights()[0]

    recorder = CheckpointRecorder(tmp_path, **kwargs)
    model.fit(X, Y, batch_size=16, epochs=3, verbose=0, shuffle=False, callbacks=[recorder, Keep()])
    series = read_checkpoint_series(tmp_path)
    expected = [-(-step // together) * together for step in steps]
    assert [c.step for c in series.checkpoints] == expected
    assert [c.id for c in series.checkpoints] == [f"step-{step:06d}" for step in expected]
    assert {c.epoch for c in series.checkpoints} == {None}
    # The rate of the first of the steps that Keras took together.
    rates = [1 / (1 + step - together) for step in expected]
    np.testing.assert_allclose(series.weights("recorded"), rates, rtol=1e-6)
    for checkpoint in series.checkpoints:
        found = keras.saving.load_model(checkpoint.path).get_weights()[0]
        np.testing.assert_array_equal(found, weights[checkpoint.step])


@pytest.mark.parametrize("validation_data", [None, (X, (Y + 1) % 4)])
def test_the_loss_at_steps_is_the_mean_since_the_last(tmp_path, validation_data):
    """Of a model that does not learn, so that each example's loss is known."""
    model = _model(learning_rate=0.0)
    recorder = CheckpointRecorder(tmp_path, every_steps=3)
    _fit(model, recorder, epochs=2, shuffle=False, validation_data=validation_data)
    losses = keras.losses.sparse_categorical_crossentropy(Y, model(X), from_logits=True).numpy()
    batches = np.split(losses, [16, 32, 48]) * 2
    expected = [np.concatenate(batches[:3]).mean(), np.concatenate(batches[3:6]).mean()]
    series = read_checkpoint_series(tmp_path)
    np.testing.assert_allclose([c.loss for c in series.checkpoints], expected, rtol=1e-5)


def test_loss_drops(tmp_path):
    history = _fit(_model(), CheckpointRecorder(tmp_path, loss_drop=0.1), epochs=20)
    losses, expected = history.history["loss"], [0]
    for epoch, loss in enumerate(losses):
        if loss <= 0.9 * losses[expected[-1]]:
            expected.append(epoch)
    series = read_checkpoint_series(tmp_path)
    assert 1 < len(expected) < 20
    assert [c.epoch for c in series.checkpoints] == [epoch + 1 for epoch in expected]


@pytest.mark.parametrize("rule", ["evenly", "loss-drop", "validation-loss"])
def test_only_so_many_are_kept(tmp_path, rule):
    recorder = CheckpointRecorder(tmp_path, keep=3, keep_by=rule)
    history = _fit(_model(), recorder, epochs=12, validation_data=(X[:20], (Y[:20] + 1) % 4))
    series = read_checkpoint_series(tmp_path)
    epochs = [c.epoch for c in series.checkpoints]
    assert len(epochs) == 3
    validation = history.history["val_loss"]
    expected = [validation[epoch - 1] for epoch in epochs]
    assert [c.validation_loss for c in series.checkpoints] == pytest.approx(expected)
    if rule == "validation-loss":
        assert sorted(expected) == pytest.approx(sorted(validation)[:3])
    if rule == "loss-drop":
        losses = np.array(history.history["loss"])
        drops = np.minimum.accumulate(losses)[:-1] - losses[1:]
        assert epochs == sorted(np.argsort(-drops)[:3] + 2)
    if rule == "evenly":
        assert epochs[-1] == 12
        assert epochs[0] >= 3
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoints.json",
        *(f"epoch-{epoch:03d}.keras" for epoch in epochs),
    ]


@keras.saving.register_keras_serializable("tests")
class BuiltWhenCalled(keras.Model):
    def __init__(self, outputs=4, **kwargs):
        super().__init__(**kwargs)
        self.logits = keras.layers.Dense(outputs)

    def call(self, inputs):
        return self.logits(inputs)

    def get_config(self):
        return {"outputs": self.logits.units}


def test_a_subclassed_model_is_built_by_its_first_step(tmp_path):
    def fit(directory, model):
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        recorder = CheckpointRecorder(directory)
        model.fit(X, Y, batch_size=50, shuffle=False, verbose=0, callbacks=[recorder])

    fit(tmp_path / "run", BuiltWhenCalled())
    batch = ExampleBatch("shard-0", np.arange(50), np.arange(50).astype(str), X, Y)
    series = read_checkpoint_series(tmp_path / "run")
    block = KerasFactorExtractor(series, "all-dense").load().extract(batch)
    assert len(block.layer_names) == 1
    with pytest.raises(InputError, match="no Dense or EinsumDense layer"):
        candidate_layers(BuiltWhenCalled(), "all-dense")
    recurrent = keras.Sequential([keras.layers.Reshape((3, 1)), keras.layers.LSTM(4)])
    with pytest.raises(InputError, match="no Dense, convolutional or Embedding layer"):
        fit(tmp_path / "other", recurrent)


def test_validation_loss_is_asked_for_when_it_is_missing(tmp_path):
    with pytest.raises(InputError, match="epoch 1 has no validation loss: expected fit"):
        _fit(_model(), CheckpointRecorder(tmp_path, keep=2, keep_by="validation-loss"))


def test_lora_is_recorded_with_its_network(tmp_path):
    source = keras.Input((3,))
    model = keras.Model(source, keras.layers.Dense(4, name="logits")(source))
    model.get_layer("logits").enable_lora(2, lora_alpha=3)
    model.compile(
        keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    _fit(model, CheckpointRecorder(tmp_path, every=2, keep=2))
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [
        "checkpoints.json",
        *(f"epoch-{e:03d}.ckpt{end}" for e in (4, 6) for end in (".data-00000-of-00001", ".index")),
        "model.keras",
    ]
    series = read_checkpoint_series(tmp_path)
    assert series.model == str(tmp_path / "model.keras")
    last = load_checkpoints(series, ModelLoading())[-1]
    for variable, value in zip(last.model.variables, last.values, strict=True):
        own = next(v for v in model.variables if v.name == variable.name)
        np.testing.assert_array_equal(value, own)
    assert last.model.get_layer("logits").lora_alpha == 3


def test_one_output_of_several_with_its_loss(tmp_path):
    source = keras.Input((3,))
    outputs = {"kind": keras.layers.Dense(4)(source), "size": keras.layers.Dense(1)(source)}
    model = keras.Model(source, outputs)
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", {"kind": cross_entropy, "size": keras.losses.Huber(delta=0.5)})
    targets = {"kind": Y, "size": X[:, :1]}

    def fit(recorder):
        model.fit(X, targets, batch_size=16, epochs=1, verbose=0, callbacks=[recorder])

    with pytest.raises(InputError, match=r"expected one loss; name the output.*output=NAME"):
        fit(CheckpointRecorder(tmp_path / "none"))
    with pytest.raises(InputError, match="no loss of an output 'colour': expected one of"):
        fit(CheckpointRecorder(tmp_path / "none", output="colour"))
    recorder = CheckpointRecorder(tmp_path / "run", output="size", class_weights={1: 2.0})
    fit(recorder)
    series = read_checkpoint_series(tmp_path / "run")
    assert (series.output, series.loss, series.loss_options) == ("size", "huber", {"delta": 0.5})
    assert series.class_weights == {1: 2.0}


def test_losses_that_are_summed_say_so(tmp_path):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")
    _fit(_model(loss), CheckpointRecorder(tmp_path), epochs=1)
    assert read_checkpoint_series(tmp_path).loss_options == {"reduction": "sum"}


def test_a_model_without_dense_layers_can_be_recorded(tmp_path):
    model = keras.Sequential(
        [
            keras.Input((3, 1)),
            keras.layers.Conv1D(4, 2),
            keras.layers.GlobalAveragePooling1D(),
        ]
    )
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    recorder = CheckpointRecorder(tmp_path)
    model.fit(X[..., None], Y, epochs=1, verbose=0, callbacks=[recorder])
    assert len(read_checkpoint_series(tmp_path).checkpoints) == 1
