"""Objectives: what is predicted, what is seen, where tokens stand; properties over many random rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autopar.errors import AutoparError, TraceError
from autopar.ir.masks import visible
from autopar.ir.objective import Objective
from autopar.ir.promote import Promoted
from autopar.models.load import build
from autopar.runtime.objectives import IGNORED, Window, example, objective_of
from autopar.spec.data import Data
from autopar.spec.origin import ModelOrigin

SPECIAL = {"[MASK]": 900, "[gMASK]": 901, "<sop>": 902, "<eop>": 903}
LENGTHS = (8, 11, 24, 64, 200)


def made(data: dict, length: int):
    return objective_of(Data(**data), SPECIAL.__getitem__)


def window(n: int, draw: np.random.Generator, documents: int = 1) -> Window:
    """Distinct tokens in documents of random sizes."""
    cuts = np.sort(draw.integers(0, n + 1, documents - 1))
    return Window(draw.permutation(800)[:n], np.ones(n, bool), np.searchsorted(cuts, np.arange(n), side="right"))


def rows(data: dict, documents: int = 1):
    """(source, row, length) of many random rows."""
    for length in LENGTHS:
        objective = made(data, length)
        for seed in range(25):
            draw = np.random.default_rng(seed)
            source = window(objective.window(length), draw, documents)
            yield source, objective.row(source, length, draw), length


def test_separate_documents_have_positions_of_their_own_and_no_label_across_a_boundary():
    source = Window(np.arange(10, 18), np.ones(8, bool), np.array([3, 3, 3, 4, 6, 6, 6, 6]))
    row = made({"documents": "separate"}, 8).row(source, 8, np.random.default_rng(0))
    assert row["document_ids"].tolist() == [0, 0, 0, 1, 3, 3, 3, 3]
    assert row["position_ids"].tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert row["labels"].tolist() == [10, 11, 12, IGNORED, IGNORED, 15, 16, 17]


def test_tokens_that_are_not_learned_have_no_label_under_any_objective():
    for data in ({}, {"objective": "prefix_lm"}, {"objective": {"name": "glm", "long": 1.0}}):
        objective = made(data, 16)
        n = objective.window(16)
        source = Window(np.arange(n), np.zeros(n, bool), np.zeros(n, int))
        row = objective.row(source, 16, np.random.default_rng(0))
        assert set(row["labels"]) <= {IGNORED, SPECIAL["<eop>"]}


def test_a_prefix_is_left_out_of_the_loss_and_within_its_bounds():
    shares = []
    for source, row, length in rows({"objective": {"name": "prefix_lm", "prefix": [0.25, 0.75]}}):
        prefix = int(row["prefix_length"])
        shares.append(prefix / length)
        assert (row["labels"][:prefix] == IGNORED).all() and (row["labels"][prefix:] == source.ids[prefix:]).all()
        assert int(0.25 * length) <= prefix <= 0.75 * length
    assert min(shares) < 0.35 and max(shares) > 0.65
    whole = made({"objective": {"name": "prefix_lm", "prefix": [1, 1]}}, 8)
    row = whole.row(window(8, np.random.default_rng(0)), 8, np.random.default_rng(0))
    assert int(row["prefix_length"]) == 7, "at least one token is predicted"


def parts(row: dict, length: int):
    """Part A's length, and part B's blanks as (start of it in the row, tokens, labels of its tokens)."""
    a = int(row["prefix_length"])
    ids, labels = row["input_ids"], row["labels"]
    starts = [i for i in range(a, length) if ids[i] == SPECIAL["<sop>"]]
    ends = [*starts[1:], length - 1]
    return a, [(s, ids[s + 1 : e].tolist(), labels[s + 1 : e].tolist()) for s, e in zip(starts, ends, strict=True)]


@pytest.mark.parametrize("long", [0.0, 1.0])
@pytest.mark.parametrize("documents", [1, 4])
def test_blanks_put_back_in_their_places_give_the_text_again(long, documents):
    data = {"objective": {"name": "glm", "long": long}, "documents": "separate" if documents > 1 else "joined"}
    for source, row, length in rows(data, documents):
        ids, labels = row["input_ids"], row["labels"]
        assert len(ids) == len(labels) == length and row["position_ids"].shape == (2, length)
        a, blanks = parts(row, length)
        masks = [i for i in range(a) if ids[i] == SPECIAL["[gMASK]" if long else "[MASK]"]]
        assert sorted(masks) == sorted(_place(row, start, a) for start, _, _ in blanks)
        filled = {_place(row, start, a): tokens for start, tokens, _ in blanks}
        text = [t for i in range(a) for t in (filled.get(i) or [int(ids[i])])]
        at = source.ids.tolist().index(text[0])
        assert text == source.ids[at : at + len(text)].tolist(), "a window of the source, each blank where it was"
        assert all(tokens == predicted and tokens for _, tokens, predicted in blanks)


def _place(row: dict, start: int, a: int) -> int:
    """Where in part A the mask token of the blank at ``start`` stands: same first position, same document."""
    first = row["position_ids"][0]
    documents = row.get("document_ids", np.zeros(len(first), int))
    (place,) = [i for i in range(a) if first[i] == first[start] and documents[i] == documents[start]]
    return place


def test_every_blank_ends_with_the_end_token_and_counts_from_one():
    for _, row, length in rows({"objective": {"name": "glm", "long": 0.0}}):
        a, blanks = parts(row, length)
        first, second = row["position_ids"]
        assert first[:a].tolist() == list(range(a)) and not second[:a].any()
        assert (row["labels"][: a + 1] == IGNORED).all()
        for start, tokens, _ in blanks:
            after = start + len(tokens) + 1  # where the next blank starts, or the row ends
            assert row["labels"][after] == SPECIAL["<eop>"]
            assert second[start:after].tolist() == list(range(1, len(tokens) + 2))
            assert len(set(first[start:after].tolist())) == 1
        assert row["input_ids"][-1] == SPECIAL["<eop>"] and second[-1] == len(blanks[-1][1]) + 2


def test_short_blanks_take_their_share_of_the_text_and_long_ones_at_least_half():
    short = [r for r in rows({"objective": {"name": "glm", "long": 0.0, "masked": 0.15}}) if r[2] == 200]
    blanked = [sum(len(tokens) for _, tokens, _ in parts(row, length)[1]) for _, row, length in short]
    assert 0.12 < np.mean(blanked) / 180 < 0.19  # 180 of 200 are text; a Poisson of 3, at least 1, has mean 3.05
    for source, row, length in rows({"objective": {"name": "glm", "long": 1.0}}):
        ((_, tokens, _),) = parts(row, length)[1]
        assert len(tokens) >= len(source.ids) // 2 and tokens[-1] == source.ids[-1]


def test_a_sequence_too_short_for_the_objective_is_refused():
    for name, least in (("glm", 8), ("prefix_lm", 2)):
        with pytest.raises(AutoparError, match=rf"batch.length: data.objective {name} needs at least {least} tokens"):
            made({"objective": name}, least).window(least - 1)


LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 32, "resid_pdrop": 0, "embd_pdrop": 0}
MODELS = {
    "llama": {"hf": "llama", "config": LLAMA},
    "gpt2": {"hf": "gpt2", "config": GPT2 | {"attn_pdrop": 0}},
    "eager": {"hf": "llama", "config": LLAMA | {"attn_implementation": "eager"}},
    "declared": {"declared": {"family": "llama", "layers": 2, "hidden": 16, "ffn": 24, "heads": 2, "vocab": 50}},
    "alibi": {"declared": {"family": "bloom", "layers": 2, "hidden": 16, "heads": 2, "vocab": 50}},
}


@pytest.fixture(scope="module", params=MODELS)
def objective(request) -> Objective:
    """A tiny model of each kind with its loss, in float64."""
    return Objective(build(ModelOrigin(**MODELS[request.param]), meta=False, dtype=torch.float64, seed=1))


def batch_of(data: dict, rows: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(3))
    return example(Data(**data), {"input_ids": ids, "labels": ids}, None)


def test_documents_packed_together_have_the_loss_that_each_has_alone(objective):
    batch = batch_of({"documents": "separate"})
    with Promoted():  # transformers' norms and rotary tables are float32 in every dtype
        loss, count = objective(batch)
        expected, labels = 0.0, 0
        for ids, documents in zip(batch["input_ids"], batch["document_ids"], strict=True):
            for document in documents.unique():
                alone = ids[documents == document][None]
                one, n = objective({"input_ids": alone, "labels": alone})
                expected, labels = expected + float(one.detach()), labels + int(n)
    assert int(count) == labels
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-12)


def test_a_prefix_is_seen_in_both_directions_and_nothing_after_it_is_seen_early(objective):
    batch = batch_of({"objective": {"name": "prefix_lm", "prefix": [0.5, 0.5]}}, rows=1)
    del batch["labels"]
    before = logits(objective, batch)
    for place, seen_by in ((5, range(12)), (8, range(8, 12))):  # the prefix is 0 … 5
        changed = {**batch, "input_ids": batch["input_ids"].clone()}
        changed["input_ids"][0, place] = (changed["input_ids"][0, place] + 1) % 50
        moved = (logits(objective, changed) - before).abs().amax(-1)[0] > 1e-9
        assert moved.nonzero().flatten().tolist() == list(seen_by), place


def logits(objective: Objective, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        output = objective.model(**objective.arguments(batch))
    return output if isinstance(output, torch.Tensor) else output.logits


def test_what_a_token_sees_is_what_a_loop_says():
    draw = torch.Generator().manual_seed(0)
    documents = torch.randint(0, 3, (3, 9), generator=draw).sort(-1).values
    prefix = torch.tensor([0, 4, 9])
    found = visible(documents, documents, prefix)
    for b in range(3):
        for q in range(9):
            for k in range(9):
                allowed = (k <= q or k < prefix[b]) and documents[b, q] == documents[b, k]
                assert bool(found[b, 0, q, k]) == bool(allowed)


@pytest.mark.parametrize(
    ("hf", "config", "message"),
    [
        (
            "bloom",
            {"hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50},
            "position biases from its attention",
        ),
        ("mistral", LLAMA | {"sliding_window": 4}, "layers with other masks"),
    ],
)
def test_a_model_that_reads_more_out_of_its_mask_is_refused(hf, config, message):
    model = build(ModelOrigin(hf=hf, config=config), meta=True)
    with pytest.raises(TraceError, match=message):
        Objective(model).arguments(batch_of({"documents": "separate"}))


def test_glm_needs_a_model_that_takes_positions():
    ids = torch.zeros(2, 12, dtype=torch.int64)
    batch = {"input_ids": ids, "labels": ids}
    with pytest.raises(AutoparError, match="glm needs a model that takes position_ids"):
        example(Data(objective="glm"), batch, frozenset({"input_ids", "attention_mask"}))
    with pytest.raises(
        AutoparError, match="glm needs a decoder of tokens; this model's batch has pixel_values, labels"
    ):
        example(Data(objective="glm"), {"pixel_values": ids, "labels": ids}, None)
