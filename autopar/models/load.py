"""A job's model as an `nn.Module`, from whichever source it names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from autopar.errors import SpecError
from autopar.models.decoder import Decoder, decoder
from autopar.spec.model import DecoderSpec
from autopar.spec.origin import ModelOrigin, read_origin
from autopar.spec.source import Source

DRAWN = (nn.init.normal_, nn.init.uniform_, torch.Tensor.normal_, torch.Tensor.uniform_)
ModelSource = DecoderSpec | ModelOrigin | Mapping[str, Any] | str


def build(model: ModelSource, *, meta: bool, dtype: torch.dtype | None = None, seed: int = 0) -> nn.Module:
    """The module of a spec, a model's name in `specs/models/`, or any `model:` entry of a job, in training mode.

    ``meta``: on the meta device, no weights are allocated or read. Otherwise weights come from the checkpoint where the
    source is one, else from the module's own initialization under ``seed``. ``dtype``: of all floating tensors
    (default: what the source says). Nothing is downloaded. Raises SpecError for what the user can mend.
    """
    with _seeded(seed):
        if isinstance(model, DecoderSpec):
            return _decoder(model, meta, dtype)
        found = origin(model)
        if found.weights is not None and not meta:
            from autopar.models.checkpoint import read_checkpoint

            return read_checkpoint(found.weights).to(dtype or torch.get_default_dtype())
        if found.decoder is not None:
            return _decoder(found.decoder, meta, dtype)
        if found.hf is not None:
            from autopar.models.huggingface import build_huggingface

            return build_huggingface(found.hf, found.config, meta=meta, dtype=dtype)
        from autopar.models.python import build_python

        return build_python(str(found.python), found.kwargs, meta=meta, dtype=dtype)


def origin(model: ModelOrigin | Mapping[str, Any] | str) -> ModelOrigin:
    """The origin of a model given by name or as a `model:` entry; SpecError where it is neither."""
    if isinstance(model, ModelOrigin):
        return model
    if not isinstance(model, (str, Mapping)):
        raise SpecError(f"model must be a name, a mapping or a DecoderSpec, not a {type(model).__name__}")
    return read_origin(Source(model if isinstance(model, str) else dict(model), "model"))


def _decoder(spec: DecoderSpec, meta: bool, dtype: torch.dtype | None) -> Decoder:
    with contextlib.ExitStack() as on:
        if meta:
            on.enter_context(torch.device("meta"))
            on.enter_context(Unfilled())
        made = decoder(spec)
    return made if dtype is None else made.to(dtype)


class Unfilled(TorchFunctionMode):
    """Leaves out drawing first values for meta tensors, which have none: it is most of the time of making a deep model."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DRAWN:
            filled = args[0] if args else kwargs["tensor"]
            if filled.is_meta:
                return filled
        return func(*args, **kwargs)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Torch's default generator at ``seed`` inside, as it was outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
