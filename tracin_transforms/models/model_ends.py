"""What a model takes, one array or several by name, and which of its outputs counts."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.protocols import Inputs


class ModelEnds:
    """The inputs that a model declares (a subclassed model takes any), and one output.

    Args:
        model: The model.
        what: What to call it in messages.
        output: Name of the output that counts, where it has several.
    """

    def __init__(self, model: keras.Model, what: str, output: str | None = None) -> None:
        self._model = model
        self._what = what
        self._output = output
        self._output_shapes: dict[Any, tuple[int, ...]] = {}
        # By name; a model with one input has it under the name None.
        self._declared: dict[str | None, keras.KerasTensor] = {}
        if getattr(model, "inputs", None):
            structure = input_structure(model)
            if isinstance(structure, Mapping):
                self._declared = dict(structure)
            elif len(model.inputs) == 1:
                self._declared = {None: model.inputs[0]}
            else:
                self._declared = {tensor.name: tensor for tensor in model.inputs}

    def dtypes(self, inputs: Inputs) -> dict[str | None, str]:
        """Returns the dtype that the model takes each array in."""
        found = {}
        for name, array in _by_name(inputs).items():
            if array.dtype.kind in "US":
                found[name] = "string"
            elif name in self._declared:
                found[name] = str(self._declared[name].dtype)
            else:
                is_float = array.dtype.kind == "f"
                found[name] = str(keras.backend.floatx() if is_float else array.dtype)
        return found

    def cast(self, examples: Any, dtypes: Mapping[str | None, str]) -> Any:
        """Returns tensors of examples in the dtypes that the model takes."""
        if isinstance(examples, Mapping):
            return {name: _cast(tensor, dtypes[name]) for name, tensor in examples.items()}
        return _cast(examples, dtypes[None])

    @property
    def takes_any_length(self) -> bool:
        """Whether the model declares that sizes of its inputs may differ from batch to batch."""
        return any(None in tensor.shape[1:] for tensor in self._declared.values())

    def declared_inputs(self) -> Any:
        """Returns specs of the declared inputs, or None where a shape is not declared in full."""
        tensors = self._declared.values()
        if not tensors or self.takes_any_length:
            return None
        specs = {
            name: tf.TensorSpec(tensor.shape, tensor.dtype)
            for name, tensor in self._declared.items()
        }
        return specs.get(None, specs)

    def declared_output(self) -> keras.KerasTensor:
        """Returns the output that counts, of a model that declares its inputs."""
        is_sequential = isinstance(self._model, keras.Sequential)
        return self.selected(self._model.outputs[0] if is_sequential else self._model.output)

    def output_shape(self, inputs: Inputs) -> tuple[int, ...]:
        """Returns the shape of the output for some inputs, without the examples' axis.

        Raises:
            InputError: The model does not take such inputs, or gives something else.
        """
        key = kinds(inputs)
        if key not in self._output_shapes:
            output = self.selected(self._output_spec(inputs))
            if not isinstance(output, keras.KerasTensor) or None in output.shape[1:]:
                raise InputError(
                    f"{self._what} gives {str(output):.100}: expected one output of a known shape"
                )
            self._output_shapes[key] = tuple(output.shape[1:])
        return self._output_shapes[key]

    def selected(self, outputs: Any) -> Any:
        """Returns the output that counts, of all that the model gives.

        Raises:
            InputError: There is none of that name, or several of which none is named.
        """
        names = output_names(self._model)
        if isinstance(outputs, Mapping):
            named = dict(outputs)
        elif isinstance(outputs, list | tuple):
            numbered = map(str, range(len(outputs)))
            named = dict(zip(names or numbered, outputs, strict=True))
        elif self._output is None:
            return outputs
        else:
            named = {names[0] if names else "0": outputs}
        if self._output is None and len(named) == 1:
            return next(iter(named.values()))
        if self._output in named:
            return named[self._output]
        raise InputError(
            f"{self._what} has the outputs {', '.join(map(repr, named))}"
            f"{f', none called {self._output!r}' if self._output else ''}: name the one whose "
            "loss counts, with 'output' in checkpoints.json or with --model-output"
        )

    def _output_spec(self, inputs: Inputs) -> Any:
        self._check(inputs)
        dtypes = self.dtypes(inputs)
        specs = {
            name: keras.KerasTensor((None, *array.shape[1:]), dtypes[name])
            for name, array in _by_name(inputs).items()
        }
        try:
            return self._model.compute_output_spec(specs.get(None, specs))
        # Whatever a layer raises for an input that it does not take.
        except Exception as error:
            shapes = {name: array.shape[1:] for name, array in _by_name(inputs).items()}
            reason = " ".join(str(error).split())
            raise InputError(
                f"{self._what} does not take inputs of shape {shapes.get(None, shapes)}: "
                f"{reason:.300}"
            ) from error

    def _check(self, inputs: Inputs) -> None:
        if not self._declared:
            return
        found = _by_name(inputs)
        if found.keys() != self._declared.keys():
            raise InputError(
                f"{self._what} takes {_described(self._declared)}, the examples have "
                f"{_described(found)}; name inputs as in npz:train.npz?x.NAME=ARRAY&x.OTHER=ARRAY"
            )
        for name, tensor in self._declared.items():
            wanted, shape = tuple(tensor.shape[1:]), found[name].shape[1:]
            fits = len(shape) == len(wanted) and all(
                size in (None, length) for size, length in zip(wanted, shape, strict=True)
            )
            if not fits:
                inputs_name = "inputs" if name is None else f"input {name!r}"
                raise InputError(
                    f"{self._what} takes {inputs_name} of shape {wanted}, the examples have {shape}"
                )


def input_structure(model: keras.Model) -> Any:
    """Returns the inputs that a model declares, in a list or dictionary where it has several."""
    return model.inputs[0] if isinstance(model, keras.Sequential) else model.input


def output_names(model: keras.Model) -> list[str]:
    """Returns the names of a model's outputs; a subclassed model has none."""
    if isinstance(model, keras.Sequential):
        return [layer.name for layer in model.layers[-1:]]
    return list(getattr(model, "output_names", []))


def kinds(inputs: Inputs) -> Any:
    """Returns what tells arrays apart that need a function of their own: dtypes and shapes."""
    if isinstance(inputs, Mapping):
        return tuple((name, *kinds(array)) for name, array in sorted(inputs.items()))
    is_text = inputs.dtype.kind in "US"
    return ("string" if is_text else str(inputs.dtype), inputs.shape[1:])


def _by_name(inputs: Inputs) -> Mapping[str | None, np.ndarray]:
    return dict(inputs.items()) if isinstance(inputs, Mapping) else {None: inputs}


def _cast(tensor: Any, dtype: str) -> tf.Tensor:
    return tensor if dtype == "string" else tf.cast(tensor, dtype)


def _described(arrays: Mapping[str | None, Any]) -> str:
    if None in arrays:
        return "one input without a name"
    return f"inputs named {', '.join(map(repr, arrays))}"
