"""What a program's blocks take in and hand out that nobody reads."""

from __future__ import annotations

import operator

from autopar.ir.importer import is_impure
from autopar.ir.program import Program


def drop_unread_results(program: Program) -> None:
    """Leave out the outputs of blocks that no instance's reader takes (attention weights, mostly)."""
    for name, graph in program.blocks.items():
        calls = [c for c in program.calls() if c.target == name]
        read = {int(user.args[1]) for c in calls for user in c.users if user.users}  # type: ignore[arg-type]
        out = graph.output_node()
        results = out.args[0]
        kept = [i for i in range(len(results)) if i in read]  # type: ignore[arg-type]
        if len(kept) == len(results) or not kept:  # type: ignore[arg-type]
            continue
        out.args = (tuple(results[i] for i in kept),)  # type: ignore[index]
        for call in calls:
            for key in ("val", "dims", "requires_grad"):
                if key in call.meta:
                    call.meta[key] = tuple(call.meta[key][i] for i in kept)
            for user in list(call.users):
                assert user.target is operator.getitem, user
                if user.args[1] in kept:
                    user.args = (call, kept.index(user.args[1]))  # type: ignore[arg-type]
                else:
                    program.graph.erase_node(user)


def drop_unread_arguments(program: Program) -> None:
    """Leave out the placeholders of blocks that nobody reads, and the arguments of their calls."""
    for name, graph in program.blocks.items():
        places = [n for n in graph.nodes if n.op == "placeholder"]
        dead = {i for i, n in enumerate(places) if not n.users}
        for call in program.calls():
            if call.target == name:
                call.args = tuple(a for i, a in enumerate(call.args) if i not in dead)
        for i in dead:
            graph.erase_node(places[i])


def sweep(program: Program) -> None:
    """Drop what nobody reads: blocks' results and arguments, calls, and parameters and buffers; the batch stays."""
    drop_unread_results(program)
    for _, graph in program.graphs():
        graph.eliminate_dead_code(is_impure)
    drop_unread_arguments(program)
    program.graph.eliminate_dead_code(lambda n: n.meta["kind"] == "input" if n.op == "placeholder" else is_impure(n))
