"""Plan documents written by hand, for tests of what is shown of them."""

from autopar.plan.plan import (
    Bytes,
    Choice,
    Cost,
    MeshShape,
    ModelFacts,
    NodeFacts,
    Plan,
    PlanDocument,
    Read,
    RunnerUp,
    Search,
    Seconds,
    Stage,
)

GIB = 2**30
PROGRAM = """\
program {
  %ids: i64[2, 16] = input input_ids
  %p_blocks_0_up_weight: f32[32, 8] = parameter blocks.0.up.weight
  %p_blocks_0_down_weight: f32[8, 32] = parameter blocks.0.down.weight
  %p_blocks_1_up_weight: f32[32, 8] = parameter blocks.1.up.weight
  %p_blocks_1_down_weight: f32[8, 32] = parameter blocks.1.down.weight
  %p_blocks_2_up_weight: f32[32, 8] = parameter blocks.2.up.weight
  %p_blocks_2_down_weight: f32[8, 32] = parameter blocks.2.down.weight
  %p_table_weight: f32[64, 8] = parameter table.weight
  %embedding: f32[2, 16, 8] = aten.embedding(%p_table_weight, %ids)
  %call_0: (f32[2, 16, 8]) = block_0(%embedding, %p_blocks_0_up_weight, %p_blocks_0_down_weight)
  %getitem: f32[2, 16, 8] = getitem(%call_0, 0)
  %call_1: (f32[2, 16, 8]) = block_0(%getitem, %p_blocks_1_up_weight, %p_blocks_1_down_weight)
  %getitem_1: f32[2, 16, 8] = getitem(%call_1, 0)
  %call_2: (f32[2, 16, 8]) = block_0(%getitem_1, %p_blocks_2_up_weight, %p_blocks_2_down_weight)
  %getitem_2: f32[2, 16, 8] = getitem(%call_2, 0)
  %sum: f32[] = aten.sum(%getitem_2)
  return (%sum, %sum)
}
block_0 × 3 {
  %hidden: f32[2, 16, 8] = input hidden
  %up_weight: f32[32, 8] = parameter up.weight
  %down_weight: f32[8, 32] = parameter down.weight
  %linear: f32[2, 16, 32] = aten.linear(%hidden, %up_weight)
  %relu: f32[2, 16, 32] = aten.relu(%linear)
  %linear_1: f32[2, 16, 32] = aten.linear(%hidden, %up_weight)
  %mul: f32[2, 16, 32] = aten.mul.Tensor(%relu, %linear_1)
  %linear_2: f32[2, 16, 8] = aten.linear(%mul, %down_weight)
  %add: f32[2, 16, 8] = aten.add.Tensor(%hidden, %linear_2)
  return (%add,)
}
"""
GATHER = {"forward": "all_gather", "backward": "reduce_scatter", "forward_seconds": 0.002, "backward_seconds": 0.003}
SCATTER = {"forward": "reduce_scatter", "backward": "all_gather", "forward_seconds": 0.004, "backward_seconds": 0.001}


def made(*outputs: str) -> Choice:
    return Choice(inputs=(), outputs=outputs)


def does(inputs: str, output: str) -> Choice:
    return Choice(inputs=tuple(inputs.split()), outputs=(output,))


def parameters(blocks: int) -> dict[str, str]:
    found = {}
    for i in range(blocks):
        found |= {f"blocks.{i}.up.weight": "S(0)@tp", f"blocks.{i}.down.weight": "S(1)@tp"}
    return found | {"table.weight": "R"}


def choices() -> dict[str, dict[str, Choice]]:
    outer = {"ids": made("R")}
    for i in range(3):
        outer |= {f"p_blocks_{i}_up_weight": made("S(0)"), f"p_blocks_{i}_down_weight": made("S(1)")}
    outer |= {"p_table_weight": made("R"), "embedding": does("R R", "R")}
    for i, suffix in enumerate(("", "_1", "_2")):
        outer |= {f"call_{i}": does("S(1) S(0) S(1)", "S(1)"), f"getitem{suffix}": does("S(1)", "S(1)")}
    block = {"hidden": made("S(1)"), "up_weight": made("S(0)"), "down_weight": made("S(1)")}
    block |= {
        "linear": does("R S(0)", "S(2)"),
        "relu": does("S(2)", "S(2)"),
        "linear_1": does("R S(0)", "S(2)"),
        "mul": does("S(2) S(2)", "S(2)"),
        "linear_2": does("S(2) S(1)", "P"),
        "add": does("S(1) S(1)", "S(1)"),
    }
    return {"program": outer | {"sum": does("S(1)", "P")}, "block_0": block}


