"""Initial values from a seed that do not depend on the plan, made one module at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from autopar.errors import CheckpointError
from autopar.runtime.seeds import seed_of
from autopar.sharding.placement import Placement, local


class Seeded:
    """What the model's own initialization gives, each module with a random stream of its own.

    ``buffers_only``: parameters come from elsewhere, and one that does not is missing, not random.

    ``build`` makes the model; it is called on the meta device, so the whole model is never held. To get a tensor, the
    module that owns it alone is made real, on the CPU and in float64 (float32 random bits differ between CPUs), and
    initialized by its ``reset_parameters()`` and then by ``_init_weights(module)`` of the nearest ancestor that has
    one, where Hugging Face keeps it; also that of the modules around it, since GPT-2's rescales from outside. What
    neither touches gets the value that the constructor gives. (So initialization that a constructor does by hand to
    modules that have a ``reset_parameters()`` is not seen; write it as ``_init_weights``.)
    """

    def __init__(self, build: Callable[[], nn.Module], seed: int = 0, *, buffers_only: bool = False):
        self.build, self.seed = build, seed
        with torch.device("meta"):
            self.model = build()
        self.modules = dict(self.model.named_modules(remove_duplicate=False))
        self.names = frozenset(n for n, _ in _named(self.model))
        given = self.model.named_buffers(remove_duplicate=False) if buffers_only else _named(self.model)
        self._shapes = {n: tuple(t.shape) for n, t in given}
        self._last: tuple[str, dict[str, torch.Tensor | None]] = ("", {})
        self._made: dict[str, torch.Tensor] | None = None

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self._shapes.get(name)

    def read(self, name: str, placement: Placement, rank: int, degree: int) -> torch.Tensor:
        path, _, leaf = name.rpartition(".")
        if self._last[0] != path or not self._last[1]:
            self._last = (path, self._initialize(path))
        value = self._last[1][leaf]
        return local(placement, self._constructed(name) if value is None else value, rank, degree).clone()

    def unexpected(self, known: set[str]) -> list[str]:
        return []

    def _initialize(self, path: str) -> dict[str, torch.Tensor | None]:
        """Values of what the module at ``path`` itself owns; None for what no initialization touches.

        Found out by starting from two different fillings: what still differs afterwards was not touched.
        """
        ones = self._initialize_from(path, 1)
        if not self.modules[path]._buffers and all(bool((t != 1).any()) for t in ones.values()):
            return dict(ones)  # nothing was left as it was filled: one start is enough
        zeros = self._initialize_from(path, 0)
        return {k: t if torch.equal(t, zeros[k]) else None for k, t in ones.items()}

    def _initialize_from(self, path: str, filling: int) -> dict[str, torch.Tensor]:
        module = self.modules[path]
        parameters = {k: p for k, p in module._parameters.items() if p is not None}
        buffers = {k: b for k, b in module._buffers.items() if b is not None}
        real = {k: nn.Parameter(_filled(p, filling), requires_grad=_floats(p)) for k, p in parameters.items()}
        module._parameters.update(real)
        module._buffers.update({k: torch.full(b.shape, filling, dtype=b.dtype) for k, b in buffers.items()})
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of(self.seed, path))
                self._run(path, module)
            own = {k: t for k in buffers if (t := module._buffers[k]) is not None}
            return own | {k: p.detach() for k, p in real.items()}
        finally:
            module._parameters.update(parameters)
            module._buffers.update(buffers)

    def _run(self, path: str, module: nn.Module) -> None:
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
        around = [path]
        while around[-1]:
            around.append(around[-1].rpartition(".")[0])
        chain = [self.modules[p] for p in around]
        for i, member in enumerate(chain):
            owner = next((m for m in chain[i:] if callable(getattr(m, "_init_weights", None))), None)
            if owner is not None:
                owner._init_weights(member)  # type: ignore[operator]

    def _constructed(self, name: str) -> torch.Tensor:
        """A buffer or parameter that only the constructor sets, as the constructor sets it."""
        if self._made is None:
            with torch.random.fork_rng(devices=[]), _parameters_with_reset_on_meta():
                torch.manual_seed(seed_of(self.seed, ""))
                model = self.build()
            self._made = {n: t.detach() for n, t in _named(model) if t.device.type != "meta"}
        if name not in self._made:
            raise CheckpointError(
                f"{name} has no initial value: the model's initialization leaves it as it is, and so does its constructor"
            )
        return self._made[name]


def _named(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _floats(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point()


def _filled(like: torch.Tensor, filling: int) -> torch.Tensor:
    return torch.full(like.shape, filling, dtype=torch.float64 if _floats(like) else like.dtype)


@contextmanager
def _parameters_with_reset_on_meta() -> Iterator[None]:
    """While constructing, parameters of modules with ``reset_parameters`` go to meta: others know how to make them."""
    register = nn.Module.register_parameter

    def patched(self: nn.Module, name: str, param: Any) -> None:
        if param is not None and callable(getattr(self, "reset_parameters", None)):
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = patched
    try:
        yield
    finally:
        nn.Module.register_parameter = register
