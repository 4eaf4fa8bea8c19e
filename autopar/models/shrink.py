"""The same architecture in sizes that a proof on this machine's processor can afford."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from autopar.errors import SpecError
from autopar.models.load import ModelSource, origin
from autopar.spec.model import DecoderSpec, Experts
from autopar.spec.origin import ModelOrigin

LAYERS = 5  # odd: no pipeline of two or four stages divides it
HEADS = 4
HEAD_DIM = 16  # halves, and halves of halves, for rotary positions on parts of a head
VOCAB = 256
LENGTH = 512
SMALL_HIDDEN = 160  # models up to this width keep their widths
EXPERTS = 4

_LAYERS = ("num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
_HEADS = ("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_FFN = ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff")
_EXPERT_FFN = ("moe_intermediate_size", "shared_expert_intermediate_size")
_CAPS = {
    "vocab_size": VOCAB,
    "max_position_embeddings": LENGTH,
    "num_local_experts": EXPERTS,
    "num_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": EXPERTS // 2,
    "n_group": 1,
    "topk_group": 1,
    "sliding_window": 8,
    "image_size": 64,
}
_LATENT = {  # multi-head latent attention (DeepSeek-V2)
    "q_lora_rank": 24,
    "kv_lora_rank": HEAD_DIM,
    "qk_nope_head_dim": HEAD_DIM,
    "qk_rope_head_dim": HEAD_DIM // 2,
    "v_head_dim": HEAD_DIM,
}


def shrink(model: ModelSource) -> ModelOrigin:
    """A source of the same architecture with few layers (an odd number), narrow, and with a small vocabulary.

    Which of 2 and 4 divide the head counts stays as it is, so does the number of queries a key serves up to 4, and
    whether the vocabulary is odd. Dropout is off: a proof compares numbers. Sizes that are small already stay, and a
    Python builder's source comes back as it is. A checkpoint becomes its type and config: its weights would not fit.
    """
    if isinstance(model, DecoderSpec):
        return ModelOrigin(declared=_declared(model).model_dump())
    found = origin(model)
    if found.decoder is not None:
        return ModelOrigin(declared=_declared(found.decoder).model_dump())
    if found.hf is None:
        return found
    return _huggingface(found.hf, found.config)


def _declared(spec: DecoderSpec) -> DecoderSpec:
    sizes: dict[str, Any] = {"layers": min(spec.layers, LAYERS), "vocab": _vocab(spec.vocab)}
    sizes |= {"max_length": min(spec.max_length, LENGTH), "dropout": {}}
    if spec.hidden > SMALL_HIDDEN:
        heads, kv_heads = _heads(spec.heads, spec.kv_heads)
        hidden = heads * HEAD_DIM
        ffn = _ffn(spec.ffn, spec.hidden, hidden)
        if spec.moe is not None:
            sizes["moe"] = _experts(spec.moe, spec.hidden, hidden)
        sizes |= {"heads": heads, "kv_heads": kv_heads, "head_dim": HEAD_DIM, "hidden": hidden, "ffn": ffn}
    return DecoderSpec.model_validate(spec.model_dump() | sizes)


def _experts(moe: Experts, hidden: int, small: int) -> dict[str, Any]:
    """Few experts, each about the same multiple of hidden."""
    sizes = {
        "experts": min(moe.experts, EXPERTS),
        "top": min(moe.top, EXPERTS // 2),
        "dense_layers": min(moe.dense_layers, 1),
    }
    inner = {key: _ffn(size, hidden, small) for key, size in (("ffn", moe.ffn), ("shared", moe.shared)) if size}
    return moe.model_dump() | sizes | inner


def _huggingface(name: str, given: Mapping[str, Any] | None) -> ModelOrigin:
    from autopar.models.huggingface import read_config

    config = read_config(name, given)
    own = dict(given) if given is not None else config.to_diff_dict()
    for key in ("model_type", "transformers_version", "architectures"):
        own.pop(key, None)
    return ModelOrigin(hf=config.model_type, config=_config(config, own))


def _config(config: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The given options with small sizes over them, under the names that the config's type uses."""
    layers = _read(config, "num_hidden_layers")
    if not isinstance(_read(config, "hidden_size"), int) or not isinstance(layers, int):
        raise SpecError(
            f"model: a '{config.model_type}' has no hidden_size and num_hidden_layers, so it cannot be shrunk; "
            "give it small sizes yourself and use --no-shrink"
        )
    small = {key: min(size, LAYERS) for key in _LAYERS if isinstance(size := _read(config, key), int)}
    for key, cap in _CAPS.items():
        size = _read(config, key)
        if isinstance(size, int) and size > cap:
            small[key] = _vocab(size) if key == "vocab_size" else cap
    small |= _widths(config) | _token_ids(config, small.get("vocab_size"))
    small |= {
        key: 0.0 for key, p in config.to_dict().items() if isinstance(p, float) and ("dropout" in key or "pdrop" in key)
    }
    # what lists the layers one by one is cut to their number
    kept = {k: v[:LAYERS] if isinstance(v, list) and len(v) == layers else v for k, v in given.items()}
    names = config.attribute_map
    kept = {k: v for k, v in kept.items() if not ({k, names.get(k)} & {names.get(s, s) for s in small})}
    return kept | {names.get(key, key): value for key, value in small.items()}


