"""GGUF weights, converted once into a safetensors file in the build folder (through transformers' loader)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from autopar.errors import CheckpointError


def converted(path: Path, folder: Path, build: Callable[[], nn.Module] | None = None) -> Path:
    """The safetensors file with the values of a GGUF file, in the names of the model that ``build`` makes.

    Without ``build``, the model is the causal language model of transformers for the file's own config.
    The first rank of every host converts (dequantized to float32; it holds the whole model while it does), the others
    wait. Collective when torch.distributed runs.
    """
    target = folder / "weights" / f"{path.stem}.safetensors"
    error = ""
    if not target.exists() and int(os.environ.get("LOCAL_RANK", dist.get_rank() if dist.is_initialized() else 0)) == 0:
        try:
            _convert(path, target, build)
        except Exception as caught:  # told to all ranks below: the others would wait for ever
            error = f"{path}: cannot be read as GGUF: {caught}"
    error = next(filter(None, _everyone(error)), "")
    if error:
        raise CheckpointError(error)
    return target


def _everyone(error: str) -> list[str]:
    if not dist.is_initialized():
        return [error]
    errors = [""] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return errors


def _convert(path: Path, target: Path, build: Callable[[], nn.Module] | None) -> None:
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    with torch.device("meta"):
        model = (
            build()
            if build
            else AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path.parent, gguf_file=path.name))
        )
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}.partial")
    save_file({n: torch.as_tensor(t).contiguous() for n, t in tensors.items()}, partial)
    os.replace(partial, target)
