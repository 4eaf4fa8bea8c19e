"""Why a model could not be traced, in one line: which module, and what would be right."""

from __future__ import annotations

from torch import nn

HINTS = {
    "data-dependent": "its control flow or a size depends on a tensor's values; use torch.where or fixed sizes",
    "Cannot copy out of meta": "it needs a tensor's values while it is traced (.item(), .tolist(), printing, numpy)",
    "cannot be called on meta": "it needs a tensor's values while it is traced (.item(), .tolist(), printing, numpy)",
    "unbacked symint": "a size depends on a tensor's values",
    "tensor attribute": "it keeps tensors in a list or dict of its own from call to call",
    "two devices": "it makes a tensor on a device of its own; make it on its input's device",
}


def first_line(problem: BaseException) -> str:
    text = str(problem).strip()
    return text.splitlines()[0][:160] if text else type(problem).__name__


def explained(problem: BaseException, model: nn.Module) -> str:
    """Which module could not be traced, and why, from the deepest frame of the user's model."""
    text = str(problem)
    hint = next((why for sign, why in HINTS.items() if sign.lower() in text.lower()), "")
    reason = f"{hint} ({first_line(problem)})" if hint else first_line(problem)
    return f"{place(problem, model) or 'the model'} cannot be traced: {reason}"


def place(problem: BaseException, model: nn.Module) -> str:
    """``layers.3.mlp (Gate, model.py:12)``: the module of ``model`` whose forward was running, and its line."""
    paths = {id(m): name for name, m in model.named_modules()}
    where = ""
    for error in (problem, problem.__cause__, problem.__context__):
        step = error.__traceback__ if error is not None else None
        while step is not None:
            owner, code = step.tb_frame.f_locals.get("self"), step.tb_frame.f_code
            if isinstance(owner, nn.Module) and id(owner) in paths and code.co_name == "forward":
                line = f"{type(owner).__name__}, {code.co_filename.rsplit('/', 1)[-1]}:{step.tb_lineno}"
                where = f"{paths[id(owner)]} ({line})" if paths[id(owner)] else f"the model ({line})"
            step = step.tb_next
        if where:
            return where
    return where
