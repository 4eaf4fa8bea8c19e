"""Hugging Face models that compute in float64 throughout, and their weights under our names."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Wide(TorchFunctionMode):
    """Read every float32 that code asks for explicitly (norms, rotary tables, softmax) as float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            return args[0].double()
        widen = lambda v: torch.float64 if v is torch.float32 else v  # noqa: E731
        return func(*map(widen, args), **{k: widen(v) for k, v in (kwargs or {}).items()})


def build(model_type: str, **config) -> nn.Module:
    """A causal language model of that type in float64, eager attention, weights drawn from a wide normal."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Wide():
            made = AutoConfig.for_model(model_type, **config)
            model = AutoModelForCausalLM.from_config(made, attn_implementation="eager", dtype=torch.float64)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.train()


NAMES = {
    "llama": [
        (r"model\.embed_tokens", "embedding"),
        (r"model\.layers", "blocks"),
        (r"input_layernorm", "attention_norm"),
        (r"post_attention_layernorm", "mlp_norm"),
        (r"self_attn\.(q|k|v|o)_proj", lambda m: "attention." + dict(q="query", k="key", v="value", o="output")[m[1]]),
        (r"mlp\.(gate_up|gate|up|down)_proj", r"mlp.\1"),
        (r"self_attn\.(q|k)_norm", lambda m: "attention." + dict(q="query", k="key")[m[1]] + "_norm"),
        (r"model\.norm", "norm"),
        (r"lm_head", "head"),
    ],
    "fused": [
        (r"transformer\.word_embeddings_layernorm", "embedding_norm"),
        (r"transformer\.(word_embeddings|wte)", "embedding"),
        (r"transformer\.wpe", "positions"),
        (r"transformer\.(ln_f|norm_f)", "norm"),
        (r"transformer\.(h|blocks)\.", "blocks."),
        (r"(input_layernorm|ln_attn|ln_1|norm_1)\.", "attention_norm."),
        (r"(post_attention_layernorm|ln_mlp|ln_2|norm_2)\.", "mlp_norm."),
        (r"(self_attention\.query_key_value|attn\.Wqkv|attn\.c_attn)", "attention.query_key_value"),
        (r"(self_attention\.dense|attn\.out_proj|attn\.c_proj)", "attention.output"),
        (r"(mlp\.dense_h_to_4h|ffn\.up_proj|mlp\.c_fc)", "mlp.up"),
        (r"(mlp\.dense_4h_to_h|ffn\.down_proj|mlp\.c_proj)", "mlp.down"),
        (r"lm_head", "head"),
    ],
}


def rename(tensors: dict[str, Tensor], names: str) -> dict[str, Tensor]:
    """Tensors under our names; with `names` "gpt2" also transposed (Conv1D) and q, k, v split."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for pattern, new in NAMES["llama" if names == "llama" else "fused"]:
            name = re.sub(pattern, new, name)
        found[name] = tensor.T if names == "gpt2" and name.startswith("blocks") and tensor.dim() == 2 else tensor
    return split(found) if names == "gpt2" else found


def split(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """q, k, v apart where they are one matrix, q | k | v."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if "query_key_value" not in name:
            found[name] = tensor
            continue
        for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
            found[name.replace("query_key_value", part)] = piece
    return found


def fuse(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `split`, for pieces of any size."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".attention.query." in name:
            pieces = [tensors[name.replace("query", part)] for part in ("query", "key", "value")]
            found[name.replace("query", "query_key_value")] = torch.cat(pieces)
        elif ".attention.key." not in name and ".attention.value." not in name:
            found[name] = tensor
    return found
