"""What data can be read from: text, JSONL, Parquet, data sets; pairs and chats; broken lines are counted, not fatal."""

from __future__ import annotations

import gzip
import json
import sys

import numpy as np
import pytest

from autopar.errors import AutoparError
from autopar.runtime import corpus
from autopar.runtime.corpus import Corpus
from autopar.spec.data import Data

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye?"},
    {"role": "assistant", "content": "Bye."},
]


def read(tmp_path, **data) -> Corpus:
    target = tmp_path / "cache" / "tokens"
    corpus.prepare(Data(**data), tmp_path, target)
    return Corpus.read(target)


def documents(found: Corpus) -> list[str]:
    """The documents' text, their end of document left out."""
    ends = [*found.starts[1:], len(found.ids)]
    return [bytes(found.ids[a:b].astype("u1")).rstrip(b"\0").decode() for a, b in zip(found.starts, ends, strict=True)]


def learned(found: Corpus) -> str:
    """The text that is learned."""
    assert found.learned is not None
    return bytes(found.ids[found.learned == 1].astype("u1")).decode()


def lines(path, *records) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return str(path)


def test_text_and_lines_and_packed_lines_are_told_apart_by_suffix(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo".encode())
    lines(tmp_path / "b.jsonl", {"text": "three"}, "", "\u2028".join(['"four', 'five"']))
    with gzip.open(tmp_path / "c.ndjson.gz", "wt") as file:
        file.write('{"text": "six", "other": 1}\n')
    found = read(tmp_path, text=[str(tmp_path / "*.*")])
    assert documents(found) == ["one\ntwo", "three", "four\u2028five", "six"]
    assert found.facts.broken == 0 and found.learned is None


def test_a_broken_line_is_told_with_file_and_line_and_costs_only_itself(tmp_path):
    path = tmp_path / "a.jsonl"
    kept = [{"text": "good"}, {"text": "also good"}]
    bad = ["{oops", {"txt": "no"}, {"text": 5}, {"text": "\ud800"}, 7]
    lines(path, kept[0], *bad, kept[1])
    path.write_bytes(path.read_bytes() + b'{"text": "\xff"}\n')
    found = read(tmp_path, text=[str(path)])
    assert documents(found) == ["good", "also good"]
    assert found.facts.broken == 6
    wanted = [
        "2: not JSON: Expecting property name",
        "3: no field 'text' (fields there: txt)",
        "4: the field 'text' is int, not text",
        "5: half of a surrogate pair",
        "6: no record with a field 'text', but int",
        "8: byte 11 of the line is no UTF-8",
    ]
    for message, want in zip(found.facts.messages, wanted, strict=True):
        assert message.startswith(f"{path}:{want}"), message


def test_text_that_is_no_utf8_is_kept_with_replacements_and_told(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\nna\xefve\n")
    found = read(tmp_path, text=[str(tmp_path / "a.txt")])
    assert documents(found) == ["fine\nna\ufffdve\n"]
    assert found.facts.messages == [f"{tmp_path}/a.txt:2: byte 3 of the line is no UTF-8; it was replaced"]


def test_where_every_line_is_broken_the_first_is_shown(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"body": "x"})
    with pytest.raises(AutoparError, match=r"there is no text; 1 broken, first .*a\.jsonl:1: no field 'text'"):
        read(tmp_path, text=[path])
    assert documents(read(tmp_path / "again", text=[path], field="body")) == ["x"]


def test_a_parquet_file_is_read_by_row(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["one", None, "three"], "n": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "a.parquet")
    found = read(tmp_path, text=[str(tmp_path / "a.parquet")])
    assert documents(found) == ["one", "three"]
    assert found.facts.messages == [f"{tmp_path}/a.parquet:2: the field 'text' is NoneType, not text"]
    with pytest.raises(AutoparError, match=r"a\.parquet has no column 'body' \(columns there: text, n\)"):
        read(tmp_path, text=[str(tmp_path / "a.parquet")], field="body")
    (tmp_path / "b.parquet").write_text("no parquet")
    with pytest.raises(AutoparError, match=r"b\.parquet cannot be read as Parquet"):
        read(tmp_path, text=[str(tmp_path / "b.parquet")])


@pytest.mark.parametrize(
    ("package", "data"), [("pyarrow", {"text": ["{}/a.parquet"]}), ("datasets", {"dataset": {"path": "{}"}})]
)
def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch, package, data):
    (tmp_path / "a.parquet").write_text("")
    monkeypatch.setitem(sys.modules, package, None)
    data = json.loads(json.dumps(data).replace("{}", str(tmp_path)))
    with pytest.raises(AutoparError, match=f"needs the package {package}"):
        read(tmp_path, **data)


def test_a_data_set_saved_to_disk_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["one", "two"], "n": [1, 2]})})
    made.save_to_disk(str(tmp_path / "saved"))
    assert documents(read(tmp_path, dataset=str(tmp_path / "saved"))) == ["one", "two"]
    path = lines(tmp_path / "a.jsonl", {"body": "three"})
    loaded = {"path": "json", "files": {"train": path}}
    assert documents(read(tmp_path / "json", dataset=loaded, field="body")) == ["three"]
    with pytest.raises(AutoparError, match="has no column 'body'"):
        read(tmp_path / "wrong", dataset=str(tmp_path / "saved"), field="body")


