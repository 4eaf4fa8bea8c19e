"""One option of one operator along one mesh axis."""

from __future__ import annotations

from dataclasses import dataclass

from autopar.sharding.placement import Placement, R


@dataclass(frozen=True)
class Strategy:
    """Placements of the tensor operands (`autopar.ir.ops.operands` order) and of the tensor outputs.

    ``special`` names a local function of its own where the plain operator on local tensors would be wrong
    (vocabulary-parallel embedding and cross-entropy); empty for everything else.
    """

    inputs: tuple[Placement, ...]
    outputs: tuple[Placement, ...]
    special: str = ""

    @property
    def replicated(self) -> bool:
        """Every device does all the work: gradients of the inputs come out whole, not partial."""
        return all(p == R for p in (*self.inputs, *self.outputs)) and not self.special

    def __str__(self) -> str:
        text = f"{','.join(map(str, self.inputs))}->{','.join(map(str, self.outputs))}"
        return f"{text}#{self.special}" if self.special else text
