"""GGUF weights, converted once into a safetensors file in the build folder (through transformers' loader)."""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist

from autopar.errors import CheckpointError


def converted(path: Path, folder: Path) -> Path:
    """The safetensors file with the values of a GGUF file, in the original names.

    The first rank of every host converts (dequantized to float32; it holds the whole model while it does), the others
    wait. Collective when torch.distributed runs.
    """
    target = folder / "weights" / f"{path.stem}.safetensors"
    error = ""
    if not target.exists() and int(os.environ.get("LOCAL_RANK", dist.get_rank() if dist.is_initialized() else 0)) == 0:
        try:
            _convert(path, target)
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


def _convert(path: Path, target: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    tensors = {n: p.detach().contiguous() for n, p in model.named_parameters()}
    buffers = {n: b.detach().clone() for n, b in model.named_buffers() if n in model.state_dict()}
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}.partial")
    save_file(tensors | buffers, partial)
    os.replace(partial, target)
