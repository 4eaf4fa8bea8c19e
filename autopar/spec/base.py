"""What all specs share: frozen models, numbers that are numbers, and errors that say where and what would be right."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from autopar.errors import SpecError, suggestion
from autopar.spec import quantity
from autopar.spec.quantity import short
from autopar.spec.source import Path_, Source


class Spec(BaseModel):
    """Immutable data of a spec file; unknown keys are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


def _whole(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"must be a whole number, not {short(value)}")
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError(f"must be a whole number, not {short(value)}")
        return int(value)
    return value


def _real(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"must be a number, not {short(value)}")
    return value


def _flag(value: object) -> object:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, not {short(value)}")
    return value


def _texts(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Count = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=2**53)]
Whole = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=2**63 - 1)]
Real = Annotated[float, BeforeValidator(_real), Field(allow_inf_nan=False)]
NonNegative = Annotated[float, BeforeValidator(_real), Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, BeforeValidator(_real), Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, BeforeValidator(_real), Field(ge=0, lt=1, allow_inf_nan=False)]
Efficiency = Annotated[float, BeforeValidator(_real), Field(gt=0, le=1, allow_inf_nan=False)]
Flag = Annotated[bool, BeforeValidator(_flag)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]
Memory = Annotated[int, BeforeValidator(quantity.bytes_)]
Bandwidth = Annotated[float, BeforeValidator(quantity.bandwidth)]
Seconds = Annotated[float, BeforeValidator(quantity.seconds)]
FlopRate = Annotated[float, BeforeValidator(quantity.flops)]

SpecT = TypeVar("SpecT", bound=BaseModel)


def build(kind: type[SpecT], source: Source, noun: str) -> SpecT:
    """The source's data as a ``kind``, or a SpecError that names the place, the key and what would be right."""
    if not isinstance(source.data, dict):
        held = {list: "a list", type(None): "empty"}.get(type(source.data), short(source.data))
        needed = [name for name, field in kind.model_fields.items() if field.is_required()]
        keys = ", ".join(needed or list(kind.model_fields)[:3])
        raise source.error(f"{noun} must be a mapping with keys such as {keys}; this is {held}")
    try:
        return kind.model_validate(source.data)
    except ValidationError as error:
        raise SpecError(explain(error, kind, source, noun)) from None


def explain(error: ValidationError, kind: type[BaseModel], source: Source, noun: str) -> str:
    """One line for each thing that is wrong, the first five."""
    lines = list(dict.fromkeys(_line(item, kind, source, noun) for item in error.errors()))
    return "\n".join(lines[:5] + ([f"… and {len(lines) - 5} more"] if len(lines) > 5 else []))


def _line(item: Any, kind: type[BaseModel], source: Source, noun: str) -> str:
    path = _written(item["loc"], source.data)
    where, key = source.where(path), ".".join(map(str, path))
    holder = ".".join(map(str, path[:-1])) or noun
    if item["type"] == "extra_forbidden":
        known = fields_at(kind, path[:-1])
        near = suggestion(str(path[-1]), known)
        return f"{where}: unknown key '{path[-1]}' in {holder}{near or _keys(known)}"
    if item["type"] == "missing" and isinstance(item["loc"][-1], int):
        return f"{where}: {key} must have at least {item['loc'][-1] + 1} entries"
    if item["type"] == "missing":
        return f"{where}: the key '{path[-1] if path else item['loc'][-1]}' is missing in {holder}"
    return f"{where}: {key or noun} {complaint(item)}"


def _written(location: tuple[Any, ...], data: Any) -> Path_:
    """The part of pydantic's location that is really a path in the data (it adds names of union members and types)."""
    path: list[str | int] = []
    for i, part in enumerate(location):
        if isinstance(data, dict) and (part in data or i == len(location) - 1):
            data = data.get(part)
        elif isinstance(data, (list, tuple)) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            continue
        path.append(part)
    return tuple(path)


WANTED = {  # pydantic's kind of error → what would be right
    "string_type": "text", "tuple_type": "a list", "list_type": "a list", "dict_type": "a mapping", "model_type": "a mapping",
    "model_attributes_type": "a mapping", "int_type": "a whole number", "int_parsing": "a whole number",
    "int_from_float": "a whole number", "float_type": "a number", "float_parsing": "a number", "bool_type": "true or false",
    "bool_parsing": "true or false",
}  # fmt: skip


def complaint(item: Any) -> str:
    """What is wrong with a value, from one of pydantic's errors, as the end of a sentence that begins with its key."""
    kind, context, value = item["type"], item.get("ctx", {}), item.get("input")
    shown = short(value)
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        known = context["expected"]
        words = [w.strip("'") for w in known.replace(" or ", ", ").split(", ")]
        return f"is {shown}, which is unknown{suggestion(str(value), words)} (one of: {', '.join(words)})"
    bounds = {"greater_than_equal": "at least {ge}", "greater_than": "more than {gt}"}
    bounds |= {"less_than_equal": "at most {le}", "less_than": "less than {lt}", "finite_number": "finite"}
    if kind in bounds:
        return f"must be {bounds[kind].format(**context)}, not {shown}"
    if kind in WANTED:
        return f"must be {WANTED[kind]}, not {shown}"
    if kind == "too_short":
        least = context["min_length"]
        return f"must have at least {least} {'entry' if least == 1 else 'entries'}, not {context['actual_length']}"
    message = item["msg"]
    return f"{message[0].lower()}{message[1:]} (found {shown})"


def _keys(known: list[str]) -> str:
    return f" (keys there: {', '.join(known)})" if known else ""


def fields_at(kind: type[BaseModel], path: Path_) -> list[str]:
    """The keys allowed in the mapping at ``path`` of a spec of this kind."""
    here: Any = kind
    for part in path:
        if not (isinstance(here, type) and issubclass(here, BaseModel)) or part not in here.model_fields:
            if isinstance(part, int):
                continue
            return []
        here = _model_in(here.model_fields[str(part)].annotation)
    return list(here.model_fields) if isinstance(here, type) and issubclass(here, BaseModel) else []


def _model_in(annotation: Any) -> Any:
    """The first pydantic model inside an annotation such as ``tuple[Link, ...] | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inside = (_model_in(a) for a in getattr(annotation, "__args__", ()))
    return next((model for model in inside if model is not None), None)
