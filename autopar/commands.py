"""What each command of the command line does. Heavy modules are imported where they are used."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from autopar import cli
from autopar.errors import AutoparError, SpecError

if TYPE_CHECKING:
    from autopar.plan.plan import PlanDocument
    from autopar.spec.job import Job

BUILD_FILES = ("job.yaml", "plan.json", "manifest.json")


def read_job(path_or_name: str, sets: list[str]) -> Job:
    """A job with everything checked that can be checked without tracing."""
    from autopar.spec.check import check_job
    from autopar.spec.load import load_job

    job = load_job(path_or_name, sets)
    check_job(job)
    if job.passes:
        from autopar.ir.rewrite import load

        for entry in job.passes:
            load(entry)
    return job


def plan(args: argparse.Namespace, out: TextIO) -> int:
    """`autopar plan`: one job or several."""
    from autopar.plan.file import writable

    if args.output:
        if len(args.jobs) > 1:
            raise SpecError("plan: -o writes one plan; give one job, or --json and a pipe for several")
        writable(args.output)
    if len(args.jobs) > 1:
        return _plan_all(args, out)
    job = read_job(args.jobs[0], args.sets)
    cache: dict[Any, Any] = {}
    document = _planned(job, cache, args.output)
    _show_plan(document, job, args.json, out)
    if not args.json and any(v is not None for v in job.pins.model_dump().values()):
        from autopar import api

        out.flush()
        out.write(_advice(api.advice(job, document, cache, pins_only=True)))
    return cli.EXIT_DONE


def _planned(job: Job, cache: dict[Any, Any], output: str | None = None) -> PlanDocument:
    from autopar import api

    document = api.plan_job(job, cache=cache)
    if output:
        from autopar.plan.file import write_plan

        write_plan(document, output)
    return document


def _show_plan(document: PlanDocument, job: Job, as_json: bool, out: TextIO) -> None:
    if as_json:
        out.write(document.model_dump_json() + "\n")
        return
    from autopar.plan.text import summary

    out.write(summary(document, f"{job.model} on {job.cluster.name if job.cluster else ''}") + "\n")


def _plan_all(args: argparse.Namespace, out: TextIO) -> int:
    """Every job in order; a job that is wrong costs its own line, not the others'."""
    statuses, cache = {cli.EXIT_DONE}, {}
    for i, name in enumerate(args.jobs):
        if not args.json:
            out.write(("\n" if i else "") + f"== {name}\n")
        try:
            job = read_job(name, args.sets)
            document = _planned(job, cache)
        except Exception as error:
            ours = isinstance(error, AutoparError)
            message = str(error) if ours else cli.fault(error)
            statuses.add(cli.EXIT_WRONG if ours else cli.EXIT_FAULT)
            print(f"autopar: {name}: {message}", file=sys.stderr, flush=True)
            if args.json:
                cli.write_json(out, {"error": message})
        else:
            _show_plan(document, job, args.json, out)
        out.flush()
    return next(s for s in (cli.EXIT_FAULT, cli.EXIT_WRONG, cli.EXIT_DONE) if s in statuses)


def compile_(args: argparse.Namespace, out: TextIO) -> int:
    """`autopar compile`: the executable in a folder."""
    from autopar.plan.file import read_plan

    job = read_job(args.job, args.sets)
    document = read_plan(args.plan) if args.plan else None
    made = _compiled(job, Path(args.output), document)
    if args.json:
        cli.write_json(out, {"folder": str(made), "files": sorted(_files(made))})
    else:
        out.write(f"wrote {made}; start it with `autopar run {made}` or `torchrun {made}/train.py`\n")
    return cli.EXIT_DONE


def _compiled(job: Job, folder: Path, document: PlanDocument | None = None) -> Path:
    """Write the executable; where that fails, a folder that was made for it is taken away again."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    _make_usable(folder)
    from autopar import api

    try:
        return api.compile_job(job, folder, plan=document)
    except BaseException:
        for place in missing:
            with contextlib.suppress(OSError):  # not empty: what was written before the failure stays to be looked at
                place.rmdir()
        raise


def _make_usable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise SpecError(f"{folder} is a file; the executable needs a folder")
    if folder.is_dir() and any(folder.iterdir()) and not _is_build(folder):
        raise SpecError(f"{folder} holds other things; give a new folder, or a build folder to write again")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(f"cannot write {folder}: {error.strerror}") from None


def _is_build(folder: Path) -> bool:
    return any((folder / name).is_file() for name in BUILD_FILES)


def _files(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def run(args: argparse.Namespace, out: TextIO) -> int:
    """`autopar run`: compile if needed, then train through torchrun on this machine."""
    folder = Path(args.job)
    if folder.is_dir():
        _needs_build(folder)
        if args.sets:
            raise SpecError(f"run: --set changes a job, but {folder} is a build folder; compile the job again")
    else:
        folder = _built(args)
    from autopar.runtime import launch

    status = launch.run(folder, resume=args.resume)
    if args.recalibrate and status == cli.EXIT_DONE:
        from autopar import recalibration

        print(recalibration.text(recalibration.recalibrated(folder)), file=sys.stderr, flush=True)
    if args.json and (folder / "summary.json").is_file():
        cli.write_json(out, json.loads((folder / "summary.json").read_text(encoding="utf-8")))
    return status


def _needs_build(folder: Path) -> None:
    missing = [name for name in BUILD_FILES if not (folder / name).is_file()]
    if missing:
        raise SpecError(
            f"{folder} is no build folder: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing "
            f"(`autopar compile JOB -o {folder}` makes one)"
        )


def _built(args: argparse.Namespace) -> Path:
    """The job's build folder, compiled unless it holds this very job already."""
    job = read_job(args.job, args.sets)
    folder = Path(args.output or Path("builds") / Path(args.job).stem)
    whole = all((folder / name).is_file() for name in BUILD_FILES)
    if whole and (folder / "job.yaml").read_text(encoding="utf-8") == job.dump():
        return folder
    print(f"autopar: compiling into {folder}", file=sys.stderr, flush=True)
    return _compiled(job, folder)