def nodes() -> dict[str, dict[str, NodeFacts]]:
    def fact(op: str, *reads: Read, seconds: tuple[float, float] = (0.0, 0.0)) -> NodeFacts:
        return NodeFacts(op=op, type="f32[2, 16, 8]", reads=reads, forward=seconds[0], backward=seconds[1])

    hidden, up = Read(node="hidden", **GATHER), Read(node="up_weight")
    outer = {"embedding": fact("aten.embedding", Read(node="p_table_weight"), Read(node="ids"), seconds=(0.001, 0.001))}
    source = "embedding"
    for i, suffix in enumerate(("", "_1", "_2")):
        weights = (Read(node=f"p_blocks_{i}_up_weight"), Read(node=f"p_blocks_{i}_down_weight"))
        outer[f"call_{i}"] = fact("block_0", Read(node=source), *weights)
        outer[f"getitem{suffix}"] = fact("getitem", Read(node=f"call_{i}"))
        source = f"getitem{suffix}"
    outer["sum"] = fact("aten.sum", Read(node=source))
    block = {
        "linear": fact("aten.linear", hidden, up, seconds=(0.01, 0.02)),
        "relu": fact("aten.relu", Read(node="linear")),
        "linear_1": fact("aten.linear", hidden, up, seconds=(0.01, 0.02)),
        "mul": fact("aten.mul.Tensor", Read(node="relu"), Read(node="linear_1")),
        "linear_2": fact("aten.linear", Read(node="mul"), Read(node="down_weight"), seconds=(0.03, 0.05)),
        "add": fact("aten.add.Tensor", Read(node="hidden"), Read(node="linear_2", **SCATTER)),
    }
    return {"program": outer, "block_0": block}


def stages(count: int, each: int = 3, kind: str = "none") -> tuple[Stage, ...]:
    return tuple(
        Stage(
            blocks=(i * each, (i + 1) * each - 1),
            recompute=(kind,) * each,
            peak_bytes=(60 - i) * GIB,
            seconds=Seconds(forward=0.5, backward=1.0),
        )
        for i in range(count)
    )


def document(pp: int = 1, dp: int = 1, tp: int = 4, cp: int = 1, virtual: int = 1, **changes) -> PlanDocument:
    """A plausible plan; ``changes`` to the document (``plan=`` and ``cost=`` are dicts of changes to these)."""
    spans = stages(pp * virtual)
    held = tuple(
        Bytes(parameters=10 * GIB, gradients=5 * GIB, optimizer=20 * GIB, activations=(20 - i) * GIB, transient=5 * GIB)
        for i in range(pp)
    )
    plan = Plan(
        mesh=MeshShape(pp=pp, dp=dp, cp=cp, tp=tp),
        zero=1,
        microbatches=16,
        virtual_stages=virtual,
        schedule="interleaved1f1b" if virtual > 1 else "1f1b",
        stages=spans,
        choices=choices(),
        placements=parameters(3 * len(spans)),
    )
    cost = Cost(
        step_seconds=20.0,
        compute_seconds=15.0,
        exposed_communication_seconds=3.0,
        bubble_seconds=1.5,
        optimizer_seconds=0.5,
        tokens_per_second=123456.0,
        mfu=0.432,
        peak_bytes=60 * GIB,
        bytes=held[0],
    )
    other = RunnerUp(
        summary="tp 8 · zero 2",
        mesh=MeshShape(tp=8),
        zero=2,
        microbatch=2,
        schedule="gpipe",
        step_seconds=21.0,
        peak_bytes=50 * GIB,
    )
    base = PlanDocument(
        model=ModelFacts(parameters=7_000_000_000, trainable_parameters=7_000_000_000, flops_per_token=4.2e10),
        plan=plan.model_copy(update=changes.pop("plan", {})),
        cost=cost.model_copy(update=changes.pop("cost", {})),
        search=Search(
            seconds=2, trace_seconds=1, status="optimal", objective=20.0, bound=19.9, gap=0.005, candidates=1234
        ),
        runners_up=(other,),
        binding=("memory: 60.0 of 76.0 GiB on stage 0",),
        title="llama-7b",
        cluster="2 × dgx-h100",
        memory_limit=76 * GIB,
        rank_bytes=held,
        nodes=nodes(),
    )
    return base.model_copy(update=changes)
