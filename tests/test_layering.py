"""Which part may import which: the house's table, held against every import in the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {  # part → parts it builds on; what those build on is allowed too
    "errors": set(),
    "spec": {"errors"},
    "cluster": {"spec"},
    "ir": {"spec"},
    "kernels": {"errors"},
    "models": {"spec", "kernels"},
    "sharding": {"ir", "cluster", "kernels"},
    "cost": {"sharding", "ir", "cluster"},
    "plan": {"cost", "sharding", "cluster"},
    "solve": {"plan"},
    "lower": {"plan", "sharding", "ir"},
    "compare": {"models", "solve"},
    "runtime": {"lower", "plan", "cluster"},
}
FORBIDDEN = {  # although a part in between may
    "plan": {"solve"},
    "lower": {"cost", "solve"},
    "runtime": {"solve", "cost"},
}
EVERYTHING = {"api", "cli", "commands", "emulate", "executable", "proof", "recalibration", "__init__"}
PASSES = {"autopar.ir", "autopar.kernels", "autopar.errors"}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, full module name) of every import of a file, relative and lazy ones too."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            if module in ("autopar", "passes", "specs"):
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def part(module: str) -> str:
    """`autopar.ir.ops` → `ir`."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def below(name: str) -> set[str]:
    """All parts that a part may import."""
    found: set[str] = {name}
    for other in ALLOWED[name]:
        found |= below(other)
    return found - FORBIDDEN.get(name, set())


def test_the_table_names_every_part_of_the_package():
    parts = {path.name for path in (ROOT / "autopar").iterdir() if path.is_dir() and list(path.glob("*.py"))}
    files = {path.stem for path in (ROOT / "autopar").glob("*.py")}
    assert parts <= set(ALLOWED), parts - set(ALLOWED)
    assert files <= EVERYTHING | {"errors"}, files - EVERYTHING


@pytest.mark.parametrize("name", ALLOWED)
def test_a_part_imports_only_what_it_may(name):
    here = ROOT / "autopar" / name
    files = modules(f"autopar/{name}") if here.is_dir() else [here.with_suffix(".py")]
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in files
        for line, module in imported(path)
        if module.split(".")[0] == "autopar" and part(module) not in below(name)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_mechanism_never_imports_passes_or_specs():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in modules("autopar")
        for line, module in imported(path)
        if module.split(".")[0] in ("passes", "specs")
    ]
    assert not wrong, "\n".join(wrong)


def test_passes_see_the_program_and_never_the_cluster_the_solver_or_the_runtime():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in modules("passes")
        for line, module in imported(path)
        if module.split(".")[0] == "autopar" and ".".join(module.split(".")[:2]) not in PASSES
    ]
    assert not wrong, "\n".join(wrong)


def test_specs_hold_data_only():
    assert [path.name for path in modules("specs")] == ["__init__.py"]
    tree = ast.parse((ROOT / "specs" / "__init__.py").read_text(encoding="utf-8"))
    assert all(isinstance(node, ast.Expr) for node in tree.body)


def test_help_and_specs_import_nothing_heavy():
    """Seen in the source: no module of cli, spec, cluster or errors imports torch or a solver at its top."""
    heavy = {"torch", "transformers", "ortools", "networkx", "numpy", "sympy"}
    files = [ROOT / "autopar" / f"{name}.py" for name in ("cli", "commands", "errors", "__init__")]
    files = [path for path in files if path.exists()] + modules("autopar/spec") + modules("autopar/cluster")
    for path in files:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not heavy & {name.split(".")[0] for name in names}, f"{path}:{node.lineno}"
