"""The command line: ``autopar plan | compile | run | verify | explain | view | calibrate | compare``."""

from __future__ import annotations

import argparse
import contextlib
import errno
import gc
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from autopar.errors import AutoparError, SpecError, suggestion

EXIT_DONE, EXIT_FAULT, EXIT_WRONG, EXIT_INTERRUPTED = 0, 1, 2, 130
TRACEBACK = "AUTOPAR_TRACEBACK"
ENVIRONMENT = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}  # a full disk, no permission
LONGEST = 2000  # characters of a message on stderr
COLLECT = 100_000
"""Objects made between two looks for unreachable cycles: imports and traces make many that stay, and looking through them at
Python's own 700 took a seventh of the time of a plan. Peak memory hardly grows: graphs are freed by counting."""

_JOB = "a job file, or the name of one in specs/jobs"
_COMMANDS: dict[str, tuple[str, str]] = {
    "plan": (
        "choose a parallel plan",
        "Trace the model, apply the passes and choose the fastest plan that fits the cluster; print what it costs and "
        "how far from the best it can be. With several jobs and --json: one line of JSON for each job, in order.",
    ),
    "compile": (
        "write the executable",
        "Plan the job (or take the plan of --plan) and write the executable into a folder: plain PyTorch with explicit "
        "collectives, one module for each stage, and train.py, which torchrun starts.",
    ),
    "run": (
        "train on this machine",
        "Compile the job if needed, start it through torchrun on this machine and train; print loss, tokens a second, "
        "predicted and measured step time and memory. A build folder is run as it is.",
    ),
    "verify": (
        "prove the executable equal to the model",
        "Run the emitted executable on local processes in float64, the model's sizes shrunk, and compare loss, every "
        "gradient and the parameters after two steps with the unmodified model on one process.",
    ),
    "explain": (
        "say why the plan is as it is",
        "The ledger of a plan's cost, what binds it, and the runners-up; --why tells why one operator is placed as it "
        "is, --diff compares with another plan.",
    ),
    "view": (
        "draw the plan as a web page",
        "Write one HTML page that needs nothing else: the mesh, the stages and their memory, the timeline of the "
        "schedule, the program with its placements.",
    ),
    "calibrate": (
        "measure this machine",
        "Measure this machine's device and links in under a minute and write them as a cluster file that a job can "
        "name: memory, bandwidth, FLOP/s by dtype, efficiency by size, latencies.",
    ),
    "compare": (
        "architectures side by side",
        "Print models side by side: tokenizer, positions, norm, activation, attention, block, parameters, FLOPs, "
        "activations and the KV cache, read off the traced graphs. Models are names in specs/models, model files, folders "
        "of Hugging Face checkpoints or GGUF files.",
    ),
}


class Parser(argparse.ArgumentParser):
    """argparse with our errors: one line, exit status 2, the nearest right word."""

    def error(self, message: str) -> NoReturn:
        raise SpecError(f"{self.prog}: {message} (`{self.prog} --help` tells more)")


def parser() -> Parser:
    """The whole command line; imports nothing heavy."""
    top = Parser(prog="autopar", description="A declarative graph compiler and auto-parallelizer.", allow_abbrev=False)
    top.add_argument("--version", action="store_true", help="print the version and stop")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, (short, long) in _COMMANDS.items():
        command = commands.add_parser(name, help=short, description=long, allow_abbrev=False)
        _arguments(name, command)
        command.add_argument("--json", action="store_true", help="print JSON on stdout and nothing else there")
    return top


