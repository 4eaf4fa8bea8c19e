"""Models of Hugging Face's transformers, by type and config or from a local checkpoint. Nothing is downloaded."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autopar.errors import AutoparError, CheckpointError, SpecError, suggestion
from autopar.models.hosted_experts import EXACT
from autopar.spec.family import family_of

LEGACY = frozenset({"rope_theta", "rope_scaling", "torch_dtype", "dtype", "num_labels", "id2label", "label2id"})
"""Options that transformers still reads although no config lists them."""
MISSPELLED = 0.85
"""difflib's ratio from which an unknown option is a misspelling, not a harmless extra of an old config.json."""


def build_huggingface(
    name: str, config: Mapping[str, Any] | None, *, meta: bool, dtype: torch.dtype | None = None
) -> nn.Module:
    """The model of a type and its config (weights initialized), or of a checkpoint (weights read).

    The class is a causal language model, sequence-to-sequence, masked language model or image classifier, whichever
    transformers has for the config, else the plain model; a checkpoint's config may name its own.
    """
    made = read_config(name, config)
    options = {} if dtype is None else {"dtype": dtype}
    if config is None and not meta:
        return _pretrained(name, made, options)
    with explained(f"the config of '{name}'", config), torch.device("meta") if meta else contextlib.nullcontext():
        return _model_class(made)._from_config(made, experts_implementation=EXACT, **options).train()


def read_config(name: str, config: Mapping[str, Any] | None) -> Any:
    """The PretrainedConfig of a type with its options, or of a local checkpoint."""
    auto = _transformers()
    if config is None:
        with explained(f"the checkpoint '{name}'", kind=CheckpointError):
            folder, extra = _checkpoint(name)
            return auto.AutoConfig.from_pretrained(folder, local_files_only=True, **extra)
    known = list(auto.CONFIG_MAPPING)
    if name not in known:
        near = suggestion(name, known)
        raise SpecError(f"model: transformers {auto.__version__} has no model type '{name}'{near}")
    _check_options(name, config, auto.CONFIG_MAPPING[name])
    with explained(f"the config of '{name}'", config):
        return auto.AutoConfig.for_model(name, **config)


def spelling(name: str) -> dict[str, Any]:
    """How a checkpoint's files may spell the model's tensors: the ``prefix`` of its base model, globs to ``ignore``."""
    config = read_config(name, None)
    family = family_of(config.model_type)
    return {"prefix": _model_class(config).base_model_prefix, "ignore": list(family.ignored) if family else []}


def _check_options(name: str, config: Mapping[str, Any], kind: Any) -> None:
    """Refuse an option that is nearly one the type has: transformers would take it silently and do nothing."""
    known = {*kind().to_dict(), *kind.attribute_map, *LEGACY}
    for key in config:
        near = [] if key in known else difflib.get_close_matches(key, sorted(known), n=1, cutoff=MISSPELLED)
        if near:
            raise SpecError(f"model: the config of '{name}' has no option '{key}'; did you mean '{near[0]}'?")


def _pretrained(name: str, made: Any, options: dict[str, Any]) -> nn.Module:
    folder, extra = _checkpoint(name)
    options = {"experts_implementation": EXACT, **options}
    with explained(f"the checkpoint '{name}'", kind=CheckpointError):
        kind = _model_class(made)
        if "gguf_file" in extra:
            return _read_gguf(kind._from_config(made, **options), str(Path(folder, extra["gguf_file"]))).train()
        return kind.from_pretrained(folder, config=made, local_files_only=True, **options).train()


def _read_gguf(model: nn.Module, path: str) -> nn.Module:
    """The model with a GGUF file's weights in it, dequantized; CheckpointError where some are missing.

    `from_pretrained(gguf_file=)` does the same but asks for accelerate.
    """
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    state = model.state_dict()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    loaded = {state[key].data_ptr() for key in tensors if key in state}
    wrong = [
        *unexpected,
        *(key for key in missing if state[key].data_ptr() not in loaded),
    ]  # a tied tensor is there once
    if wrong:
        raise CheckpointError(f"model: '{path}' does not fit a {type(model).__name__}: {', '.join(wrong[:5])} …")
    return model


def _checkpoint(name: str) -> tuple[str, dict[str, str]]:
    """The folder of a local checkpoint, and the GGUF file in it where the weights are one."""
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    if not path.is_dir():
        raise SpecError(f"model: there is no checkpoint folder '{name}' (nothing is downloaded)")
    files = sorted(path.glob("*.gguf"))
    if (path / "config.json").is_file() or not files:
        return str(path), {}
    if len(files) > 1:
        raise SpecError(f"model: '{name}' holds {len(files)} GGUF files; name one of them, e.g. {files[0]}")
    return str(path), {"gguf_file": files[0].name}


def _model_class(config: Any) -> Any:
    """The class of transformers that a config's model has for training."""
    auto = _transformers()
    for name in getattr(config, "architectures", None) or ():
        if hasattr(auto, name):
            return getattr(auto, name)
    for kind in _order(config, auto):
        if type(config) in kind._model_mapping:
            found = kind._model_mapping[type(config)]
            return found[0] if isinstance(found, (tuple, list)) else found
    raise SpecError(f"model: transformers has no model class for the type '{config.model_type}'")


def _order(config: Any, auto: Any) -> list[Any]:
    """Kinds of models, likeliest first; types that are masked and causal are encoders unless they say otherwise."""
    if getattr(config, "is_encoder_decoder", False):
        return [auto.AutoModelForSeq2SeqLM, auto.AutoModel]
    language = [auto.AutoModelForMaskedLM, auto.AutoModelForCausalLM]
    if getattr(config, "is_decoder", False):
        language.reverse()
    return [*language, auto.AutoModelForImageClassification, auto.AutoModel]


def _transformers() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is first imported
    try:
        import transformers
    except ImportError as error:
        raise SpecError("model: a model with `hf:` needs transformers: pip install 'autopar[hf]'") from error
    return transformers


@contextlib.contextmanager
def explained(
    what: str, options: Mapping[str, Any] | None = None, kind: type[AutoparError] = SpecError
) -> Iterator[None]:
    """Whatever transformers raises for a user's values, as one message with its own words; its log keeps quiet."""
    log = _transformers().utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    except AutoparError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:400]
        blamed = [f"{k}: {v}" for k, v in (options or {}).items() if isinstance(v, str) and v in text]
        place = f" ({', '.join(blamed)})" if blamed else ""
        raise kind(f"model: transformers refuses {what}{place}: {type(error).__name__}: {text}") from error
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
