"""Models from a user's own function, ``package.module:function``."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from autopar.errors import SpecError, suggestion


def build_python(name: str, kwargs: Mapping[str, Any], *, meta: bool, dtype: torch.dtype | None = None) -> nn.Module:
    """Call the function (under `torch.device("meta")` if ``meta``) for its module; SpecError where that fails."""
    function = find_function(name)
    try:
        with torch.device("meta") if meta else contextlib.nullcontext():
            built = function(**kwargs)
    except Exception as error:
        where = " (it was called on the meta device, where tensors have no values)" if meta else ""
        raise SpecError(f"model: {name} raised {type(error).__name__}: {_short(error)}{where}") from error
    if not isinstance(built, nn.Module):
        raise SpecError(f"model: {name} returned a {type(built).__name__}, not a torch.nn.Module")
    return built if dtype is None else built.to(dtype)


def find_function(name: str) -> Callable[..., Any]:
    """The function that ``package.module:function`` names; modules of the current folder are found too."""
    path, _, attribute = name.partition(":")
    module = _import(path, name)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = [n for n in dir(found) if callable(getattr(found, n)) and not n.startswith("_")]
            raise SpecError(f"model: the module '{path}' has no function '{attribute}'{suggestion(part, known)}")
        found = getattr(found, part)
    if not callable(found):
        raise SpecError(f"model: {name} is a {type(found).__name__}, not a function")
    return found


def batch_function(name: str) -> Callable[..., Any] | None:
    """``example_batch(sequences, length)`` of the builder: its attribute of that name, or its module's function."""
    function = find_function(name)
    own = getattr(function, "example_batch", None) or getattr(
        sys.modules[name.partition(":")[0]], "example_batch", None
    )
    return own if callable(own) else None


def _import(path: str, name: str) -> Any:
    with _current_folder():
        try:
            return importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name is not None and (path == error.name or path.startswith(f"{error.name}.")):
                raise SpecError(
                    f"model: there is no module '{error.name}' for {name}; is its package installed?"
                ) from None
            raise SpecError(f"model: importing '{path}' failed: {_short(error)}") from error
        except Exception as error:
            raise SpecError(f"model: importing '{path}' raised {type(error).__name__}: {_short(error)}") from error


@contextlib.contextmanager
def _current_folder():
    """The current folder at the end of the import path: an installed command does not have it there."""
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.append(here)
    try:
        yield
    finally:
        if added:
            sys.path.remove(here)


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}…"