def _arguments(name: str, command: argparse.ArgumentParser) -> None:
    """The arguments of one command."""
    add = command.add_argument
    if name == "plan":
        add("jobs", nargs="+", metavar="JOB", help=_JOB)
        add("-o", "--output", metavar="PLAN.json", help="also write the plan to this file")
    elif name == "calibrate":
        add("-o", "--output", metavar="DEVICE.yaml", help="the cluster file to write (default: print it)")
        add("--devices", type=_count, metavar="N", help="processes that share the cores (default: one for each)")
    elif name == "compare":
        add("models", nargs="+", metavar="MODEL", help="a name in specs/models, a model file, or a checkpoint")
        add("-o", "--output", metavar="PAGE.html", help="write the comparison, with bars, as one HTML page")
        add("--length", type=_count, default=2048, metavar="TOKENS", help="of sequences, for FLOPs and activations")
    elif name == "explain":
        add("job", metavar="JOB_OR_PLAN", help=f"{_JOB}, a plan file or a build folder")
        add("--why", metavar="NODE", help="why this node or parameter is placed as it is")
        add("--diff", metavar="PLAN", help="compare with this plan")
    else:
        add("job", metavar="JOB_OR_DIR" if name in ("run", "view") else "JOB", help=_JOB)
    if name == "compile":
        add("-o", "--output", metavar="DIR", required=True, help="the folder to write")
        add("--plan", metavar="PLAN.json", help="use this plan instead of searching for one")
    if name == "run":
        add("-o", "--output", metavar="DIR", help="the build folder (default: builds/ and the job's name)")
        add("--resume", action="store_true", help="go on from the last checkpoint")
        add("--recalibrate", action="store_true", help="afterwards measure this machine and look for a better plan")
    if name == "view":
        add("-o", "--output", metavar="PLAN.html", required=True, help="the page to write")
    if name == "verify":
        add("--ranks", type=_count, metavar="N", help="how many local processes (default: what the pins need, or 2)")
        add("--no-shrink", action="store_true", help="keep the job's own sizes")
    if name not in ("calibrate", "compare"):
        note = "change the job: batch.length=4096, pins.tp=8, cluster.hosts=2 (any number of times)"
        add("--set", action="append", default=[], metavar="KEY.PATH=VALUE", dest="sets", help=note)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, not {text!r}")
    return int(text)


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse, with suggestions for unknown commands and options."""
    top = parser()
    words = [word for word in argv if not word.startswith("-")]
    if words and argv[0] == words[0] and words[0] not in _COMMANDS:
        near = suggestion(words[0], _COMMANDS) or f" (commands: {', '.join(_COMMANDS)})"
        raise SpecError(f"autopar: unknown command '{words[0]}'{near}")
    args, rest = top.parse_known_args(argv)
    if rest:
        known = _options(top, args.command)
        near = suggestion(rest[0], known) or f" (options: {', '.join(known)})"
        what = "option" if rest[0].startswith("-") else "argument"
        raise SpecError(f"autopar {args.command or ''}: unknown {what} '{rest[0]}'{near if what == 'option' else ''}")
    if args.command is None and not args.version:
        raise SpecError(f"autopar: a command is missing; one of {', '.join(_COMMANDS)} (`autopar --help` tells more)")
    return args


def _options(top: Parser, command: str | None) -> list[str]:
    chosen = [p for a in top._actions if isinstance(a, argparse._SubParsersAction) for n, p in a.choices.items()
              if n == command]  # fmt: skip
    return [word for p in (chosen or [top]) for word in p._option_string_actions if word.startswith("--")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the result is the exit status."""
    try:
        args = read_arguments(sys.argv[1:] if argv is None else argv)
        if args.version:
            from importlib.metadata import version

            print(f"autopar {version('autopar')}")
            return EXIT_DONE
        with collected_rarely(), only_json() if args.json else contextlib.nullcontext(sys.stdout) as out:
            from autopar import commands

            status = commands.HANDLERS[args.command](args, out)
            out.flush()
        return status
    except AutoparError as error:
        return _complain(str(error), EXIT_WRONG)
    except KeyboardInterrupt:
        return _complain("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except OSError as error:
        if error.errno in ENVIRONMENT:
            return _complain(f"{error.filename or 'writing'}: {error.strerror}", EXIT_WRONG)
        return _complain(fault(error), EXIT_FAULT)
    except Exception as error:
        return _complain(fault(error), EXIT_FAULT)


def fault(error: BaseException) -> str:
    """One line for an exception that is our fault; the traceback only where it was asked for."""
    if os.environ.get(TRACEBACK) == "1":
        traceback.print_exception(error)
    text = " ".join(str(error).split())[:500]
    return f"internal error: {type(error).__name__}: {text} ({TRACEBACK}=1 shows where)"


def _complain(message: str, status: int) -> int:
    with contextlib.suppress(OSError):
        message = message if len(message) <= LONGEST else f"{message[:LONGEST]}…"
        prefix = "" if message.startswith("autopar") else "autopar: "
        print(prefix + message, file=sys.stderr, flush=True)
    return status


@contextlib.contextmanager
def collected_rarely() -> Iterator[None]:
    """Python's cycle collector looks every `COLLECT` objects meanwhile."""
    before = gc.get_threshold()
    gc.set_threshold(COLLECT, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextlib.contextmanager
def only_json() -> Iterator[Any]:
    """Everything printed meanwhile, also by libraries in C, goes to stderr; the stream given is the real stdout."""
    try:
        number = sys.stdout.fileno()
    except (OSError, AttributeError, ValueError):  # stdout is an object of Python's, as under a test
        out = sys.stdout
        with contextlib.redirect_stdout(sys.stderr):
            yield out
        return
    sys.stdout.flush()
    kept = os.dup(number)
    os.dup2(2, number)
    try:
        with os.fdopen(os.dup(kept), "w", encoding="utf-8") as out:
            yield out
    finally:
        sys.stdout.flush()
        os.dup2(kept, number)
        os.close(kept)


def write_json(out: Any, data: Any) -> None:
    """One line of JSON."""
    out.write(json.dumps(data, ensure_ascii=False) + "\n")
    out.flush()


if __name__ == "__main__":
    sys.exit(main())
