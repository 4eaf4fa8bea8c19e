"""Configs of Hugging Face models as DecoderSpecs, and back, by the tables of their families."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from autopar.errors import CheckpointError, SpecError
from autopar.spec.family import Setting, families, load_family, reader_of
from autopar.spec.model import DecoderSpec, merge, resolve

CONFIG = "config.json"
SIZES = ("layers", "hidden", "heads", "vocab")
"""What a config must tell: no family has a default for them."""
ROPE = {  # our field of `rope.scaling` → the reference's key in `rope_parameters`
    "factor": "factor",
    "original_length": "original_max_position_embeddings",
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "truncate": "truncate",
}
SCALINGS = {  # the reference's `rope_type`s, which are the names of our parts → the fields that each reads
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "original_length", "low_frequency_factor", "high_frequency_factor"),
    "yarn": ("factor", "original_length", "beta_fast", "beta_slow", "attention_factor", "truncate"),
}


def read_spec(path: str | Path) -> DecoderSpec:
    """The spec of a checkpoint: a folder with config.json, or a GGUF file. CheckpointError where no family reads it."""
    path = Path(path).expanduser()
    return read_config(config_of(path), str(path))


def config_of(path: Path) -> dict[str, Any]:
    """The Hugging Face config of a checkpoint's folder or of a GGUF file."""
    if path.suffix == ".gguf":
        return _gguf_config(path)
    file = path / CONFIG
    if not file.is_file():
        raise CheckpointError(f"{path}: no {CONFIG}, so this is no Hugging Face checkpoint")
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from None
    return config


def _gguf_config(path: Path) -> dict[str, Any]:
    try:
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    except ImportError as error:
        raise SpecError("model: a GGUF file needs transformers and gguf: pip install 'autopar[hf]'") from error
    try:
        config: dict[str, Any] = load_gguf_checkpoint(str(path))["config"]
    except Exception as error:  # whatever it raises for a broken file
        raise CheckpointError(f"{path}: cannot be read as GGUF: {' '.join(str(error).split())[:300]}") from error
    return config


def read_config(config: Mapping[str, Any], where: str) -> DecoderSpec:
    """The spec of a Hugging Face config (the content of config.json).

    CheckpointError where no family reads its model type, a size is missing, or it asks for what no part does.
    """
    kind = str(config.get("model_type"))
    name = reader_of(kind)
    if name is None:
        known = sorted(t for f in families() for t in load_family(f).reads)
        raise CheckpointError(f"{where}: no family reads the model type '{kind}' (read here: {', '.join(known)})")
    family = load_family(name)
    fields: dict[str, Any] = {"family": name}
    for path, setting in family.config.items():
        found, value = _find(config, setting.keys)
        if found:
            _put(fields, path, _translated(setting, value))
    for rule in family.when:
        if all((config.get(key) or False) == value for key, value in rule.config.items()):
            fields = merge(fields, rule.set)
    for refused in family.refuses:
        if all(_find(config, [key]) == (True, value) for key, value in refused.items()):
            asked = " and ".join(f"{key}: {str(value).lower()}" for key, value in refused.items())
            raise CheckpointError(f"{where}: a {kind} with {asked} computes what no part of family '{name}' does")
    missing = [f"{path} ({' or '.join(family.config[path].keys)})" for path in SIZES if _get(fields, path) is None]
    if missing:
        raise CheckpointError(f"{where}: the config tells no {', '.join(missing)}")
    if fields.get("positions", family.defaults["positions"]) == "rope":
        _read_rope(config, fields, where)
    return _settled(resolve(fields, where))


def write_config(spec: DecoderSpec) -> dict[str, Any]:
    """The Hugging Face config of a spec. CheckpointError where its family's model type cannot express the spec."""
    family = load_family(spec.family)
    if not family.reads:
        raise CheckpointError(
            f"family '{spec.family}': no model type of transformers is its like, so there is no config"
        )
    dumped = spec.model_dump()
    dumped["window_pattern"] = spec.window_pattern if spec.window is not None else (False,)
    config: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.reads[0]}
    for path, setting in family.config.items():
        value = _get(dumped, path)
        if setting.keys and value is not None:
            _put(config, setting.keys[0], _untranslated(setting, value, spec.layers))
    for rule in family.when:
        if _holds(dumped, rule.set, spec):
            config |= rule.config
    if spec.positions == "rope":
        config["rope_parameters"] = _write_rope(spec)
    back = read_config(config, "config")
    differing = [k for k, v in _comparable(back).items() if v != _comparable(spec)[k]]
    if differing:
        kinds = ", ".join(family.reads)
        raise CheckpointError(f"a model of type {kinds} cannot have this {', '.join(differing)}, so there is no config")
    return config