def verify(args: argparse.Namespace, out: TextIO) -> int:
    """`autopar verify`: exit status 0 where the executable equals the model."""
    job = read_job(args.job, args.sets)
    from autopar import api

    proof = api.verify_job(job, args.ranks, shrink=not args.no_shrink)
    if args.json:
        cli.write_json(out, proof)
    else:
        word = "equal" if proof["equal"] else "NOT equal"
        out.write(f"{word} to one process, on {proof['ranks']} ranks over {proof['steps']} steps\n")
        for part in ("loss", "gradient", "parameter"):
            out.write(f"  {part + ' error':<16} {proof[part + '_error']:.3g}\n")
        out.write(f"  worst            {proof['worst']}\n")
        if "note" in proof:
            out.write(f"  {proof['note']}\n")
    return cli.EXIT_DONE if proof["equal"] else cli.EXIT_FAULT


def explain(args: argparse.Namespace, out: TextIO) -> int:
    """`autopar explain`: of a job (which is planned), a plan file or a build folder."""
    cache: dict[Any, Any] = {}
    document = _document(args.job, args.sets, cache)
    other = _document(args.diff, []) if args.diff else None
    from autopar.plan import explain as module

    text = module.explain(document, why=args.why, other=other)
    found = {}
    if _plan_file(args.job) is None and (args.why or not args.diff):
        from autopar import api

        found = api.advice(read_job(args.job, args.sets), document, cache, args.why)
    if args.json:
        cli.write_json(out, {"explanation": text, "plan": document.model_dump(mode="json"), "advice": found})
    else:
        out.write(text.rstrip("\n") + "\n" + _advice(found))
    return cli.EXIT_DONE


def _advice(found: dict[str, list[str]]) -> str:
    return "".join(f"\n{heading}\n" + "".join(f"  {line}\n" for line in lines) for heading, lines in found.items())


def _document(name: str, sets: list[str], cache: dict[Any, Any] | None = None) -> PlanDocument:
    """The plan of a plan file, a build folder, or a job."""
    found = _plan_file(name)
    if found is None:
        return _planned(read_job(name, sets), {} if cache is None else cache)
    if sets:
        raise SpecError(f"--set {sets[0]}: changes a job, but {name} is a plan that is made already")
    from autopar.plan.file import read_plan

    return read_plan(found)


def _plan_file(name: str) -> Path | None:
    """The plan file that a command was given, also as a build folder; None for a job."""
    path = Path(name)
    if path.is_dir():
        _needs_build(path)
        return path / "plan.json"
    return path if path.suffix == ".json" and path.is_file() and not _is_job(path) else None


def _is_job(path: Path) -> bool:
    """Whether a JSON file is a job: jobs may be written in JSON too."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and "cluster" in data and "plan" not in data


def view(args: argparse.Namespace, out: TextIO) -> int:
    """`autopar view`: one HTML page."""
    from autopar.plan.file import writable, write_text

    writable(args.output)
    from autopar import api

    if _plan_file(args.job) is None:
        job, cache = read_job(args.job, args.sets), {}
        page = api.page(_planned(job, cache), api.program_of(job, cache)[0])
    else:
        page = api.page(_document(args.job, args.sets))
    write_text(args.output, page)
    if args.json:
        cli.write_json(out, {"page": args.output})
    else:
        out.write(f"wrote {args.output}\n")
    return cli.EXIT_DONE


def calibrate(args: argparse.Namespace, out: TextIO) -> int:
    """`autopar calibrate`: this machine as a cluster file."""
    from autopar.plan.file import writable, write_text

    if args.output:
        writable(args.output)
    from autopar.cluster import calibrate as module

    measured = module.calibrate(args.devices)
    text = module.as_yaml(measured)
    if args.output:
        write_text(args.output, text)
    if args.json:
        cli.write_json(out, measured)
    elif args.output:
        out.write(f"wrote {args.output}\n")
    else:
        out.write(text)
    return cli.EXIT_DONE


def compare(args: argparse.Namespace, out: TextIO) -> int:
    """`autopar compare`: architectures side by side."""
    from autopar.compare.rows import compare_models
    from autopar.compare.table import page, table
    from autopar.plan.file import writable, write_text

    if args.output:
        writable(args.output)
    rows = compare_models(args.models, args.length)
    if args.output:
        write_text(args.output, page(rows, args.length))
    if args.json:
        cli.write_json(out, rows)
    else:
        out.write(f"wrote {args.output}\n" if args.output else table(rows))
    return cli.EXIT_DONE


HANDLERS: dict[str, Callable[[argparse.Namespace, TextIO], int]] = {
    "plan": plan,
    "compile": compile_,
    "run": run,
    "verify": verify,
    "explain": explain,
    "view": view,
    "calibrate": calibrate,
    "compare": compare,
}
