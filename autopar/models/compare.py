"""Architectures side by side: what each model is made of, and what a token costs in it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from autopar.models.load import build
from autopar.spec.model import DecoderSpec
from autopar.spec.origin import ModelOrigin, read_origin
from autopar.spec.source import Source

LENGTH = 2048
HALF = 2  # bytes of bfloat16 and float16
_CONFIG = {  # Hugging Face's spellings of one thing, the first that a config has counts
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "d_ff"),
    "vocab": ("vocab_size",),
    "activation": ("hidden_act", "activation_function", "hidden_activation"),
    "head_dim": ("head_dim",),
}


def compare_models(names: Iterable[str], length: int = LENGTH) -> list[dict[str, Any]]:
    """One row for each model, named as in a job's `model:`; FLOPs and activations for sequences of ``length``.

    ``flops_per_token``: forward and backward, attention not halved for causality. ``activation_bytes_per_token``: what
    a training step keeps of all layers in 16 bits, attention written out, nothing recomputed (None where the model is
    not declared). ``kv_cache_bytes_per_token``: keys and values of all layers in 16 bits.
    """
    return [row(read_origin(Source(name, "compare")), length) for name in names]


def row(origin: ModelOrigin, length: int) -> dict[str, Any]:
    """What one model is made of."""
    module = build(origin, meta=True)
    spec = origin.decoder
    described = _declared(spec, length) if spec is not None else _inspected(module, origin)
    counted = {
        "parameters": sum(p.numel() for p in module.parameters()),
        "flops_per_token": _flops(module, described, length),
        "activation_bytes_per_token": activation_bytes(spec, length) if spec is not None else None,
        "kv_cache_bytes_per_token": _kv_cache(described),
    }
    shown = {key: value for key, value in described.items() if not key.startswith("_")}
    return {"model": str(origin), **shown, **counted}


def _declared(spec: DecoderSpec, length: int) -> dict[str, Any]:
    positions = {
        "none": "none",
        "learned": f"learned, {spec.max_length}",
        "rope": f"rotary ({spec.rope.style}), {spec.rotary_dim} of {spec.head_dim}, theta {spec.rope.theta:g}",
        "rope_2d": f"rotary in two dimensions, theta {spec.rope.theta:g}",
        "alibi": "ALiBi",
    }
    return {
        "family": spec.family,
        "tokenizer": ", ".join(filter(None, [spec.tokenizer, f"vocabulary {spec.vocab:,}"])),
        "positions": positions[spec.positions],
        "norm": f"{spec.norm}, eps {spec.norm_eps:g}" + (" (also of embeddings)" if spec.embedding_norm else ""),
        "activation": spec.activation,
        "attention": attention(spec.heads, spec.kv_heads, spec.head_dim) + f", qkv {spec.qkv}",
        "block": spec.block,
        "biases": ", ".join(name for name, used in spec.bias.model_dump().items() if used) or "none",
        "tied": spec.tied,
        "layers": spec.layers,
        "hidden": spec.hidden,
        "ffn": spec.ffn,
        "_kv": spec.kv_heads * spec.head_dim,
        "_width": spec.heads * spec.head_dim,
    }


def _inspected(module: nn.Module, origin: ModelOrigin) -> dict[str, Any]:
    """What a Hugging Face config and the module itself tell."""
    config: Any = getattr(module, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    values = {key: _first(text, names) for key, names in _CONFIG.items()}
    heads, hidden = values["heads"], values["hidden"]
    width = values["head_dim"] or (hidden // heads if hidden and heads else None)
    kv_heads = (
        1 if getattr(text, "multi_query", False) is True and not values["kv_heads"] else values["kv_heads"] or heads
    )
    norms = {type(m).__name__ for m in module.modules() if "norm" in type(m).__name__.lower()}
    return {
        "family": getattr(text, "model_type", None) or "a Python module",
        "tokenizer": ", ".join(
            filter(None, [_tokenizer(origin), f"vocabulary {values['vocab']}" if values["vocab"] else ""])
        ),
        "positions": _positions(text),
        "norm": ", ".join(sorted(norms)) or None,
        "activation": str(values["activation"]) if values["activation"] else None,
        "attention": attention(heads, kv_heads, width) if heads and kv_heads and width else None,
        "block": None,
        "biases": None,
        "tied": bool(getattr(text, "tie_word_embeddings", False)),
        "layers": values["layers"],
        "hidden": hidden,
        "ffn": values["ffn"],
        "_kv": kv_heads * width if kv_heads and width else None,
        "_width": heads * width if heads and width else None,
    }


def attention(heads: int, kv_heads: int, head_dim: int) -> str:
    """``grouped, 32 query and 8 key-value heads of 128``."""
    if kv_heads == heads:
        return f"multi-head, {heads} heads of {head_dim}"
    kind = "multi-query" if kv_heads == 1 else "grouped"
    return f"{kind}, {heads} query and {kv_heads} key-value heads of {head_dim}"


def _positions(config: Any) -> str | None:
    if getattr(config, "alibi", False) is True:
        return "ALiBi"
    rope = getattr(config, "rope_parameters", None) or {}
    theta = rope.get("rope_theta") if isinstance(rope, dict) else None
    theta = theta or getattr(config, "rope_theta", None)
    if isinstance(theta, (int, float)):
        return f"rotary, theta {theta:g}"
    learned = getattr(config, "n_positions", None)
    return f"learned, {learned}" if learned else None


def _tokenizer(origin: ModelOrigin) -> str:
    """The class that a checkpoint's own tokenizer_config.json names."""
    import json

    file = Path(origin.hf or "").expanduser() / "tokenizer_config.json"
    if origin.config is not None or not origin.hf or not file.is_file():
        return ""
    return str(json.loads(file.read_text(encoding="utf-8")).get("tokenizer_class", ""))