def _widths(config: Any) -> dict[str, int]:
    hidden = _read(config, "hidden_size")
    heads = _read(config, "num_attention_heads")
    if hidden <= SMALL_HIDDEN or not isinstance(heads, int):
        return {}
    kv = next((n for key in _KV_HEADS if isinstance(n := _read(config, key), int)), heads)
    few, few_kv = _heads(heads, kv)
    small = {key: few for key in _HEADS if isinstance(_read(config, key), int)}
    small |= {key: few_kv for key in _KV_HEADS if isinstance(_read(config, key), int)}
    small |= _head_dims(config, hidden // heads)
    for key in (*_FFN, *_EXPERT_FFN):
        if isinstance(size := _read(config, key), int):
            small[key] = _ffn(size, hidden, few * HEAD_DIM)
    return small | {"hidden_size": few * HEAD_DIM}


def _head_dims(config: Any, head_dim: int) -> dict[str, int]:
    """Sizes inside a head, of those that are options of the type."""
    stored = {*config.to_dict(), *config.attribute_map}
    small = {key: size for key, size in _LATENT.items() if isinstance(_read(config, key), int)}
    if "head_dim" in stored and isinstance(_read(config, "head_dim"), int):
        small["head_dim"] = small.get("qk_rope_head_dim", HEAD_DIM)
    if "rotary_dim" in stored and isinstance(rotated := _read(config, "rotary_dim"), int):
        small["rotary_dim"] = max(2, HEAD_DIM * rotated // head_dim // 2 * 2)
    return small


def _token_ids(config: Any, vocab: int | None) -> dict[str, int]:
    """Special tokens past the small vocabulary become its first: the padding token is looked up in the embedding."""
    values = {key: v for key, v in config.to_dict().items() if key.endswith("_token_id") and isinstance(v, int)}
    return {key: 0 for key, token in values.items() if vocab is not None and token >= vocab}


def _read(config: Any, key: str) -> Any:
    """An option of a config of transformers under its common name, or None."""
    return getattr(config, key, None)


def _heads(heads: int, kv_heads: int) -> tuple[int, int]:
    """Few heads of each kind: their common divisors with 4, or 3 for odd numbers above 4."""
    kv, repeats = _few(kv_heads), _few(heads // kv_heads)
    if kv * repeats > 2 * HEADS and kv % 2 == 0:
        kv = 2
    return kv * repeats, kv


def _few(count: int) -> int:
    if count <= HEADS:
        return count
    divisor = math.gcd(count, HEADS)
    return divisor if divisor > 1 else 3


def _ffn(ffn: int, hidden: int, small_hidden: int) -> int:
    """About the same multiple of hidden, itself a multiple of 16."""
    return max(1, round(ffn / hidden * small_hidden / 16)) * 16


def _vocab(vocab: int) -> int:
    return vocab if vocab <= VOCAB else VOCAB - 5 * (vocab % 2)
