"""A job's data: what is written wrong is told with file and line, what is not there before anything is planned."""

from __future__ import annotations

import json

import pytest

from autopar.cli import main
from autopar.errors import SpecError
from autopar.spec.check import check_job
from autopar.spec.data import Data
from autopar.spec.job import Job
from autopar.spec.load import load_job

MODEL = "{family: llama, layers: 2, hidden: 16, ffn: 24, heads: 2, vocab: 260}"
CHATGLM = "{family: chatglm, layers: 2, hidden: 16, heads: 2, vocab: 256}"
BASE = f"model: {MODEL}\ncluster: local-cpu\nbatch: {{sequences: 2, length: 8}}\n"


def job_of(tmp_path, data: str) -> Job:
    (tmp_path / "job.yaml").write_text(BASE + data)
    return load_job(tmp_path / "job.yaml")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("data: {tekst: a}", "4: unknown key 'tekst' in data; did you mean 'text'?"),
        ("data:\n  text:\n    - stdlib:json/*.py\n    - no.txt", "7: data.text: 'no.txt' matches no file (looked in "),
        ("data: {text: 'stdlib:jsom/*.py'}", "4: data.text: 'stdlib:jsom/*.py' matches no file"),
        ("data: {text: /no/such/*.txt}", "4: data.text: '/no/such/*.txt' matches no file"),
        ("data:\n  tokenizer: no.json", "5: data.tokenizer: no such file or folder 'no.json' ('bytes' needs none)"),
        ("data: {tokenizer: {train: bp, vocab: 9}}", "did you mean 'bpe'? (one of: bpe, byte_bpe, wordpiece, unigram"),
        ("data: {tokenizer: {train: bpe, vocb: 9}}", "4: unknown key 'vocb' in data.tokenizer; did you mean 'vocab'?"),
        ("data: {tokenizer: {train: bpe}}", "4: the key 'vocab' is missing in data.tokenizer"),
        ("data: {objective: prefixlm}", "4: data.objective is 'prefixlm', which is unknown; did you mean 'prefix_lm'?"),
        ("data: {objective: {name: glm, spam: 3}}", "4: unknown key 'spam' in data.objective; did you mean 'span'?"),
        ("data: {objective: {name: prefix_lm, span: 2}}", "4: data.objective 'prefix_lm' has no span"),
        ("data: {objective: {name: prefix_lm, prefix: [0.5, 0.2]}}", "prefix must be [least, most], not [0.5, 0.2]"),
        ("data: {objective: {name: glm, masked: 1.0}}", "4: data.objective.masked must be less than 1, not 1"),
        ("data: {documents: apart}", "4: data.documents is 'apart', which is unknown"),
        ("data: {prompt: a}", "4: data needs prompt and answer together, or neither"),
        ("data: {prompt: a, answer: b, chat: c}", "4: data has both prompt and chat"),
        ("data: {template: x.jinja}", "4: data has a template but neither chat nor prompt"),
        ("data: {chat: m, template: no.jinja}", "4: data.template: no such file 'no.jinja'"),
        ("data: {text: a, dataset: b}", "4: data has both text and dataset"),
    ],
)
def test_wrong_data_is_told_with_file_and_line(tmp_path, data, message):
    with pytest.raises(SpecError) as error:
        job_of(tmp_path, data)
    assert str(error.value).startswith(str(tmp_path / "job.yaml")) and message in str(error.value)


@pytest.mark.parametrize("command", ["plan", "compile"])
def test_text_and_tokenizers_that_are_not_there_end_planning_with_status_2(tmp_path, capsys, command):
    for wrong in ("data: {text: no.txt}", "data: {tokenizer: no.json}"):
        (tmp_path / "job.yaml").write_text(BASE + wrong)
        more = ["-o", str(tmp_path / "build")] if command == "compile" else []
        assert main([command, str(tmp_path / "job.yaml"), *more]) == 2
        assert f"{tmp_path / 'job.yaml'}:4: data." in capsys.readouterr().err
    assert not (tmp_path / "build").exists()


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (
            MODEL,
            "objective: glm",
            "glm needs a declared model with positions: rope_2d (family: chatglm); llama has positions: rope",
        ),
        ("{hf: glm, config: {}}", "objective: glm", "(family: chatglm); glm is none"),
        (MODEL, "tokenizer: {train: bpe, vocab: 300}", "it makes 300 tokens; the model's vocabulary has 260"),
        (CHATGLM, "objective: glm", "it makes 260 tokens; the model's vocabulary has 256"),
    ],
)
def test_data_that_cannot_go_with_the_model_is_told_before_planning(tmp_path, model, data, message):
    (tmp_path / "job.yaml").write_text(BASE.replace(MODEL, model) + f"data: {{{data}}}")
    with pytest.raises(SpecError) as error:
        check_job(load_job(tmp_path / "job.yaml"))
    assert message in str(error.value)


def test_tokenizers_and_templates_are_found_beside_the_job_and_kept_by_their_full_path(tmp_path, monkeypatch):
    for name in ("t.json", "c.jinja", "a.jsonl"):
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir("/")
    data = job_of(tmp_path, "data: {text: '*.jsonl', tokenizer: t.json, chat: m, template: c.jinja}").data
    assert data.text == (f"{tmp_path}/*.jsonl",)
    assert (data.tokenizer, data.template) == (f"{tmp_path}/t.json", f"{tmp_path}/c.jinja")


def test_a_new_tokenizers_file_is_kept_beside_the_job(tmp_path, monkeypatch):
    data = job_of(tmp_path, "data: {tokenizer: {train: bpe, vocab: 300, file: mine/t.json}}").data
    assert not isinstance(data.tokenizer, str) and data.tokenizer.file == f"{tmp_path}/mine/t.json"


@pytest.mark.parametrize(
    "data",
    [
        {"objective": "glm", "documents": "separate"},
        {"objective": {"name": "prefix_lm", "prefix": [0.1, 0.4]}, "tokenizer": {"train": "bpe", "vocab": 300}},
        {
            "dataset": {"path": "json", "files": {"train": ["a.jsonl"]}},
            "chat": "messages",
            "template": "{{ messages }}",
        },
    ],
)
def test_data_reads_back_from_its_own_text(tmp_path, data):
    job = job_of(tmp_path, f"data: {json.dumps(data)}")
    (tmp_path / "again.yaml").write_text(job.dump())
    assert load_job(tmp_path / "again.yaml").data == job.data == Data.model_validate(data)
