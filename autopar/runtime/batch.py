"""Which part of the global batch this replica takes, cut into micro-batches."""

from __future__ import annotations

import torch

from autopar.errors import AutoparError, suggestion
from autopar.plan.plan import Plan
from autopar.runtime.manifest import Manifest, dtype_of
from autopar.runtime.pipeline import Microbatch


def microbatches(
    batch: dict[str, torch.Tensor], manifest: Manifest, plan: Plan, replica: int, device: torch.device
) -> list[Microbatch]:
    """The micro-batches of a replica. ``batch`` is global: replica r takes its r-th share of the sequences, in order.

    Raises AutoparError for keys that are missing or unknown, and for any other size than the plan's.
    """
    for name in batch.keys() - manifest.inputs.keys():
        near = suggestion(name, manifest.inputs)
        raise AutoparError(
            f"the batch has '{name}', which the program does not take (it takes {_list(manifest)}){near}"
        )
    for name in manifest.inputs.keys() - batch.keys():
        raise AutoparError(f"the batch has no '{name}'; the program takes {_list(manifest)}")
    cuts = {name: _cut(name, value, manifest, plan, replica, device) for name, value in batch.items()}
    return [{name: parts[i] for name, parts in cuts.items()} for i in range(plan.microbatches)]


def _list(manifest: Manifest) -> str:
    return ", ".join(f"'{n}'" for n in manifest.inputs)


def _cut(
    name: str, value: torch.Tensor, manifest: Manifest, plan: Plan, replica: int, device: torch.device
) -> list[torch.Tensor]:
    entry, n, dp = manifest.inputs[name], plan.microbatches, plan.mesh.dp
    shape = (entry.shape[0] * n * dp, *entry.shape[1:]) if entry.batched else entry.shape
    if tuple(value.shape) != shape:
        share = f" ({dp} replicas × {n} micro-batches × {entry.shape[0]} sequences)" if entry.batched else ""
        raise AutoparError(f"the batch's '{name}' has shape {tuple(value.shape)}; the plan takes {shape}{share}")
    if value.dtype != dtype_of(entry.dtype) and value.is_floating_point() != dtype_of(entry.dtype).is_floating_point:
        raise AutoparError(f"the batch's '{name}' is {value.dtype}; the program takes {entry.dtype}")
    value = value if not entry.batched else value.tensor_split(dp)[replica]
    value = value.to(device=device, dtype=dtype_of(entry.dtype), non_blocking=True)
    return list(value.split(entry.shape[0])) if entry.batched else [value] * n
