"""Block calls as lines of a stage's forward: one by one, or as loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import fx

from autopar.lower.code import Names, Writer
from autopar.lower.outer import Run, outputs

if TYPE_CHECKING:
    from autopar.lower.emit import Emitter


class CallWriter:
    """Block calls as lines of the stage's forward: one by one, or as loops."""

    def __init__(
        self,
        writer: Writer,
        names: Names,
        owned: dict[str, set[int]],
        loops: dict[fx.Node, Run],
        indices: dict[fx.Node, int],
        emitter: Emitter,
    ) -> None:
        self.writer, self.names, self.owned, self.loops = writer, names, owned, loops
        self.indices, self.emitter = indices, emitter

    def write(self, call: fx.Node, say: Callable[[fx.Node], str]) -> None:
        run = self.loops.get(call)
        if run is None:
            given = [say(a) for i, a in enumerate(call.args) if i not in self.owned[str(call.target)]]  # type: ignore[arg-type]
            targets = self.targets(call)
            self.writer.body.lines.append(f"{targets} = self.blocks[{self.indices[call]}]({', '.join(given)})")
            return
        self.loop(run, say)

    def targets(self, call: fx.Node) -> str:
        """The names of a call's outputs; they are the getitems' names."""
        count = len(call.meta["val"])
        found = outputs(call)
        names = []
        for i in range(count):
            name = self.names.give(found[i], self.label(call, i)) if i in found else "_"
            names.append(name)
        return ", ".join(names)

    def label(self, call: fx.Node, index: int) -> str:
        carried = [n for n in self.emitter.program.blocks[str(call.target)].nodes if n.op == "placeholder"]
        value = call.meta["val"][index]
        same = [n for n in carried if n.meta["kind"] == "input" and n.meta["val"].shape == value.shape]
        return str(same[0].name) if same and index == 0 else f"output_{index}"

    def loop(self, run: Run, say: Callable[[fx.Node], str]) -> None:
        first, last = run.calls[0], run.calls[-1]
        carried = dict(run.carried)
        by_output = {k: i for i, k in carried.items()}
        lines = self.writer.body.lines
        targets, given = [], []
        found = outputs(last)
        for k in range(len(last.meta["val"])):
            if k in by_output:
                start = say(first.args[by_output[k]])  # type: ignore[arg-type]
                node = found.get(k)
                name = self.names.give(node, self.label(last, k)) if node is not None else f"carried_{k}"
                lines.append(f"{name} = {start}")
                targets.append(name)
            elif k in found:
                targets.append(self.names.give(found[k], self.label(last, k)))
            else:
                targets.append("_")
        for i, value in enumerate(first.args):
            if i in self.owned[str(first.target)]:
                continue
            given.append(targets[carried[i]] if i in carried else say(value))  # type: ignore[arg-type]
        a, b = self.indices[first], self.indices[last] + 1
        whole = a == 0 and b == len(self.indices)
        lines.append(f"for block in self.blocks{'' if whole else f'[{a}:{b}]'}:")
        lines.append(f"    {', '.join(targets)} = block({', '.join(given)})")
