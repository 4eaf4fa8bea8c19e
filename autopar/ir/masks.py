"""Which tokens a token sees, for Hugging Face models that take it as a four-dimensional ``attention_mask`` only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autopar.errors import TraceError

KEYS = ("document_ids", "prefix_length")


def masked(model: nn.Module, given: Mapping[str, Any], takes: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` with `document_ids` (batch, length) and `prefix_length` (batch,) put into one `attention_mask`.

    Only for models of transformers that do not take them by these names; TraceError where such a model's layers make
    something else of a mask than which keys are seen.
    """
    config = getattr(model, "config", None)
    named = [k for k in KEYS if k in given and k not in takes]
    if not named or config is None or "attention_mask" not in takes:
        return dict(given)
    _check(model, config, takes, named)
    seen = visible(given["input_ids"], given.get("document_ids"), given.get("prefix_length"))
    padding = given.get("attention_mask")
    if padding is not None:
        seen = seen & padding.to(torch.bool)[:, None, None, :]
    if config._attn_implementation == "eager":  # which adds the mask to the scores
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        seen = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return {k: v for k, v in given.items() if k not in named} | {"attention_mask": seen}


def visible(ids: Tensor, documents: Tensor | None, prefix: Tensor | None) -> Tensor:
    """Whether a query (dim 2) sees a key (dim 3): bool (batch, 1, length, length).

    It sees itself and what comes before it, and every key below its row's ``prefix`` (batch,); of these, keys of its own
    document alone where ``documents`` (batch, length) are given.
    """
    places = torch.arange(ids.shape[1], device=ids.device)
    seen = (places[None, :] <= places[:, None])[None, None]
    if prefix is not None:
        seen = seen | (places[None, :] < prefix[:, None])[:, None, None, :]
    if documents is not None:
        seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
    return seen.expand(ids.shape[0], 1, -1, -1)


def _check(model: nn.Module, config: Any, takes: Mapping[str, Any], named: list[str]) -> None:
    kind, asked = type(model).__name__, " and ".join(named)
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention"} or (not kinds and getattr(config, "sliding_window", None)):
        what = ", ".join(sorted(kinds - {"full_attention"})) or "sliding windows"
        raise TraceError(f"{kind} has layers with other masks ({what}), so it cannot take {asked} from outside")
    if "position_ids" not in takes or getattr(config, "alibi", False):
        raise TraceError(
            f"{kind} makes its position biases from its attention mask, so it cannot take {asked} from outside; "
            "a declared model (model: {family: …}) can"
        )
