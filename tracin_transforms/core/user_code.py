"""Modules and functions of the user's own, named on the command line."""

import functools
import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from tracin_transforms.core.errors import InputError


def load_module(name: str, what: str) -> ModuleType:
    """Returns a module by its name; the current directory counts as a place of modules.

    Args:
        name: As Python imports it.
        what: What it is, for the message.

    Raises:
        InputError: There is no such module.
    """
    # As `python -m` does, and the console script does not.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"{what} {name!r} cannot be imported: {error}; expected a module that Python finds, "
            f"as from the directory {os.getcwd()!r}"
        ) from error


@functools.cache
def load_function(name: str, what: str) -> Callable[..., Any]:
    """Returns a function by its name.

    Args:
        name: As ``module:function``.
        what: What it is, for the message.

    Raises:
        InputError: It is not of that form, or there is no such module or function.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise InputError(f"{what} {name!r}: expected module:function, as in mymodule:myfunction")
    function = getattr(load_module(module_name, what), function_name, None)
    if not callable(function):
        raise InputError(
            f"{what} {name!r}: module {module_name!r} has no function {function_name!r}"
        )
    return function
