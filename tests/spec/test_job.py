"""Jobs: read from files and Python, changed by --set, written back, refused with a place and a suggestion."""

import copy
import json
from pathlib import Path

import pytest

from autopar.errors import AutoparError, SpecError
from autopar.spec import Job, library, load_job
from autopar.spec.check import check_job
from autopar.spec.load import parse_job
from autopar.spec.source import Source, parse

TINY = {"family": "llama", "layers": 2, "hidden": 64, "ffn": 128, "heads": 4, "vocab": 100}
BASE = {"model": TINY, "cluster": "local-cpu", "batch": {"sequences": 8, "length": 16}}


def write(folder: Path, **changes: object) -> Path:
    path = folder / "job.yaml"
    path.write_text(json.dumps({**BASE, **changes}, indent=1))
    return path


@pytest.mark.parametrize("name", library.names("jobs"))
def test_every_shipped_job_reads_back_from_its_own_text(name):
    job = load_job(name)
    assert parse_job(parse(job.dump(), "again")) == job


def test_a_job_from_python_is_the_job_of_the_file(tmp_path):
    passes = [{"lora": {"rank": 4}}, "flash_attention"]
    here = Job(model=TINY, cluster="local-cpu", batch=BASE["batch"], passes=passes)
    assert here == load_job(write(tmp_path, passes=passes))
    assert here.passes == ({"lora": {"rank": 4}}, {"flash_attention": {}})
    assert Job().model is None and Job().optimizer.name == "adamw"


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"bacth": 1}, ["unknown key 'bacth'", "did you mean 'batch'?"]),
        ({"batch": {"sequences": 8, "lenght": 16}}, ["unknown key 'lenght' in batch; did you mean 'length'?"]),
        ({"batch": {"sequences": 8}}, ["the key 'length' is missing in batch"]),
        ({"batch": {"sequences": 1.5, "length": 16}}, ["batch.sequences must be a whole number, not 1.5"]),
        ({"batch": {"sequences": True, "length": 16}}, ["batch.sequences must be a whole number, not True"]),
        ({"batch": {"sequences": -1, "length": 16}}, ["batch.sequences must be at least 1, not -1"]),
        ({"batch": [8, 16]}, ["batch must be a mapping"]),
        ({"batch": None}, ["the key 'batch' is missing"]),
        ({"optimizer": {"name": "adamz"}}, ["did you mean 'adamw'?"]),
        ({"optimizer": {"lr": ".nan"}}, ["optimizer.lr must be a number"]),
        ({"optimizer": {"lr": -1}}, ["optimizer.lr must be at least 0"]),
        ({"optimizer": {"name": "sgd", "betas": [0.8, 0.9]}}, ["optimizer 'sgd' has no betas"]),
        ({"optimizer": {"betas": [0.9]}}, ["optimizer.betas must have at least 2 entries"]),
        ({"pins": {"tpp": 2}}, ["unknown key 'tpp' in pins; did you mean 'tp'?"]),
        ({"pins": {"zero": 7}}, ["pins.zero is 7", "one of: 0, 1, 2"]),
        ({"pins": {"schedule": "1g1b"}}, ["did you mean '1f1b'?"]),
        ({"pins": {"recompute": "ful"}}, ["did you mean 'full'?"]),
        ({"search": {"memory_margin": 1.0}}, ["search.memory_margin must be less than 1"]),
        ({"passes": [{"lora": {}, "dora": {}}]}, ["passes must hold one pass in each entry"]),
        ({"passes": {"lora": {}}}, ["passes must be a list"]),
        ({"passes": [{"lora": 8}]}, ["passes.0.lora must be a mapping"]),
        ({"model": "lama-2-7b"}, ["unknown model 'lama-2-7b'; did you mean 'llama-2-7b'?"]),
        ({"model": {"layers": 2}}, ["exactly one of 'family', 'hf', 'python'"]),
        ({"model": {"hf": "no/such/folder"}}, ["no checkpoint folder 'no/such/folder'"]),
        ({"model": {"hf": "llama", "confg": {}}}, ["did you mean 'config'?"]),
        ({"model": {"python": "module.function"}}, ["must be 'package.module:function'"]),
        ({"model": {**TINY, "heads": 5}}, ["heads"]),
        ({"model": 7}, ["model must be a name or a mapping"]),
        ({"cluster": "dgx-h1000"}, ["unknown cluster 'dgx-h1000'; did you mean 'dgx-h100'?"]),
        ({"data": {"tokenizer": 5}}, ["data.tokenizer must be text, not 5"]),
    ],
)
def test_a_wrong_job_names_the_place_the_key_and_what_would_be_right(tmp_path, changes, messages):
    with pytest.raises(SpecError) as error:
        load_job(write(tmp_path, **changes))
    text = str(error.value)
    assert all(message in text for message in messages), text
    assert "job.yaml" in text and len(text) < 400


