"""Adapters as files: what a PEFT pass added, in the format of Hugging Face `peft` (a config and a safetensors file)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pydantic
import torch
import torch.nn.functional as F

from autopar.errors import CheckpointError

if TYPE_CHECKING:
    from autopar.ir.program import Program

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""peft's file names (`peft.utils.CONFIG_NAME`, `SAFETENSORS_WEIGHTS_NAME`)."""
ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}


class Affine(pydantic.BaseModel):
    """A linear layer of which parts of the rows lie in several parameters: weights (rows, in), biases (rows)."""

    model_config = pydantic.ConfigDict(frozen=True)
    weights: tuple[str, ...]
    biases: tuple[str, ...]


class Saved(pydantic.BaseModel):
    """One tensor of an adapter file: ``parts`` (parameters of the program) one after another along ``dim``.

    ``shape``: that of the file, where it is not theirs. With ``through``, the file holds what these layers make of
    it, ``activation`` in between: a reparameterization whose own weights the format does not keep.
    """

    model_config = pydantic.ConfigDict(frozen=True)
    parts: tuple[str, ...]
    dim: int = 0
    shape: tuple[int, ...] | None = None
    through: tuple[Affine, ...] = ()
    activation: Literal["tanh", "relu"] = "tanh"

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.parts, *(n for a in self.through for n in (*a.weights, *a.biases)))

    def value(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The tensor of the file."""
        held = [tensors[n] for n in self.parts]
        value = torch.cat(held, self.dim) if len(held) > 1 else held[0]
        for i, layer in enumerate(self.through):
            value = ACTIVATIONS[self.activation](value) if i else value
            weight, bias = (torch.cat([tensors[n] for n in names]) for names in (layer.weights, layer.biases))
            value = F.linear(value, weight, bias)
        return value if self.shape is None else value.reshape(self.shape)

    def split(self, value: torch.Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        """The parameters that a tensor of the file holds. Raises `CheckpointError` where it has another shape."""
        sizes = [shapes[n][self.dim] if shapes[n] else 1 for n in self.parts]
        whole = list(shapes[self.parts[0]])
        if len(self.parts) > 1:
            whole[self.dim] = sum(sizes)
        if tuple(value.shape) != (tuple(whole) if self.shape is None else self.shape):
            raise CheckpointError(f"it is {tuple(value.shape)}, the program needs {self.shape or tuple(whole)}")
        value = value.reshape(whole)
        return dict(zip(self.parts, value.split(sizes, self.dim) if len(self.parts) > 1 else [value], strict=True))


class Adapter(pydantic.BaseModel):
    """What one pass added to a program, and how peft writes it down.

    ``config`` is the adapter_config.json; of its keys those in ``decisive`` change what is computed. ``tensors``: name
    in the file → how it is made of the program's parameters. ``alike``: other peft types whose files hold the same.
    """

    model_config = pydantic.ConfigDict(frozen=True)
    method: str
    options: dict[str, Any]
    config: dict[str, Any]
    decisive: tuple[str, ...]
    tensors: dict[str, Saved]
    alike: tuple[str, ...] = ()

    @property
    def parameters(self) -> tuple[str, ...]:
        """The program's parameters that belong to this adapter."""
        return tuple(dict.fromkeys(n for s in self.tensors.values() for n in s.names))


def trained(program: Program) -> set[str]:
    """The parameters that adapters train: no later pass freezes them."""
    return {n for adapter in program.adapters for n in adapter.parameters}


# ------------------------------------------------------------------ writing


def save(adapters: Iterable[Adapter], tensors: Mapping[str, torch.Tensor], folder: str | Path) -> Path:
    """Write ``adapters``: one into ``folder`` itself, several into a folder each, by method."""
    from safetensors.torch import save_file

    target, several = Path(folder), list(adapters)
    if not several:
        raise CheckpointError("the program has no adapter to save: no PEFT pass has run")
    for adapter, place in places(several, target):
        place.mkdir(parents=True, exist_ok=True)
        held = {n: tensors[n].detach().cpu() for n in adapter.parameters}
        made = {key: saved.value(held).contiguous().clone() for key, saved in adapter.tensors.items()}
        save_file(made, place / WEIGHTS, metadata={"format": "pt"})
        (place / CONFIG).write_text(json.dumps(adapter.config, indent=2, sort_keys=True) + "\n")
    return target


def places(adapters: list[Adapter], folder: Path) -> list[tuple[Adapter, Path]]:
    return [(adapters[0], folder)] if len(adapters) == 1 else [(a, folder / a.method) for a in adapters]


def dump(adapters: Iterable[Adapter]) -> str:
    """What a build folder keeps of its program's adapters."""
    return json.dumps([a.model_dump(mode="json") for a in adapters], indent=1) + "\n"


def parse(text: str) -> list[Adapter]:
    return [Adapter.model_validate(a) for a in json.loads(text)]


# ------------------------------------------------------------------ reading


def load(
    adapters: Iterable[Adapter], shapes: Mapping[str, tuple[int, ...]], folder: str | Path
) -> dict[str, torch.Tensor]:
    """The values that an adapter folder, ours or peft's, holds for the program's parameters.

    Raises `CheckpointError` where it is another method's, was trained with options that compute something else, or its
    tensors do not fit.
    """
    several = list(adapters)
    if not several:
        raise CheckpointError(f"{folder}: the program has no adapter to load into; apply the PEFT pass first")
    found: dict[str, torch.Tensor] = {}
    for adapter, place in places(several, Path(folder)):
        check_config(adapter, read_config(place / CONFIG), place / CONFIG)
        found |= tensors_of(adapter, shapes, place / WEIGHTS)
    return found


def read_config(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; an adapter is a folder with {CONFIG} and {WEIGHTS}") from None
    except ValueError as problem:
        raise CheckpointError(f"{path}: not JSON: {problem}") from None


def check_config(adapter: Adapter, theirs: Mapping[str, Any], path: Path) -> None:
    for key in ("peft_type", *adapter.decisive):
        ours = adapter.config.get(key)
        if key == "peft_type" and theirs.get(key) in adapter.alike:
            continue
        if key in theirs and (theirs[key] or None) != (ours or None):
            raise CheckpointError(
                f"{path}: {key} is {theirs[key]!r}, the program's {adapter.method} has {ours!r}; give the pass the same"
            )


def tensors_of(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        held = load_file(path)
    except (OSError, SafetensorError) as problem:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {problem}") from None
    missing, unknown = [k for k in adapter.tensors if k not in held], [k for k in held if k not in adapter.tensors]
    if missing or unknown:
        lacking = f"missing {missing[0]} ({len(missing)} in all)" if missing else ""
        foreign = f"unknown {unknown[0]} ({len(unknown)} in all)" if unknown else ""
        raise CheckpointError(
            f"{path}: its tensors are not the program's: {', '.join(filter(None, (lacking, foreign)))}"
        )
    found: dict[str, torch.Tensor] = {}
    for key, saved in adapter.tensors.items():
        if saved.through:
            raise CheckpointError(
                f"{path}: {key} is what {adapter.method}'s reparameterizing layers made; they cannot be had back from it. "
                "Apply the pass without them to use this adapter"
            )
        try:
            found |= saved.split(held[key], shapes)
        except CheckpointError as problem:
            raise CheckpointError(f"{path}: {key}: {problem}") from None
    return found


# ------------------------------------------------------------------ a program's own


def values(program: Program, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Parameters as they are, or as they begin where a program has no weights."""
    return {
        n: program.initial[n].make(n, program.parameters[n].shape, program.parameters[n].dtype)
        if program.tensors[n].is_meta
        else program.tensors[n].detach()
        for n in names
    }


def save_program(program: Program, folder: str | Path) -> Path:
    return save(program.adapters, values(program, sorted(trained(program))), folder)


def load_program(program: Program, folder: str | Path) -> None:
    """Fill the adapter's parameters in place, so that modules made of the program have them too."""
    shapes = {n: program.parameters[n].shape for n in trained(program)}
    for name, value in load(program.adapters, shapes, folder).items():
        held = program.tensors[name]
        if held.is_meta:
            program.tensors[name] = torch.nn.Parameter(value.to(held.dtype))
        else:
            with torch.no_grad():
                held.copy_(value)


def merged(program: Program) -> Program:
    """A copy with every adapter folded into the weights it stands beside. Raises `PassError` where one cannot be."""
    from autopar.ir.rewrite import load as load_pass

    new = program.clone()
    for adapter in reversed(program.adapters):
        load_pass({adapter.method: adapter.options}).merge(new, adapter)
    return new


def forget(program: Program, adapter: Adapter, added: Iterable[str]) -> None:
    """After an adapter was folded in: its parameters are gone, and nothing reads them any more."""
    from autopar.ir.unread import sweep

    sweep(program)
    for name in added:
        for table in (program.parameters, program.tensors, program.initial):
            table.pop(name, None)  # type: ignore[attr-defined]
    program.adapters = [a for a in program.adapters if a != adapter]
    program.history.append(f"merge: {adapter.method} is part of the weights")
