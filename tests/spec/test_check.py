"""Cheap checks: the arithmetic of pins, devices, batch and model, told before anything is traced."""

import pytest

from autopar.errors import PlanError, SpecError
from autopar.spec import Job
from autopar.spec.check import check_job, check_length, sizes
from autopar.spec.origin import ModelOrigin

TINY = {"family": "llama", "layers": 4, "hidden": 252, "ffn": 512, "heads": 6, "vocab": 100}
DEGREES = {"pp": 1, "dp": 1, "cp": 1, "tp": 1}


def job(model: object = TINY, sequences: int = 64, length: int = 32, **pins: object) -> Job:
    batch = {"sequences": sequences, "length": length}
    return Job.model_validate({"model": model, "cluster": "dgx-a100", "batch": batch, "pins": pins})


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"tp": 8, "pp": 4}, "pp 4 · tp 8 = 32 devices are needed, the cluster has 8"),
        ({"tp": 3}, "tp 3 = 3 does not divide the cluster's 8 devices"),
        ({**DEGREES, "dp": 4}, "= 4 devices, the cluster has 8; every device must be used"),
        ({**DEGREES, "tp": 8}, "tp 8 is more than the model's 6 heads"),
        ({"tp": 4, "dp": 2, "pp": 1, "microbatch": 3}, "microbatch 3 does not divide .* 64 sequences / dp 2 = 32"),
        ({"microbatch": 7}, "microbatch 7 does not divide .* 64 sequences"),
        ({"pp": 8}, "pp 8 stages are more than the model's 4 blocks"),
        ({"pp": 2, "virtual_stages": 4}, "pp 2 · virtual_stages 4 = 8 stages are more than the model's 4 blocks"),
        ({"pp": 2, "virtual_stages": 2, "schedule": "1f1b"}, "needs schedule interleaved1f1b"),
        ({"pp": 4, "schedule": "zbvzerobubble"}, "2 · pp 4 = 8 stages"),
        ({"pp": 2, "schedule": "zbvzerobubble", "zero": 2}, "zero 2 does not go with schedule zbvzerobubble"),
        (
            {"pp": 2, "dp": 4, "schedule": "interleavedzerobubble", "zero": 3},
            "loses some without a word; zero 0 and 1 do",
        ),
        ({"pp": 2, "schedule": "dualpipev", "virtual_stages": 1}, "has virtual_stages 2, not 1"),
        ({"cp": 8, "tp": 1, "pp": 1, "dp": 1}, "cp 8 does not divide the batch's length of 36"),
    ],
)
def test_impossible_pins_are_refused_with_their_arithmetic(pins, message):
    with pytest.raises(PlanError, match=message):
        check_job(job(length=36, **pins))


def test_replicas_must_divide_the_batch_also_where_they_only_follow():
    with pytest.raises(PlanError, match="dp 8 replicas are more than the 4 sequences"):
        check_job(job(sequences=4, tp=1, pp=1, cp=1))
    with pytest.raises(PlanError, match="dp 8 replicas do not divide the 12 sequences"):
        check_job(job(sequences=12, dp=8))


def test_a_degree_that_divides_neither_heads_nor_hidden_is_refused_and_others_are_left_to_the_solver():
    with pytest.raises(PlanError, match="tp 2 divides neither the model's 9 heads nor the hidden size 189"):
        check_job(job({**TINY, "heads": 9, "kv_heads": 3, "hidden": 189, "head_dim": 20}, tp=2))
    check_job(job({**TINY, "heads": 9, "kv_heads": 3, "hidden": 144}, tp=2))


def test_possible_pins_pass():
    check_job(job(**{**DEGREES, "dp": 8, "microbatch": 2, "zero": 3}))
    check_job(job(pp=2, virtual_stages=2, schedule="interleaved1f1b"))
    check_job(job(pp=2, zero=1, schedule="zbvzerobubble"))
    check_job(job(pp=2, dp=1, zero=3, schedule="zbvzerobubble"))
    check_job(job())


def test_sizes_are_read_from_every_kind_of_description(tmp_path):
    assert sizes(job().model or ModelOrigin()).blocks == 4
    assert sizes(ModelOrigin(hf="bloom", config={"n_layer": 5, "n_head": 4, "hidden_size": 64})).heads == 4
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 3, "num_attention_heads": 2}')
    assert sizes(ModelOrigin(hf=str(tmp_path))).blocks == 3
    assert sizes(ModelOrigin(python="a:b")).blocks is None
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SpecError, match=r"config\.json: not JSON"):
        sizes(ModelOrigin(hf=str(tmp_path)))


def test_learned_positions_bound_the_length():
    check_length(job("gpt2", length=1024))
    check_length(job("llama-7b", length=100_000))
    with pytest.raises(SpecError, match="1025 is more than the 1024 learned positions of gpt2"):
        check_length(job("gpt2", length=1025))


def test_a_job_without_its_parts_says_which():
    with pytest.raises(SpecError, match="no model and no cluster and no batch"):
        check_job(Job())
