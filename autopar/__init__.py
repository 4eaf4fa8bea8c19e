"""autopar: a declarative graph compiler and auto-parallelizer for PyTorch.

    import autopar
    executable = autopar.compile(model, "local-cpu", batch=batch)
    executable.save("build")           # readable PyTorch, runs under torchrun

Names are imported when they are first used: `import autopar` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autopar.api import compile, load, rewrite, trace
    from autopar.errors import AutoparError
    from autopar.executable import Executable
    from autopar.ir.program import Program
    from autopar.ir.rewrite import Numerics, Pass
    from autopar.plan.plan import Plan
    from autopar.spec.job import Job

__version__ = "0.1.0"
_HOMES = {
    "compile": "api", "load": "api", "rewrite": "api", "trace": "api", "AutoparError": "errors",
    "Executable": "executable", "Program": "ir.program", "Pass": "ir.rewrite", "Numerics": "ir.rewrite",
    "Plan": "plan.plan", "Job": "spec.job", "Cluster": "cluster.cluster",
}  # fmt: skip
__all__ = [
    "AutoparError", "Executable", "Job", "Numerics", "Pass", "Plan", "Program", "compile", "load", "rewrite", "trace",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'autopar' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"autopar.{_HOMES[name]}"), name)