def _first(config: Any, names: tuple[str, ...]) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _flops(module: nn.Module, described: dict[str, Any], length: int) -> float | None:
    """Six for every weight that multiplies a token, and attention's scores and sums: 12 · layers · width · length."""
    if described["layers"] is None or described["_width"] is None:
        return None
    used = 0.0
    for part in module.modules():
        for weight in part.parameters(recurse=False):
            if weight.dim() == 2 and not isinstance(part, nn.Embedding):
                used += weight.numel()
            elif weight.dim() == 3:
                used += weight.numel() * _active_share(module)
    return 6 * used + 12 * described["layers"] * described["_width"] * length


def _active_share(module: nn.Module) -> float:
    """The share of a mixture's experts that one token uses."""
    config: Any = getattr(module, "config", None)
    experts = _first(config, ("num_local_experts", "num_experts", "n_routed_experts"))
    chosen = _first(config, ("num_experts_per_tok",))
    return chosen / experts if experts and chosen else 1.0


def activation_bytes(spec: DecoderSpec, length: int) -> int:
    """Bytes that the backward pass needs of one token, all layers: Korthikanti et al. 2022, eq. 1, for any decoder.

    34 · hidden + 5 · heads · length for each layer of a GPT with dropout; a mask of one byte for each dropout.
    """
    width, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    norms = {"parallel": 1}.get(spec.block, 2) * HALF * spec.hidden
    inputs = (
        HALF * spec.hidden * (1 if spec.block == "parallel" else 2)
    )  # of qkv, of up; one tensor where they share it
    scores = spec.heads * length * (HALF + (1 + HALF if spec.dropout.attention else 0))
    attended = HALF * (width + 2 * kv) + scores + HALF * width
    middle = HALF * spec.ffn * (4 if spec.gated else 2)
    masks = (2 if spec.dropout.hidden else 0) * spec.hidden
    return spec.layers * (norms + inputs + attended + middle + masks)


def _kv_cache(described: dict[str, Any]) -> int | None:
    if described["layers"] is None or described["_kv"] is None:
        return None
    return 2 * HALF * described["layers"] * described["_kv"]
