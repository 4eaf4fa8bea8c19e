"""The processes of a run: this rank, its device, the mesh (pp, dp, cp, tp) and its groups."""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from autopar.errors import PlanError
from autopar.plan.plan import MeshShape

VICTIM = 3  # exit status of a rank that only lost its connection to another
_LOST = ("Connection closed by peer", "Connection reset", "Connection refused", "Broken pipe", "remote process exited")
AXES = ("pp", "dp", "cp", "tp")  # outermost (slowest links) first: ranks next to each other share a tp group


@dataclass
class World:
    """Where this process stands. Without a process group (one device) every collective is a no-op.

    ``states``: the mesh over dp and cp that FSDP shards over, (dp_replicate, the rest of dp with cp) where ZeRO is hybrid.
    """

    shape: MeshShape
    device: torch.device
    mesh: DeviceMesh | None = None
    states: DeviceMesh | None = None
    copies: dist.ProcessGroup | None = None  # all devices that hold the same parameters; None for one
    _teams: dict[tuple[int, ...], dist.ProcessGroup | None] = field(default_factory=dict)

    @classmethod
    def join(cls, shape: MeshShape, device: torch.device | None = None) -> World:
        """Start (or use) torch.distributed and lay the mesh over it.

        Raises PlanError when the number of processes is not the plan's number of devices.
        """
        device = device or local_device()
        if not dist.is_initialized() and "RANK" in os.environ:
            start(device)
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        if ranks != shape.devices:
            counts = " × ".join(f"{axis} {degree}" for axis, degree in shape.degrees.items())
            raise PlanError(
                f"the plan is for {shape.devices} devices ({counts}) but {ranks} process(es) run; "
                f"start it with `torchrun --nproc-per-node {shape.devices}`"
            )
        if not dist.is_initialized():
            return cls(shape, device)
        mesh = init_device_mesh(device.type, tuple(getattr(shape, a) for a in AXES), mesh_dim_names=AXES)
        return cls(shape, device, mesh, states_of(mesh, shape), copies_of(mesh, shape))

    def rank(self, axis: str) -> int:
        return 0 if self.mesh is None else self.mesh.get_local_rank(axis)

    @property
    def replica(self) -> int:
        """Which of the replicas that divide their state over dp_shard × cp devices each this rank belongs to."""
        return self.rank("dp") // self.shape.dp_shard

    @property
    def copy(self) -> int:
        """Which of the devices that hold the same parameters, along dp and cp, this one is."""
        return self.rank("dp") * self.shape.cp + self.rank("cp")

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """The process group along an axis; None where the axis has one device."""
        return None if self.mesh is None or getattr(self.shape, axis) == 1 else self.mesh.get_group(axis)

    @property
    def first(self) -> bool:
        """Whether this is rank 0 of all: the one that prints and writes."""
        return self.mesh is None or dist.get_rank() == 0

    def team(self, pp_ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
        """The group of these pp ranks at this rank's (dp, cp, tp). Collective: every rank must ask, in the same order."""
        assert self.mesh is not None
        if pp_ranks not in self._teams:
            grid, mine = self.mesh.mesh, None
            for d, c, t in itertools.product(*(range(n) for n in (self.shape.dp, self.shape.cp, self.shape.tp))):
                members = [int(grid[p, d, c, t]) for p in pp_ranks]
                made = dist.new_group(members)
                if isinstance(made, dist.ProcessGroup) and dist.get_rank() in members:
                    mine = made
            self._teams[pp_ranks] = mine
        return self._teams[pp_ranks]

    def seed(self, value: int) -> None:
        """Seed the generators that this rank draws from: the CPU's and its device's.

        `torch.manual_seed` seeds every kind of device, and formats a stack trace for each that is not there (0.2 ms).
        """
        torch.default_generator.manual_seed(value)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(value)

    def sum(self, *values: float) -> list[float]:
        """The sums of numbers over all ranks, in float64."""
        if self.mesh is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def largest(self, tensor: torch.Tensor) -> None:
        """Make every element the largest over the ranks that run the same stages, in place."""
        for axis in AXES[1:]:
            if (group := self.group(axis)) is not None:
                dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group)

    def total(self, value: float) -> float:
        """The sum over stages and replicas of a number that is the same on all ranks along tp and cp."""
        if self.shape.pp * self.shape.dp == 1:
            return value
        return self.sum(value if self.rank("tp") == self.rank("cp") == 0 else 0.0)[0]

    def everyone(self, value: Any) -> list[Any]:
        """A picklable value from every rank, in rank order."""
        if self.mesh is None:
            return [value]
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    def first_error(self, error: str) -> str:
        """The first non-empty message of any rank, on all ranks; an empty string where all went well."""
        return next(filter(None, self.everyone(error)), "")

    def barrier(self) -> None:
        if self.mesh is not None:
            dist.barrier()


def states_of(mesh: DeviceMesh, shape: MeshShape) -> DeviceMesh:
    """The mesh that FSDP shards over: dp with cp, in dp_replicate rows where ZeRO is hybrid."""
    if shape.cp > 1:
        degrees = (shape.pp, shape.dp_replicate, shape.sharing, shape.tp)
        names = ("stages", "dp_replicate", "states", "shares")
        made = init_device_mesh(mesh.device_type, degrees, mesh_dim_names=names)
        return made["dp_replicate", "states"] if shape.dp_replicate > 1 else made["states"]
    if shape.dp_replicate > 1:
        return mesh["dp"]._unflatten("dp", (shape.dp_replicate, shape.dp_shard), ("dp_replicate", "dp_shard"))
    return mesh["dp"]


def copies_of(mesh: DeviceMesh, shape: MeshShape) -> dist.ProcessGroup | None:
    """The process group of all devices along dp and cp; None for one."""
    if shape.copies == 1:
        return None
    if shape.cp == 1:
        return mesh.get_group("dp")
    degrees = (shape.pp, shape.copies, shape.tp)
    return init_device_mesh(mesh.device_type, degrees, mesh_dim_names=("stages", "copies", "shares")).get_group(
        "copies"
    )


def lost(message: str) -> bool:
    """Whether an error of torch.distributed only says that another rank has gone."""
    return any(sign in message for sign in _LOST)


def local_device() -> torch.device:
    """The accelerator of this rank, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def start(device: torch.device) -> None:
    """``init_process_group`` from torchrun's environment.

    The store gets a prefix for every attempt: with the plain ``env://`` a restarted gloo job reads the addresses of
    the attempt before and hangs (torch 2.13).
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False if agent else rank == 0)
    attempt = PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=attempt, rank=rank, world_size=ranks)


def leave(status: int = 0) -> NoReturn:
    """End this rank's process with ``status``, without taking its process groups apart.

    Gloo's threads may still hold tensors, or be told of a connection that closes, while Python or
    ``destroy_process_group`` tears them down; now and then that aborts a rank whose work is done (torch 2.13; the
    same report: pytorch pull request 179291). So nothing is torn down: where all went well the ranks wait for each
    other, then each flushes its output and ends at once, and the system closes what is open.
    """
    if status == 0 and dist.is_initialized():
        try:
            dist.barrier()
        except RuntimeError as error:  # another rank failed after this one had finished
            if not lost(str(error)):
                raise
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