def test_of_a_pair_the_answer_alone_is_learned(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"q": "naïve?", "a": " yes"}, {"q": "no answer"})
    found = read(tmp_path, text=[path], prompt="q", answer="a")
    assert documents(found) == ["naïve? yes"]
    assert learned(found) == " yes\0"  # and to end
    assert found.facts.messages == [f"{path}:2: no field 'a' (fields there: q)"]


def test_of_a_chat_what_the_assistant_says_is_learned(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"messages": TALK}, {"messages": []}, {"messages": [{"role": "user"}]})
    found = read(tmp_path, text=[path], chat="messages", template=CHATML)
    (text,) = documents(found)
    assert text.startswith("<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n")
    assert learned(found) == "Hello.<|im_end|>\nBye.<|im_end|>\n"
    assert [m.split(": ", 1)[1] for m in found.facts.messages] == [
        "the conversation is no list of {role, content}",
        "turn 1 of the conversation is no {role, content}",
    ]


def test_a_template_may_mark_what_is_learned_itself(tmp_path):
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}|{% endgeneration %}"
        "{% else %}{{ m.content }}>{% endif %}{% endfor %}"
    )
    path = lines(tmp_path / "a.jsonl", {"messages": TALK})
    found = read(tmp_path, text=[path], chat="messages", template=str(tmp_path / "chat.jinja"))
    assert documents(found) == ["Hi?>Hello.|Bye?>Bye.|"] and learned(found) == "Hello.|Bye.|"


def test_a_pair_goes_through_a_template_where_one_is_given(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"q": "Hi?", "a": "Hello."})
    found = read(tmp_path, text=[path], prompt="q", answer="a", template=CHATML, end="<eop>")
    assert learned_bytes(found) == b"Hello.<|im_end|>\n" and int(found.ids[-1]) == 259


def learned_bytes(found: Corpus) -> bytes:
    assert found.learned is not None
    return bytes(found.ids[(found.learned == 1) & (found.ids < 256)].astype("u1"))


def test_a_conversation_that_the_template_refuses_is_a_broken_line(tmp_path):
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('users begin') }}{% endif %}{{ messages }}"
    path = lines(tmp_path / "a.jsonl", {"messages": TALK[1:]}, {"messages": TALK})
    with pytest.raises(AutoparError, match=r"a\.jsonl:1: the chat template refuses it: users begin"):
        read(tmp_path, text=[path], chat="messages", template=template)


def test_a_chat_without_a_template_and_a_template_that_is_none_are_refused(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"messages": TALK})
    with pytest.raises(AutoparError, match="the tokenizer has no chat template; set data.template"):
        read(tmp_path, text=[path], chat="messages")
    with pytest.raises(AutoparError, match="not a jinja template: .*endfor"):
        read(tmp_path, text=[path], chat="messages", template="{% for m in messages %}")


def test_templates_are_rendered_as_transformers_renders_them():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from autopar.runtime.chat import Template

    source = (
        "{{ bos_token }}{%- for m in messages %}\n    {% if loop.first %}[{{ m | tojson }}]{% endif %}\n"
        "    {% if m.role == 'x' %}{% break %}{% endif %}\n{{ m['content'] | trim }}\n{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>")
    for ask in (False, True):
        expected = theirs.apply_chat_template(TALK, chat_template=source, tokenize=False, add_generation_prompt=ask)
        assert Template(source, {"bos_token": "<s>"}).render(TALK, ask=ask) == expected


def test_a_long_document_is_encoded_in_pieces_and_stays_one(tmp_path, monkeypatch):
    text = "".join(f"line {i}\n" for i in range(200)) + "x" * 100
    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setattr(corpus, "LONGEST", 64)
    assert documents(read(tmp_path, text=[str(tmp_path / "a.txt")])) == [text]


def test_a_tokenizer_is_trained_on_the_jobs_own_text_and_kept_where_the_job_says(tmp_path):
    (tmp_path / "a.txt").write_text("some words and some more words " * 20)
    new = {"train": "byte_bpe", "vocab": 280, "file": str(tmp_path / "mine" / "tokenizer.json")}
    found = read(tmp_path, text=[str(tmp_path / "a.txt")], tokenizer=new)
    assert int(found.ids[-1]) == 0 and found.facts.highest < 280  # <|endoftext|> is the first special token
    kept = (tmp_path / "mine" / "tokenizer.json").read_bytes()
    (tmp_path / "a.txt").write_text("other text, for which the tokenizer that is there is used")
    again = read(tmp_path / "again", text=[str(tmp_path / "a.txt")], tokenizer=new)
    assert (tmp_path / "mine" / "tokenizer.json").read_bytes() == kept
    assert not np.array_equal(found.ids, again.ids)