# ------------------------------------------------------------------ values


def _find(config: Mapping[str, Any], keys: Iterable[str]) -> tuple[bool, Any]:
    for key in keys:
        here: Any = config
        for part in key.split("."):
            here = here.get(part) if isinstance(here, Mapping) else None
        if here is not None:
            return True, here
    return False, None


def _translated(setting: Setting, value: Any) -> Any:
    if isinstance(value, list):
        return [_translated(setting, v) for v in value]
    if setting.power != 1:
        return float(value) ** setting.power
    return setting.values.get(value, value) if isinstance(value, str) else value


def _untranslated(setting: Setting, value: Any, layers: int) -> Any:
    if isinstance(value, (list, tuple)):
        return [_untranslated(setting, value[i % len(value)], layers) for i in range(layers)]
    if setting.power != 1:
        exact = float(value) ** (1 / setting.power)
        return round(exact) if math.isclose(exact, round(exact), rel_tol=1e-12) else exact
    return next((key for key, ours in setting.values.items() if ours == value and type(ours) is type(value)), value)


def _get(fields: Mapping[str, Any], path: str) -> Any:
    return _find(fields, [path])[1]


def _put(fields: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for part in parents:
        fields = fields.setdefault(part, {})
    fields[last] = value


def _settled(spec: DecoderSpec) -> DecoderSpec:
    """The window's pattern in its shortest form."""
    pattern = spec.window_pattern if spec.window is not None else (True,)
    for period in range(1, len(pattern) + 1):
        if all(pattern[i] == pattern[i % period] for i in range(len(pattern))):
            return spec.model_copy(update={"window_pattern": pattern[:period]})
    return spec


def _holds(dumped: Mapping[str, Any], wanted: Mapping[str, Any], spec: DecoderSpec) -> bool:
    """Whether a spec has these fields; an empty kv_heads stands for heads."""
    for key, value in wanted.items():
        own = dumped.get(key)
        if isinstance(value, Mapping):
            if not isinstance(own, Mapping) or not _holds(own, value, spec):
                return False
        elif own != (spec.heads if value is None and key == "kv_heads" else value):
            return False
    return True


def _comparable(spec: DecoderSpec) -> dict[str, Any]:
    """What a model computes: without words, without what training adds."""
    told = {"family", "tokenizer", "byte_fallback", "dropout", "initializer", "z_loss", "embedding_gradient"}
    return _settled(spec).model_dump(exclude=told)


# ------------------------------------------------------------------ rotary positions


def _read_rope(config: Mapping[str, Any], fields: dict[str, Any], where: str) -> None:
    """`rope_parameters`, or `rope_theta`, `rotary_pct` and `rope_scaling` of older configs."""
    told = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    rope: dict[str, Any] = {}
    theta = told.get("rope_theta", config.get("rope_theta", config.get("rotary_emb_base")))
    fraction = told.get("partial_rotary_factor", config.get("partial_rotary_factor", config.get("rotary_pct")))
    rope |= {"theta": theta} if theta is not None else {}
    rope |= {"fraction": fraction} if fraction is not None else {}
    kind = told.get("rope_type", told.get("type", "default"))
    if kind not in ("default", None):
        if kind not in SCALINGS:
            raise CheckpointError(f"{where}: rope_type '{kind}' is not known (known: {', '.join(SCALINGS)})")
        scaling = {ours: told[ROPE[ours]] for ours in SCALINGS[kind] if told.get(ROPE[ours]) is not None}
        if {"mscale", "mscale_all_dim"} & told.keys():
            raise CheckpointError(f"{where}: rope_parameters.mscale is not known; give attention_factor")
        rope["scaling"] = {"kind": kind, **scaling}
    if rope:
        fields["rope"] = rope


def _write_rope(spec: DecoderSpec) -> dict[str, Any]:
    rope = spec.rope
    made: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.fraction != 1:
        made["partial_rotary_factor"] = rope.fraction
    if rope.scaling is None:
        return made
    made["rope_type"] = rope.scaling.kind
    values = rope.scaling.model_dump()
    values["original_length"] = values["original_length"] or spec.max_length
    return made | {ROPE[name]: values[name] for name in SCALINGS[rope.scaling.kind] if values[name] is not None}
