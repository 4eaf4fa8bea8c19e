"""What is traced: a model and its objective as one function from a batch to ``(loss_sum, count)``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from autopar.errors import TraceError
from autopar.ir.masks import masked

IGNORED = -100
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
Loss = Callable[[Any, Mapping[str, Any]], Any]


def named_batch(model: nn.Module, batch: Any) -> dict[str, Any]:
    """A batch as keyword arguments of ``model.forward``; a tensor or a tuple is taken as its positional arguments."""
    if isinstance(batch, Mapping):
        return dict(batch)
    values = batch if isinstance(batch, (tuple, list)) else (batch,)
    names = [
        n
        for n, p in inspect.signature(model.forward).parameters.items()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(values) > len(names):
        raise TraceError(f"the batch has {len(values)} positional values, {type(model).__name__}.forward takes {names}")
    return dict(zip(names, values, strict=False))


class SymbolLostError(Exception):
    """A size that is a symbol in one tensor is a number in another: the model turned it into one."""


class Objective(nn.Module):
    """``forward(batch) -> (loss_sum, count)``.

    Without ``loss``, a batch with ``labels`` gets cross-entropy, ignoring −100: next-token for a decoder (labels
    (batch, sequence) shifted here), as they stand for classes (batch,), encoders trained on masked tokens and
    encoder-decoders. A user's ``loss(output, batch)`` returns ``(loss_sum, count)``, or a scalar mean over sequences.
    """

    def __init__(self, model: nn.Module, loss: Loss | None = None) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.model(**self.arguments(batch))
        if self.loss is not None:
            return summed(self.loss(output, batch), batch)
        if self.own_loss(batch) and is_loss(output):
            return summed(output, batch)
        if "labels" in batch:
            return self.cross_entropy(logits_of(output), batch["labels"])
        if isinstance(output, torch.Tensor) and output.dim() == 0:
            return summed(output, batch)
        raise TraceError(
            f"no objective: {type(self.model).__name__} returns no scalar and the batch has no 'labels'; "
            "add labels to the batch or pass loss="
        )

    def arguments(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch as the model takes it: labels kept back unless it builds its decoder inputs from them."""
        parameters = inspect.signature(self.model.forward).parameters
        given = {k: v for k, v in batch.items() if k != "labels" or self.decodes_labels(batch) or self.own_loss(batch)}
        if self.loss is not None:
            given = {k: v for k, v in batch.items() if k in parameters} if not takes_any(parameters) else dict(batch)
        given = masked(self.model, given, parameters)
        lacking = [k for k, p in parameters.items() if k not in given and p.default is p.empty and p.kind in NAMED]
        if lacking:
            raise TraceError(
                f"the batch lacks {lacking[0]!r}, which {type(self.model).__name__}.forward needs; it has {', '.join(batch)}"
            )
        unknown = [k for k in given if k not in parameters]
        if unknown and not takes_any(parameters):
            raise TraceError(
                f"{type(self.model).__name__}.forward takes no {unknown[0]!r}; it takes {', '.join(parameters)}"
            )
        if "use_cache" in parameters and "use_cache" not in batch:
            given["use_cache"] = False  # training needs no key-value cache, and its loss is the same without
        return given

    def own_loss(self, batch: dict[str, Any]) -> bool:
        """Whether a module of the user's own takes the labels itself; transformers' means are never right for parts."""
        takes = "labels" in inspect.signature(self.model.forward).parameters
        return "labels" in batch and takes and getattr(self.model, "config", None) is None

    def decodes_labels(self, batch: dict[str, Any]) -> bool:
        return bool(self.config("is_encoder_decoder")) and "decoder_input_ids" not in batch

    def config(self, key: str) -> Any:
        return getattr(getattr(self.model, "config", None), key, None)  # a foreign object: Hugging Face or none

    def shifts(self, labels: torch.Tensor) -> bool:
        """Whether position i predicts label i + 1: decoders do, encoders and encoder-decoders do not."""
        masked = any(isinstance(a, str) and "MaskedLM" in a for a in (type(self.model).__name__,))
        return labels.dim() == 2 and not masked and not self.config("is_encoder_decoder")

    def cross_entropy(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if logits.dim() != labels.dim() + 1 or differ(tuple(labels.shape), tuple(logits.shape[:-1])):
            symbols = any(not isinstance(n, int) for n in (*labels.shape, *logits.shape))
            kind = SymbolLostError if symbols else TraceError  # with sizes as numbers they may fit
            raise kind(
                f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}; pass loss="
            )
        if self.shifts(labels):
            labels = F.pad(labels[..., 1:], (0, 1), value=IGNORED)
        loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum", ignore_index=IGNORED)
        return loss, (labels != IGNORED).sum()


def differ(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether two shapes cannot be equal; sizes that are symbols only of the same or a plain size are compared as such."""
    return any(
        isinstance(x, int) != isinstance(y, int) or (isinstance(x, int) and x != y) for x, y in zip(a, b, strict=True)
    )


def is_loss(output: Any) -> bool:
    """Whether a module that takes its labels returned a scalar mean or ``(loss_sum, count)``."""
    parts = output if isinstance(output, tuple) and len(output) == 2 else (output,)
    return all(isinstance(part, torch.Tensor) and part.dim() == 0 for part in parts)


def takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def logits_of(output: Any) -> torch.Tensor:
    """The logits of a tensor, a Hugging Face output, a mapping or a tuple."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if isinstance(output, (tuple, list)) and isinstance(output[0], torch.Tensor):
        return output[0]
    raise TraceError(f"no logits in a {type(output).__name__}; pass loss=")


def summed(value: Any, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """``(loss_sum, count)`` from what a loss returned; a scalar is the mean over the batch's sequences."""
    if isinstance(value, (tuple, list)) and len(value) == 2:
        count = value[1]  # a number is a size of the batch, or constant
        return value[0], count if isinstance(count, torch.Tensor) else torch.full((), count, device=value[0].device)
    if isinstance(value, torch.Tensor) and value.dim() == 0:
        first = next(v for v in batch.values() if isinstance(v, torch.Tensor) and v.dim() > 0)
        size = torch.ones_like(first.select(-1, 0) if first.dim() > 1 else first, dtype=torch.int64)
        count = size.flatten(1).select(1, 0).sum() if size.dim() > 1 else size.sum()
        return value * count, count
    raise TraceError(f"a loss returns (loss_sum, count) or a scalar mean, not {type(value).__name__}")
