"""The command line on wrong input: exit status 2, one short message that names the culprit, nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from autopar import cli, commands
from autopar.errors import InfeasibleError
from autopar.plan.plan import PlanDocument

TINY = {"family": "llama", "layers": 4, "hidden": 64, "ffn": 128, "heads": 4, "vocab": 100}
BASE = {"model": TINY, "cluster": "dgx-a100", "batch": {"sequences": 8, "length": 16}}
PLAN = {
    "model": {"parameters": 10, "trainable_parameters": 4, "flops_per_token": 60.0},
    "plan": {"stages": [{"blocks": [0, 3], "recompute": ["none"] * 4}]},
    "cost": {
        "step_seconds": 2.0,
        "compute_seconds": 1.5,
        "exposed_communication_seconds": 0.0,
        "bubble_seconds": 0.0,
        "optimizer_seconds": 0.5,
        "tokens_per_second": 64.0,
        "mfu": 0.4,
        "peak_bytes": 2**30,
        "bytes": {"parameters": 2**30},
    },
    "search": {
        "seconds": 1.0,
        "trace_seconds": 0.5,
        "status": "optimal",
        "objective": 2.0,
        "bound": 2.0,
        "gap": 0.0,
        "candidates": 3,
    },
}


def write(folder: Path, file: str = "job.yaml", **changes: object) -> str:
    path = folder / file
    path.write_text(json.dumps({**BASE, **changes}))
    return str(path)


def call(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = cli.main(list(words))
    out, err = capfd.readouterr()
    return status, out, err.strip()


@pytest.fixture
def planned(monkeypatch):
    """A planner that answers at once; models called `wrong` fit nowhere. The list holds the jobs it was asked."""
    asked = []

    def answer(job, cache, output=None):
        asked.append((job, id(cache)))
        if job.name == "wrong":
            raise InfeasibleError("no plan fits: 93.1 GiB needed, 80.0 GiB there")
        if job.name == "bug":
            raise ZeroDivisionError("division by zero")
        print("noise from a library")
        return PlanDocument.model_validate(PLAN)

    monkeypatch.setattr(commands, "_planned", answer)
    return asked


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plam", "JOB"], "unknown command 'plam'; did you mean 'plan'?"),
        ([], "a command is missing; one of plan, compile"),
        (["plan"], "JOB"),
        (["plan", "JOB", "--jsn"], "unknown option '--jsn'; did you mean '--json'?"),
        (["run", "JOB", "more"], "unknown argument 'more'"),
        (["plan", "JOB", "--set"], "--set"),
        (["plan", "JOB", "--set", "batch.lenght=5"], "did you mean 'length'?"),
        (["plan", "JOB", "-o", "/no/such/plan.json"], "cannot write /no/such/plan.json: there is no folder /no/such"),
        (["plan", "JOB", "JOB", "-o", "x.json"], "give one job"),
        (["plan", "JOB", "-o", "/"], "it is a folder"),
        (["plan", "no-such-job.yaml"], "no-such-job.yaml: no such file"),
        (["compile", "JOB"], "-o/--output"),
        (["compile", "JOB", "-o", "FOLDER"], "holds other things"),
        (["compile", "JOB", "-o", "JOB"], "is a file"),
        (["compile", "JOB", "-o", "NEW", "--plan", "no.json"], "no.json: no such plan file"),
        (["run", "FOLDER"], "is no build folder: job.yaml, plan.json, manifest.json are missing"),
        (["explain", "FOLDER"], "is no build folder"),
        (["explain", "FOLDER/empty.json"], "not a plan: the key 'plan' is missing"),
        (["explain", "FOLDER/text.json"], "not a plan: not JSON"),
        (["explain", "FOLDER/old.json"], "a plan of version 0"),
        (["explain", "FOLDER/short.json"], "the key 'model' is missing"),
        (["explain", "FOLDER/empty.json", "--set", "pins.tp=2"], "is a plan that is made already"),
        (["view", "JOB", "-o", "/no/such/page.html"], "there is no folder"),
        (["verify", "JOB", "--ranks", "0"], "must be a whole number from 1"),
        (["verify", "JOB", "--set", "pins.tp=3"], "tp 3 = 3 does not divide the cluster's 8 devices"),
        (["plan", "JOB", "--set", "passes=[{no_such_pass: {}}]"], "no_such_pass"),
    ],
)
def test_a_wrong_call_ends_with_status_2_and_one_short_message(tmp_path, capfd, planned, words, message):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, text in {"empty": "{}", "text": "plan", "old": '{"plan": {}, "version": "0"}'}.items():
        (folder / f"{name}.json").write_text(text)
    (folder / "short.json").write_text(json.dumps({k: v for k, v in PLAN.items() if k != "model"}))
    job, new = write(tmp_path), str(tmp_path / "new")
    places = {"JOB": job, "FOLDER": str(folder), "NEW": new}
    status, out, err = call(capfd, *[places.get(w, w.replace("FOLDER", str(folder))) for w in words])
    assert status == 2 and out == ""
    assert message in err and err.startswith("autopar") and "Traceback" not in err and len(err) < 600
    assert not planned


@pytest.mark.parametrize(("error", "status"), [(InfeasibleError("no plan fits"), 2), (OSError(28, "No space"), 2)])
def test_a_failed_compile_leaves_no_folder_behind(tmp_path, capfd, monkeypatch, error, status):
    from autopar import api

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(api, "compile_job", fail)
    made = tmp_path / "a" / "b"
    assert call(capfd, "compile", write(tmp_path), "-o", str(made))[0] == status
    assert [path.name for path in tmp_path.iterdir()] == ["job.yaml"]
    assert call(capfd, "compile", write(tmp_path), "-o", "/proc/no/such")[0] == 2


def test_json_alone_is_on_stdout_whatever_libraries_print(tmp_path, capfd, planned):
    status, out, err = call(capfd, "plan", write(tmp_path), "--json")
    assert status == 0 and json.loads(out)["search"]["status"] == "optimal" and out.count("\n") == 1
    assert "noise from a library" in err


def test_several_jobs_give_a_line_each_in_order_and_one_cache(tmp_path, capfd, planned):
    jobs = [write(tmp_path, f"{i}.yaml", name=name) for i, name in enumerate(["good", "wrong", "bug", "good"])]
    jobs.insert(1, str(tmp_path / "missing.yaml"))
    status, out, err = call(capfd, "plan", *jobs, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [sorted(line)[0] for line in lines] == ["binding", "error", "error", "error", "binding"]
    assert "missing.yaml: no such file" in lines[1]["error"] and "93.1 GiB" in lines[2]["error"]
    assert "ZeroDivisionError" in lines[3]["error"] and status == 1
    assert len({cache for _, cache in planned}) == 1 and "wrong" not in err.splitlines()[0]
    assert call(capfd, "plan", *jobs[:3], "--json")[0] == 2


def test_a_plan_is_printed_for_people(tmp_path, capfd, planned):
    status, out, _ = call(capfd, "plan", write(tmp_path))
    assert status == 0
    for words in ("10 parameters, 4 of them trainable", "pp 1 · dp 1", "compute 1.5 s + optimizer 500 ms", "1.0 GiB"):
        assert words in out


def test_an_unexpected_exception_is_status_1_and_its_traceback_only_on_demand(tmp_path, capfd, planned, monkeypatch):
    job = write(tmp_path, name="bug")
    status, out, err = call(capfd, "plan", job)
    assert (status, out) == (1, "") and "internal error: ZeroDivisionError" in err and "Traceback" not in err
    monkeypatch.setenv("AUTOPAR_TRACEBACK", "1")
    assert "Traceback" in call(capfd, "plan", job)[2]


def test_an_interrupt_is_status_130(tmp_path, capfd, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "_planned", interrupted)
    status, out, err = call(capfd, "plan", write(tmp_path))
    assert (status, out, err) == (130, "", "autopar: interrupted")


@pytest.mark.parametrize("command", cli._COMMANDS)
def test_every_command_helps_at_length_and_imports_nothing_heavy(command):
    code = (
        "import sys\nfrom autopar import cli\n"
        f"try: cli.main(['{command}', '--help'])\nexcept SystemExit as e: assert not e.code\n"
        "assert not {'torch', 'transformers', 'ortools', 'pydantic'} & set(sys.modules), 'heavy imports'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 200 and command in done.stdout


def test_a_misspelled_job_is_refused_without_torch(tmp_path):
    code = (
        "import sys\nfrom autopar import cli\n"
        f"assert cli.main(['plan', {write(tmp_path, bacth=1)!r}]) == 2\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "did you mean 'batch'" in done.stderr


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    code = "from autopar import cli, commands\nimport sys\n" + (
        "def handler(args, out):\n    for _ in range(100000): out.write('x' * 100 + '\\n')\n    return 0\n"
        "commands.HANDLERS['plan'] = handler\nsys.exit(cli.main(['plan', 'x', '--json']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    err = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(timeout=60) == 0 and err == ""


def test_control_c_in_the_shell_is_status_130(tmp_path):
    code = "from autopar import cli, commands\nimport signal, sys, time\n" + (
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what runs in the background starts without it
        "def handler(args, out):\n    print('ready', flush=True, file=sys.stderr)\n    time.sleep(60)\n"
        "commands.HANDLERS['plan'] = handler\nsys.exit(cli.main(['plan', 'x']))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "ready\n"
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert process.stderr.read() == "autopar: interrupted\n"
