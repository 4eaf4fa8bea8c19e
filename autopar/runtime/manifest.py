"""What the emitted modules of a build folder are, as data: ``manifest.json`` (see docs/interfaces.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from autopar.errors import AutoparError
from autopar.plan.plan import Plan
from autopar.sharding.placement import Placement, parse


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorEntry(_Data):
    """A parameter or buffer of one stage. ``path``: in the emitted module; ``name``: the original; ``shape``: global."""

    path: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    placement: str = "R"

    @property
    def place(self) -> Placement:
        return parse(self.placement)

    @property
    def torch_dtype(self) -> torch.dtype:
        return dtype_of(self.dtype)


class ParameterEntry(TensorEntry):
    """``partial_gradient``: the ranks along tp hold parts of its gradient that must be summed, once a step. ``read``: the
    dtype in which the program reads it, always, where that is another than its own: it may be gathered in that one."""

    trainable: bool = True
    partial_gradient: bool = False
    read: str | None = None


class AdvanceEntry(_Data):
    """The torch operator that carries a state to the next step, in place, and its options."""

    operator: str
    options: dict[str, Any] = {}


class BufferEntry(TensorEntry):
    """``persistent``: part of the model's own ``state_dict``. ``advance``: of a state that the stage's operators write into:
    column 0 of its last dim is what a step observed, merged by maximum over the ranks before it is carried on."""

    persistent: bool = False
    advance: AdvanceEntry | None = None


class Boundary(_Data):
    """A value that passes from stage to stage; ``shape`` is local to a rank along tp."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool = True

    def meta(self, device: torch.device, always_grad: bool = False) -> torch.Tensor:
        """An example of it; with ``always_grad`` every float value takes part in autograd."""
        dtype = dtype_of(self.dtype)
        grad = dtype.is_floating_point and (self.requires_grad or always_grad)
        return torch.empty(self.shape, dtype=dtype, device=device, requires_grad=grad)


class InputEntry(_Data):
    """A batch key. ``shape`` is of one micro-batch of one replica; ``batched``: dim 0 counts sequences.

    ``high``: whole numbers in it are below this (the vocabulary, the number of classes), where that is known.
    """

    shape: tuple[int, ...]
    dtype: str
    batched: bool = True
    high: int | None = None


class StageEntry(_Data):
    """One emitted stage: ``stages/<module>.py`` with a class ``Stage(tp)``. ``beside``: it trains something that what it
    receives is not part of (a decoder's own embedding), so that its backward cannot run in two parts."""

    module: str
    units: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    receives: tuple[Boundary, ...] = ()
    sends: tuple[Boundary, ...] = ()
    beside: bool = False
    parameters: tuple[ParameterEntry, ...] = ()
    buffers: tuple[BufferEntry, ...] = ()


class Manifest(_Data):
    """``tied``: groups of original names that are one tensor. ``weights``: where values come from, first match wins.
    ``precision``: compute, master, frozen, reduce → dtype names, where a pass has set them."""

    stages: tuple[StageEntry, ...]
    tied: tuple[tuple[str, ...], ...] = ()
    inputs: dict[str, InputEntry] = {}
    weights: tuple[dict[str, Any], ...] = ()
    precision: dict[str, str] = {}

    def canonical(self, name: str) -> str:
        """The one name under which a tied tensor is kept."""
        return next((group[0] for group in self.tied if name in group), name)

    def names(self, canonical: str) -> list[str]:
        """Every original name of a tensor, its canonical name first."""
        group = next((g for g in self.tied if canonical in g), (canonical,))
        return [canonical, *(n for n in group if n != canonical)]

    @property
    def reduce_dtype(self) -> torch.dtype | None:
        """In which gradients are summed over dp; None: each in its own."""
        return dtype_of(self.precision["reduce"]) if "reduce" in self.precision else None

    def tokens(self, plan: Plan) -> int:
        """Tokens (or samples, where the first input has no sequence) in a global batch."""
        entry = next(iter(self.inputs.values()))
        length = entry.shape[1] if len(entry.shape) == 2 else 1
        return entry.shape[0] * length * plan.microbatches * plan.mesh.dp

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a build folder; an AutoparError if there is none or it is damaged."""
        path = folder / "manifest.json"
        try:
            return cls.model_validate(json.loads(path.read_text()))
        except FileNotFoundError:
            raise AutoparError(
                f"{folder}: no manifest.json there; is it a build folder of `autopar compile`?"
            ) from None
        except (ValidationError, json.JSONDecodeError) as error:
            raise AutoparError(f"{path}: not a manifest of this version of autopar: {error}") from None


def dtype_of(name: str) -> torch.dtype:
    """``"float32"`` → ``torch.float32``."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no torch dtype")
    return dtype
