"""Hugging Face checkpoints as declarative models, and declarative models as Hugging Face checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autopar.errors import CheckpointError
from autopar.models.decoder import Decoder, decoder
from autopar.models.weights import Table, ours_of
from autopar.spec.reference import CONFIG, config_of, read_config, write_config

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = 5 * 10**9  # bytes in a file at most, as transformers writes them


def read_checkpoint(path: str | Path) -> Decoder:
    """The declarative model with a checkpoint's config and weights, every tensor in the dtype it is stored in.

    ``path``: a folder with config.json and safetensors (sharded or not), or a GGUF file, which is dequantized.
    CheckpointError that names what is missing, unknown or of another shape.
    """
    path = Path(path).expanduser()
    config = config_of(path)
    spec = read_config(config, str(path))
    with torch.device("meta"):
        model = decoder(spec)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = _gguf_tensors(path, config) if path.suffix == ".gguf" else _safetensors(path)
    found = ours_of(spec, shapes, tensors, str(path))
    if spec.tied:
        found["head.weight"] = found["embedding.weight"]
    model.load_state_dict(found, assign=True)
    if spec.tied:
        model.head.weight = model.embedding.weight
    return model.train().requires_grad_()


def write_checkpoint(model: Decoder, folder: str | Path, *, like: str | Path | None = None, shard: int = SHARD) -> Path:
    """Write a declarative model as a checkpoint of its family's Hugging Face type: config.json and safetensors.

    ``like``: a checkpoint folder whose config, names and files are taken over (so what `read_checkpoint` read from it
    comes back bit for bit); else they follow from the spec, a new file after every ``shard`` bytes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ours = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    table = Table(model.spec, {name: tuple(tensor.shape) for name, tensor in ours.items()})
    if like is not None:
        config, files = config_of(Path(like).expanduser()), _files(Path(like).expanduser())
        files = {f: [n for n in names if table.held(n) is not None] for f, names in files.items()}
    else:
        config = write_config(model.spec)
        names = table.names(frozenset({"head.weight"} if model.spec.tied else ()))
        files = _sharded({n: table.joined(n, ours) for n in names}, shard)
    _write(folder, config, {f: {n: table.joined(n, ours) for n in names} for f, names in files.items()}, like is None)
    return folder


def _write(folder: Path, config: Mapping[str, Any], files: Mapping[str, Mapping[str, Tensor]], dtype: bool) -> None:
    from safetensors.torch import save_file

    size = sum(t.numel() * t.element_size() for tensors in files.values() for t in tensors.values())
    for file, tensors in files.items():
        save_file(dict(tensors), folder / file, metadata={"format": "pt"})
    if dtype:
        kind = next(t.dtype for tensors in files.values() for t in tensors.values())
        config = {**config, "dtype": str(kind).removeprefix("torch.")}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if list(files) != [SINGLE]:
        where = {name: file for file, tensors in files.items() for name in tensors}
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _sharded(tensors: Mapping[str, Tensor], limit: int) -> dict[str, list[str]]:
    groups: list[list[str]] = [[]]
    held = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if groups[-1] and held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i + 1:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups)}


# ------------------------------------------------------------------ files


def _files(folder: Path) -> dict[str, list[str]]:
    """Every safetensors file of a checkpoint and the names in it, both in the order they are stored."""
    from safetensors import SafetensorError, safe_open

    index = folder / INDEX
    files = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        files = [
            folder / f for f in dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        ]
    if not files:
        raise CheckpointError(f"{folder}: no *.safetensors file")
    found = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as data:
                found[file.name] = list(data.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: cannot be read as safetensors: {error}") from None
    return found


def _safetensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    for file, names in _files(folder).items():
        with safe_open(folder / file, framework="pt") as data:
            for name in names:
                yield name, data.get_tensor(name)


def _gguf_tensors(path: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    from autopar.models.huggingface import build_huggingface, explained

    with torch.no_grad():
        options = {key: value for key, value in config.items() if not key.startswith("_") and key != "model_type"}
        theirs: nn.Module = build_huggingface(str(config["model_type"]), options, meta=True)
    with explained(f"the checkpoint '{path}'", kind=CheckpointError):
        tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=theirs)["tensors"]
    yield from ((name, torch.as_tensor(tensor)) for name, tensor in tensors.items())