def test_the_line_of_a_misspelled_key_is_named(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("model: llama-7b\ncluster: dgx-a100\nbatch:\n  sequences: 8\n  lenght: 16\n")
    with pytest.raises(SpecError, match=r"job\.yaml:5: unknown key 'lenght' in batch"):
        load_job(path)


def test_set_changes_a_job_at_any_depth(tmp_path):
    path = write(tmp_path, passes=[{"lora": {"rank": 4}}])
    sets = ["batch.length=32", "pins.tp=2", "cluster.hosts=3", "passes.0.lora.rank=16", "optimizer.lr=1e-5", "name=x"]
    job = load_job(path, sets)
    assert job.batch is not None and job.batch.length == 32
    assert job.cluster is not None and (job.cluster.name, job.cluster.hosts) == ("local-cpu", 3)
    assert (job.pins.tp, job.passes[0]["lora"]["rank"], job.optimizer.lr, job.name) == (2, 16, 1e-5, "x")
    named = load_job(write(tmp_path, model="llama-7b"), ["model.layers=4"])
    assert named.model is not None and named.model.decoder is not None and named.model.decoder.layers == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch.length", "must be key.path=value"),
        ("=3", "must be key.path=value"),
        ("batch.lenght=5", "--set batch.lenght=5: unknown key 'lenght' in batch; did you mean 'length'?"),
        ("bacth.length=5", "did you mean 'batch'?"),
        ("batch.length=long", "--set batch.length=long: batch.length must be a whole number"),
        ("batch.length.x=5", "has no key 'x'"),
        ("passes.3.rank=5", "this is a list of 1 entries"),
        ("passes.lora.rank=5", "here: 0.lora"),
        ("pins.tp=[", "--set pins.tp=[:1: not valid YAML"),
        ("model=", "the key 'model' is missing"),
    ],
)
def test_a_wrong_set_is_named_itself(tmp_path, text, message):
    with pytest.raises(SpecError) as error:
        load_job(write(tmp_path, passes=[{"lora": {}}]), [text])
    assert message in str(error.value)


def test_jobs_are_found_by_name_and_by_path_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match="unknown job 'dmeo'; did you mean 'demo'"):
        load_job("dmeo")
    with pytest.raises(SpecError, match=r"demo\.yaml: no such file"):
        load_job("demo.yaml")
    with pytest.raises(SpecError, match="is a folder"):
        load_job("/")


def test_relative_places_are_found_beside_the_job(tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("words")
    (tmp_path / "small.yaml").write_text(json.dumps(TINY))
    path = write(tmp_path, data={"text": "text/*.txt"}, model="small.yaml")
    monkeypatch.chdir("/")
    job = load_job(path)
    assert job.data.text == (str(tmp_path / "text/*.txt"),)
    assert job.model is not None and job.model.declared == TINY


def test_two_packages_that_hold_one_name_are_an_error_naming_both(tmp_path, monkeypatch):
    for package in ("one", "two"):
        (tmp_path / package / "clusters").mkdir(parents=True)
        (tmp_path / package / "clusters" / "mine.yaml").write_text("name: mine\n")
    monkeypatch.setattr(library, "folders", lambda: (tmp_path / "one", tmp_path / "two"))
    with pytest.raises(SpecError) as error:
        library.find("clusters", "mine")
    assert str(tmp_path / "one") in str(error.value) and str(tmp_path / "two") in str(error.value)


STRANGE = [None, True, -1, 1.5, float("nan"), 10**400, "", "x" * 5000, "~nobody/x", "\u0000", "80 GiB", [], [[1]], {}]
STRANGE += [{"name": None}, {"": 1}, ["a", "b"], "a:b"]
FULL = {
    "model": {**TINY, "rope": {"theta": 1e4}},
    "cluster": {
        "name": "dgx-a100",
        "hosts": 2,
        "device": {"memory": "80 GiB", "flops_per_second": {"bfloat16": 1e12}, "efficiency": {"matmul": [[0, 0.5]]}},
    },
    "batch": {"sequences": 64, "length": 32},
    "passes": [{"lora": {"rank": 8}}],
    "optimizer": {"betas": [0.9, 0.95]},
    "data": {"text": ["*.md"]},
    "pins": {"tp": 2, "zero": 1, "schedule": "1f1b"},
}


def paths(data, path=()):
    yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from paths(value, (*path, key))


@pytest.mark.parametrize("other", [{}, {"model": {"hf": "llama", "config": {"n_layer": 2}}}, {"cluster": "local-cpu"}])
def test_whatever_stands_in_a_job_the_answer_is_a_job_or_one_message(other):
    for path in list(paths({**FULL, **other}))[1:]:
        for strange in STRANGE:
            job = copy.deepcopy({**FULL, **other})
            here = job
            for key in path[:-1]:
                here = here[key]
            here[path[-1]] = strange
            try:
                check_job(parse_job(Source(job, "job.yaml")))
            except AutoparError as error:
                assert str(error)
