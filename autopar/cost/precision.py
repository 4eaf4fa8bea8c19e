"""Which dtypes a step holds and computes in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from autopar.errors import SpecError

if TYPE_CHECKING:
    from autopar.ir.program import Program


@dataclass(frozen=True)
class Precision:
    """The dtypes of one training step.

    ``source``: what the traced program's own floating tensors have; ``compute``: what they have when it runs;
    ``master``: trainable parameters between steps; ``frozen``: frozen ones; ``gradients``: accumulated and sharded
    gradients; ``state``: the optimizer's; ``reduce``: gradients while they are reduced.
    """

    source: torch.dtype = torch.float32
    compute: torch.dtype = torch.float32
    master: torch.dtype = torch.float32
    frozen: torch.dtype = torch.float32
    gradients: torch.dtype = torch.float32
    state: torch.dtype = torch.float32
    reduce: torch.dtype = torch.float32

    @property
    def mixed(self) -> bool:
        """Whether a copy of the parameters in another dtype is computed with (FSDP2's MixedPrecisionPolicy)."""
        return self.compute != self.master

    def itemsize(self, dtype: torch.dtype) -> int:
        """Bytes of one element of a traced tensor when the program runs."""
        return self.compute.itemsize if dtype == self.source else dtype.itemsize

    def running(self, dtype: torch.dtype) -> torch.dtype:
        return self.compute if dtype == self.source else dtype

    @staticmethod
    def of(program: Program, options: Mapping[str, Any] | None = None) -> Precision:
        """As the program was traced; ``options`` (``compute, master, reduce``) are those of the pass mixed_precision.

        A program that the pass has rewritten says so itself: the casts are in its graph, every dtype is as it runs.
        """
        if program.precision is not None:
            cast = {k: dtype_named(v, torch.float32) for k, v in program.precision.items()}
            compute, master, frozen, reduce = (cast[k] for k in ("compute", "master", "frozen", "reduce"))
            return Precision(compute, compute, master, frozen, master, master, reduce)
        weights = Counter[torch.dtype]()
        for p in program.parameters.values():
            if p.dtype.is_floating_point:
                weights[p.dtype] += p.numel
        own = weights.most_common(1)[0][0] if weights else torch.float32
        if options is None:
            return Precision(own, own, own, own, own, own, own)
        compute = dtype_named(options.get("compute"), own)
        master = dtype_named(options.get("master"), own)
        reduce = dtype_named(options.get("reduce"), master)
        return Precision(own, compute, master, dtype_named(options.get("frozen"), master), master, master, reduce)

    def with_state(self, name: str | None) -> Precision:
        """The optimizer's state in a dtype of its own (``optimizer.state`` of a job)."""
        return Precision(**{**vars(self), "state": dtype_named(name, self.state)})


def dtype_named(value: Any, default: torch.dtype) -> torch.dtype:
    """A dtype from its name or itself; ``default`` for None."""
    if value is None:
        return default
    found = value if isinstance(value, torch.dtype) else vars(torch).get(str(value).removeprefix("torch."))
    if not isinstance(found, torch.dtype):
        raise SpecError(f"{value!r} is no dtype; write bfloat16, float16, float32 or float64")
    return found
