"""The decision, as data: which mesh, which stages, which placements. No solver and no torch in here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from autopar.cost import schedules

KINDS = ("none", "selective", "full")
Recompute = Annotated[str, Field(pattern=r"^(none|selective|full|custom_[1-9][0-9]*)$")]
"""What of a block runs again in the backward pass: nothing, the attention core, all, or a selection the plan describes."""
VERSION = "1"


class Frozen(BaseModel):
    """Immutable data; unknown keys are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class MeshShape(Frozen):
    """Degree of every axis, outermost (slowest links) first.

    ``dp_replicate``: dp is so many replicas of ``dp_shard`` devices, which divide among themselves what ZeRO divides
    (hybrid sharding; dp_shard is the inner one). 1: all of dp divides it. In JSON both stand beside ``dp`` where
    there are several replicas. Devices along cp hold the same parameters, as replicas do: ZeRO divides over them, too.
    """

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    dp_replicate: int = 1

    @property
    def dp_shard(self) -> int:
        """Among how many devices of dp ZeRO divides."""
        return self.dp // self.dp_replicate

    @property
    def copies(self) -> int:
        """How many devices hold the same parameters along tp and pp: those along dp and cp."""
        return self.dp * self.cp

    @property
    def sharing(self) -> int:
        """Among how many devices ZeRO divides, along dp and cp."""
        return self.dp_shard * self.cp

    @property
    def devices(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    @property
    def degrees(self) -> dict[str, int]:
        """The axes that number the devices; their product is `devices`."""
        return {"pp": self.pp, "dp": self.dp, "cp": self.cp, "tp": self.tp}

    @property
    def within(self) -> MeshShape:
        """A mesh whose dp is the devices that divide a state among themselves."""
        return MeshShape(dp=self.sharing, tp=self.tp)

    @property
    def merged(self) -> MeshShape:
        """A mesh whose dp is all devices that hold the same parameters."""
        return MeshShape(pp=self.pp, dp=self.copies, tp=self.tp)

    @property
    def across(self) -> MeshShape:
        """A mesh whose dp is the replicas: the devices that hold the same part of the state."""
        return MeshShape(pp=self.pp, dp=self.dp_replicate, cp=self.cp * self.dp_shard, tp=self.tp)

    @model_validator(mode="after")
    def _divides(self) -> MeshShape:
        if self.dp % self.dp_replicate:
            raise ValueError(f"dp_replicate {self.dp_replicate} does not divide dp {self.dp}")
        return self

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        hybrid = {"dp_replicate": self.dp_replicate, "dp_shard": self.dp_shard} if self.dp_replicate > 1 else {}
        return self.degrees | hybrid

    @model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        """``dp_shard`` says the same as ``dp_replicate``; each may stand alone."""
        if not isinstance(data, dict) or "dp_shard" not in data:
            return data
        dp, shard = data.get("dp", 1), data["dp_shard"]
        if not isinstance(shard, int) or shard < 1 or dp != shard * data.get("dp_replicate", dp // shard):
            raise ValueError(f"dp_replicate {data.get('dp_replicate', 1)} × dp_shard {shard} is not dp {dp}")
        return {k: v for k, v in data.items() if k != "dp_shard"} | {"dp_replicate": dp // shard}


class Seconds(Frozen):
    """Seconds of one micro-batch through one stage. ``weight``: those of the backward that the schedule runs apart, for the
    gradients of weights; where there are some, the two parts together are ``backward``."""

    forward: float = 0.0
    backward: float = 0.0
    weight: float = 0.0

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value or name != "weight"}


class Stage(Frozen):
    """One virtual stage: the block calls ``blocks[0] … blocks[1]`` (inclusive; ``[0, -1]`` when there are none)."""

    blocks: tuple[int, int]
    recompute: tuple[Recompute, ...] = ()  # one entry for each block call of the stage
    peak_bytes: int = 0
    seconds: Seconds = Seconds()
    device: str = ""  # what its devices are; of unlike ones, as weak as the weakest
    group: str = ""  # the group of hosts it stands on; several are joined by " + "
    memory_limit: int = 0  # bytes that the plan may use on one of its devices; 0: not known

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """In JSON ``recompute`` counts the blocks of each kind, ``recompute_each`` names every block's."""
        counts = {kind: self.recompute.count(kind) for kind in KINDS}
        custom = sum(r not in KINDS for r in self.recompute)
        counts |= {"custom": custom} if custom else {}
        return {**handler(self), "recompute": counts, "recompute_each": list(self.recompute)}

    @model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "recompute_each" not in data:
            return data
        return {k: v for k, v in data.items() if k != "recompute_each"} | {"recompute": data["recompute_each"]}


class Host(Frozen):
    """One host that a plan stands on: ``host`` counts from 0 in its group, ``devices`` are those used, by number."""

    group: str
    host: int
    device: str
    devices: tuple[int, ...]


def counted(kinds: Iterable[str]) -> dict[str, int]:
    """How many blocks are recomputed each way; those that are not are left out, selections are ``in part``."""
    found = ["in part" if kind not in KINDS else kind for kind in kinds]
    return {kind: found.count(kind) for kind in ("selective", "in part", "full") if kind in found}


class Choice(Frozen):
    """The strategy of one node: placements in the text form of `autopar.sharding.placement`."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    special: str = ""


class Selected(Frozen):
    """A selection of what a block keeps and what it makes again, of one micro-batch on one device.

    ``again``: operators of the block's graph that run again; ``x>R``: the collective that brings x to R. ``saved``: the
    tensors kept, named alike. ``groups``: what the operators are, for people.
    """

    again: tuple[str, ...]
    saved: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    saved_bytes: int = 0
    seconds: float = 0.0


class Context(Frozen):
    """How sequences are split over cp. ``attention``: ring or all_to_all; ``zigzag``: each device holds two chunks of every
    sequence, an early and a late one; ``choices``: graph name → node name → choice along cp; ``whole``: operators whose
    result grows with the sequence and which every device computes whole."""

    attention: str
    zigzag: bool
    choices: dict[str, dict[str, Choice]] = {}
    whole: tuple[str, ...] = ()


class Plan(Frozen):
    """Everything that lowering and the runtime need to know beside the program itself."""

    mesh: MeshShape = MeshShape()
    zero: Literal[0, 1, 2, 3] = 0
    microbatch: int = 1  # sequences per replica per micro-batch
    microbatches: int = 1
    schedule: str = "1f1b"
    virtual_stages: int = 1
    sequence_parallel: bool = False
    stages: tuple[Stage, ...]  # pp × virtual_stages entries, in the order of the blocks; `rank_of` says where
    choices: dict[str, dict[str, Choice]] = {}  # graph name ("program" or a block's) → node name → choice along tp
    placements: dict[str, str] = {}  # parameter → "S(0)@tp" or "R"
    unsplit: tuple[str, ...] = ()  # operators without a rule, replicated along tp
    hosts: tuple[Host, ...] = ()  # in the order of the ranks, where hosts are unlike; empty: any order
    context: Context | None = None  # where cp > 1: ``choices`` are then of the program of one device along cp
    recompute_groups: dict[str, dict[str, Selected]] = {}  # block → ``custom_1`` … → what of it is made again

    @model_validator(mode="after")
    def _describes_what_it_recomputes(self) -> Plan:
        known = {mode for selections in self.recompute_groups.values() for mode in selections}
        for stage in self.stages:
            for mode in stage.recompute:
                if mode not in KINDS and mode not in known:
                    raise ValueError(f"recompute {mode} is not described in recompute_groups")
        return self

    @property
    def splits(self) -> bool:
        """Whether the schedule runs the gradients of weights apart from those of a stage's inputs."""
        return self.mesh.pp > 1 and self.schedule in schedules.SPLIT

    @property
    def v_shaped(self) -> bool:
        """Whether the first pp rank has the first and the last stage."""
        return self.mesh.pp > 1 and self.schedule in schedules.V_SHAPED

    def rank_of(self, stage: int) -> int:
        """The pp rank that runs a stage."""
        return schedules.device_of(self.schedule, self.mesh.pp, stage)

    def stages_on(self, rank: int) -> list[int]:
        """The stages that a pp rank runs, in order."""
        return schedules.stages_of(self.schedule, self.mesh.pp, len(self.stages), rank)

    @model_validator(mode="after")
    def _shards_something(self) -> Plan:
        if self.mesh.dp_replicate > 1 and (self.zero == 0 or self.mesh.sharing == 1):
            raise ValueError(
                f"dp_replicate {self.mesh.dp_replicate} × dp_shard {self.mesh.dp_shard} with zero={self.zero} divides "
                "nothing; dp_replicate 1 and zero=0 say the same"
            )
        return self


class Bytes(Frozen):
    """Bytes on the fullest device (beside what it may hold) at its peak; they add up to the peak."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    transient: int = 0

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.transient


class Cost(Frozen):
    """The ledger of the slowest device: compute + exposed communication + bubble + optimizer = step."""

    step_seconds: float
    compute_seconds: float
    exposed_communication_seconds: float
    bubble_seconds: float
    optimizer_seconds: float
    tokens_per_second: float
    mfu: float
    peak_bytes: int
    bytes: Bytes


class ModelFacts(Frozen):
    """What the plan is for. ``flops_per_token``: the model's own forward and backward work, no recompute."""

    parameters: int
    trainable_parameters: int
    flops_per_token: float


class Search(Frozen):
    """How the plan was found, and how far from the best it can be at most."""

    seconds: float
    trace_seconds: float
    status: str
    objective: float
    bound: float
    gap: float
    candidates: int


class RunnerUp(Frozen):
    """Another plan that was weighed."""

    summary: str
    mesh: MeshShape
    zero: int
    microbatch: int
    schedule: str
    step_seconds: float
    peak_bytes: int


class Sparse(Frozen):
    """Data that stands many times in a plan: fields at their defaults are left out of the JSON."""

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        return {name: value for name, value in handler(self).items() if getattr(self, name) != fields[name].default}


class Read(Sparse):
    """One tensor operand of a node: who makes it, the collectives that bring it (and its gradient) along tp, and their
    seconds. Readers of one value that want the same share one move: each states it, it is paid once."""

    node: str
    forward: str = "none"
    backward: str = "none"
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0


class NodeFacts(Sparse):
    """One node for one micro-batch on one device. ``reads`` is in the order of its choice's ``inputs``; ``type`` as in a
    program's text, ``f32[2, 16, 64]``; seconds of computing alone."""

    op: str = ""
    type: str = ""
    reads: tuple[Read, ...] = ()
    forward: float = 0.0
    backward: float = 0.0


class PlanDocument(Frozen):
    """The JSON of a plan: `autopar plan --json` and `plan.json` in a build folder."""

    model: ModelFacts
    plan: Plan
    cost: Cost
    search: Search
    runners_up: tuple[RunnerUp, ...] = ()
    binding: tuple[str, ...] = ()
    title: str = ""  # the model, as the job names it
    cluster: str = ""  # the cluster, as the job names it
    memory_limit: int = 0  # bytes that the plan may use on the fullest device; 0: not known
    unused_devices: int = 0  # of the cluster's working devices
    unused: tuple[str, ...] = ()  # for every group with unused devices, why
    rank_bytes: tuple[Bytes, ...] = ()  # of every pp rank at its peak; empty: only the fullest is known (`cost.bytes`)
    nodes: dict[str, dict[str, NodeFacts]] = {}  # graph name → node name → what `view` and `explain --why` tell of it
    version: str = VERSION
