"""Where a job's model comes from: a name, declared sizes, a Hugging Face checkpoint or type, or a Python function."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import model_serializer

from autopar.errors import CheckpointError, suggestion
from autopar.spec import library
from autopar.spec.base import Spec, build
from autopar.spec.quantity import short
from autopar.spec.source import Source, read

if TYPE_CHECKING:
    from autopar.spec.model import DecoderSpec


class ModelOrigin(Spec):
    """One of four forms; the others' fields are empty.

    ``name``: the file in `models/` that the rest was read from, or "". ``declared``: the fields of a DecoderSpec
    over its family's defaults; with ``weights``, those of a Hugging Face checkpoint, which gives the values too.
    ``hf``: a checkpoint's folder, or a model type with its ``config``.
    ``python``: ``package.module:function``, called with ``kwargs``, which returns an `nn.Module`.
    """

    name: str = ""
    declared: dict[str, Any] | None = None
    weights: str | None = None
    hf: str | None = None
    config: dict[str, Any] | None = None
    python: str | None = None
    kwargs: dict[str, Any] = {}

    @model_serializer
    def _written(self) -> Any:
        if self.name:
            return self.name
        if self.weights is not None:
            return {"hf": self.weights, "declarative": True}
        if self.declared is not None:
            return dict(self.declared)
        if self.hf is not None:
            return {"hf": self.hf} | ({} if self.config is None else {"config": self.config})
        return {"python": self.python} | ({"kwargs": self.kwargs} if self.kwargs else {})

    @property
    def decoder(self) -> DecoderSpec | None:
        """The declared decoder, family's defaults filled in; None for the other forms."""
        if self.declared is None:
            return None
        from autopar.spec.model import resolve

        return resolve(self.declared, f"model {self.name}".strip())

    @property
    def key(self) -> str:
        """Equal for models that are built alike."""
        return repr((self.declared, self.weights, self.hf, self.config, self.python, self.kwargs))

    def __str__(self) -> str:
        if self.name:
            return self.name
        return self.weights or self.hf or self.python or str((self.declared or {}).get("family", "model"))


def read_origin(source: Source) -> ModelOrigin:
    """A job's `model:` entry: a name, a path of a model file, or one of the inline forms."""
    return build(ModelOrigin, Source(origin_fields(source), source.label, source.marks), "model")


def origin_fields(source: Source) -> dict[str, Any]:
    """The fields of a ModelOrigin from any of the written forms, all its cheap errors raised."""
    data = source.data
    if isinstance(data, str):
        return _named(data, source)
    if not isinstance(data, dict):
        raise source.error(f"model must be a name or a mapping, not {short(data)}")
    if "name" in data:
        return _changed(data, source)
    forms = [form for form in ("family", "hf", "python") if form in data]
    if len(forms) != 1:
        found = " and ".join(f"'{f}'" for f in forms) if forms else "none of them"
        raise source.error(f"model needs exactly one of 'family', 'hf', 'python'; found {found}")
    return {"family": _declared, "hf": _hugging_face, "python": _python}[forms[0]](data, source)


def _named(name: str, source: Source) -> dict[str, Any]:
    path = library.lookup("models", name)
    if path is None and name.endswith((".yaml", ".yml", ".json")):
        beside = Path(source.where().rpartition(":")[0]).parent / name
        return origin_fields(read(beside if beside.is_file() else Path(name)))
    found = read(path or library.find("models", name, source.where()))
    return origin_fields(found) | {"name": name}


def _changed(data: dict[str, Any], source: Source) -> dict[str, Any]:
    """``{name: llama-7b, layers: 4}``: a named declared model with some fields changed."""
    fields = _named(str(data["name"]), source.sub("name"))
    changes = {key: value for key, value in data.items() if key != "name"}
    if not changes:
        return fields
    if fields.get("declared") is None:
        message = f"model '{data['name']}' is not declared by its sizes, so {', '.join(changes)} cannot be changed"
        raise source.error(message)
    if fields.get("weights") is not None:
        raise source.error(
            f"model '{data['name']}' has the weights of a checkpoint, so {', '.join(changes)} cannot change"
        )
    from autopar.spec.model import merge

    return _declared(merge(fields["declared"], changes), source)


def _declared(data: dict[str, Any], source: Source) -> dict[str, Any]:
    from autopar.spec.model import resolve

    resolve(data, source.where())
    return {"declared": data}


def _hugging_face(data: dict[str, Any], source: Source) -> dict[str, Any]:
    _only(data, ("hf", "config", "declarative"), source)
    name, config = data["hf"], data.get("config")
    if not isinstance(name, str) or not name:
        raise source.error(f"model.hf must be the folder of a checkpoint or a model type, not {short(name)}", ("hf",))
    if config is not None and not isinstance(config, dict):
        raise source.error("model.config must be a mapping of the model type's options", ("config",))
    folder = place(name)
    if folder.is_dir() and not (folder / "config.json").is_file() and not any(folder.glob("*.gguf")):
        message = f"the folder '{name}' holds no config.json and no GGUF file, so it is no checkpoint"
        raise source.error(message, ("hf",))
    if config is None and not folder.exists():
        message = (
            f"there is no checkpoint folder {short(name)} (nothing is downloaded); a model type needs `config: {{…}}`"
        )
        raise source.error(message, ("hf",))
    if data.get("declarative") not in (None, True, False):
        raise source.error(
            f"model.declarative must be true or false, not {short(data['declarative'])}", ("declarative",)
        )
    if data.get("declarative"):
        if config is not None:
            raise source.error("model.declarative reads a checkpoint, which has its own config", ("config",))
        return _as_declared(folder, source)
    return {"hf": name, "config": config}


def _as_declared(path: Path, source: Source) -> dict[str, Any]:
    """A checkpoint as the declared model that it is."""
    from autopar.spec.reference import read_spec

    files = sorted(path.glob("*.gguf")) if path.is_dir() and not (path / "config.json").is_file() else []
    if len(files) > 1:
        raise source.error(f"the folder '{path}' holds {len(files)} GGUF files; name one of them", ("hf",))
    path = files[0] if files else path
    try:
        return {"declared": read_spec(path).model_dump(), "weights": str(path)}
    except CheckpointError as error:
        raise source.error(f"model.hf: {error}", ("hf",)) from error


def place(name: str) -> Path:
    """The path that a name may be; a name that can be none (too long, no such user's home) is one that is not there."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError):
        return Path("/no such place")
    return path


def _python(data: dict[str, Any], source: Source) -> dict[str, Any]:
    _only(data, ("python", "kwargs"), source)
    name, kwargs = data["python"], data.get("kwargs")
    module, _, function = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not module or not function:
        raise source.error(f"model.python must be 'package.module:function', not {short(name)}", ("python",))
    if kwargs is not None and not isinstance(kwargs, dict):
        raise source.error("model.kwargs must be a mapping of the function's arguments", ("kwargs",))
    return {"python": name, "kwargs": kwargs or {}}


def _only(data: dict[str, Any], known: tuple[str, ...], source: Source) -> None:
    for key in data:
        if key not in known:
            near = suggestion(key, known) or f" (keys there: {', '.join(known)})"
            raise source.error(f"unknown key '{key}' in model{near}", (key,))
