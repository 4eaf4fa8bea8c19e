"""Initial values from a seed that do not depend on the plan, made one module at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from autopar.runtime.seeds import seed_of
from autopar.sharding.placement import Placement, local


class Seeded:
    """What the model's own initialization gives, each module with a random stream of its own.

    ``build`` makes the model; it is called on the meta device, so the whole model is never held. To get a tensor, the
    module that owns it alone is made real, on the CPU and in float64 (float32 random bits differ between CPUs), and
    initialized by its ``reset_parameters()`` and then by ``_init_weights(module)`` of the nearest ancestor that has
    one, where Hugging Face keeps it; also that of the modules around it, since GPT-2's rescales from outside. What
    neither touches, and all buffers, get the values that the constructor gives.
    """

    def __init__(self, build: Callable[[], nn.Module], seed: int = 0):
        self.build, self.seed = build, seed
        with torch.device("meta"):
            self.model = build()
        self.modules = dict(self.model.named_modules(remove_duplicate=False))
        self._shapes = {n: tuple(t.shape) for n, t in _named(self.model)}
        self._last: tuple[str, dict[str, torch.Tensor]] = ("", {})
        self._made: dict[str, torch.Tensor] | None = None

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self._shapes.get(name)

    def read(self, name: str, placement: Placement, rank: int, degree: int) -> torch.Tensor:
        path, _, leaf = name.rpartition(".")
        if leaf in self.modules[path]._buffers:
            return local(placement, self._constructed()[name], rank, degree)
        if self._last[0] != path or not self._last[1]:
            self._last = (path, self._initialize(path))
        return local(placement, self._last[1][leaf], rank, degree).clone()

    def unexpected(self, known: set[str]) -> list[str]:
        return []

    def _initialize(self, path: str) -> dict[str, torch.Tensor]:
        """The values of the parameters that the module at ``path`` itself owns."""
        module = self.modules[path]
        meta = {k: p for k, p in module._parameters.items() if p is not None}
        real = {k: nn.Parameter(_untouched(p), requires_grad=_floats(p)) for k, p in meta.items()}
        module._parameters.update(real)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of(self.seed, path))
                self._run(path, module)
        finally:
            module._parameters.update(meta)
        prefix = f"{path}." if path else ""
        return {k: self._constructed()[prefix + k] if _is_untouched(p) else p.detach() for k, p in real.items()}

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

    def _constructed(self) -> dict[str, torch.Tensor]:
        """Buffers, and those parameters that only the constructor sets, as the constructor sets them."""
        if self._made is None:
            with torch.random.fork_rng(devices=[]), _parameters_with_reset_on_meta():
                torch.manual_seed(seed_of(self.seed, ""))
                model = self.build()
            self._made = {n: t.detach() for n, t in _named(model) if t.device.type != "meta"}
        return self._made


def _named(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _floats(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point()


def _untouched(like: torch.Tensor) -> torch.Tensor:
    """NaN everywhere: an initialization that leaves it so has not touched it."""
    if _floats(like):
        return torch.full(like.shape, torch.nan, dtype=torch.float64)
    return torch.zeros(like.shape, dtype=like.dtype)


def _is_untouched(tensor: torch.Tensor) -> bool:
    return not _floats(tensor) or bool(tensor.detach().isnan().any())


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
