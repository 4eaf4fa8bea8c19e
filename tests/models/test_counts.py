"""The shipped models have exactly the published numbers of parameters."""

from __future__ import annotations

import pytest

from autopar.models.load import build
from autopar.spec import library

# model → (parameters, where the number was published)
PUBLISHED = {
    "llama-7b": (6_738_415_616, "calflops' table (MrYxJ/calculate-flops.pytorch, README)"),
    "llama-13b": (13_015_864_320, "quoted in public repositories"),
    "llama-33b": (32_528_943_616, "pyllama's log of llama-30b, trainable_params"),
    "llama-65b": (65_285_660_672, "pyllama's log, 'Number of parameters'"),
    "llama-2-7b": (6_738_415_616, "the same sizes as llama-7b, calflops' table"),
    "llama-2-13b": (13_015_864_320, "safetensors total 13,015,866,880 less the rotary buffers, 40 layers of 64"),
    "llama-2-70b": (68_976_648_192, "Together's table of models; AuroraGPT-70B's log"),
    "llama-3-8b": (8_030_261_248, "keras-hub's llama3 presets; safetensors total of Llama-3.1-8B"),
    "llama-3-70b": (70_553_706_496, "safetensors total of Llama-3.1-70B"),
    "llama-3-405b": (405_853_388_800, "safetensors total of Llama-3.1-405B"),
    "chatglm-6b": (6_173_286_400, "calflops' table"),
    "chatglm2-6b": (6_243_584_000, "calflops' table"),
    "falcon-7b": (7_217_189_760 - 65_024 * 4_544, "safetensors total, the tied head counted once"),
    "falcon-40b": (41_835_970_560 - 65_024 * 8_192, "safetensors total, the tied head counted once"),
    "falcon-180b": (179_522_565_120 - 65_024 * 14_848, "safetensors total, the tied head counted once"),
    "bloom-560m": (559_214_592, "keras-hub's bloom presets; huggingface_hub's tests"),
    "bloom-7b1": (7_069_016_064, "calflops' table"),
    "bloom-176b": (176_247_271_424, "huggingface.js' tests"),
    "gpt2": (124_439_808, "keras-hub's gpt2 presets"),
    "gpt2-xl": (1_557_611_200, "keras-hub's gpt2 presets"),
    "smollm2-135m": (134_515_008, "safetensors total of SmolLM2-135M"),
}


def count(name: str) -> int:
    """Parameters on the meta device, a tied tensor counted once."""
    return sum(parameter.numel() for parameter in build(name, meta=True).parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_has_its_published_number_of_parameters(name):
    assert count(name) == PUBLISHED[name][0], PUBLISHED[name][1]


KERAS = "keras-hub's presets"
OTHERS = {  # name → (fields, parameters, where the number was published)
    "mistral-7b-v0.3": (
        dict(family="mistral", layers=32, hidden=4096, ffn=14336, heads=32, kv_heads=8, vocab=32768),
        7_248_023_552,
        KERAS,
    ),
    "gemma-2b": (
        dict(family="gemma", layers=18, hidden=2048, ffn=16384, heads=8, kv_heads=1, head_dim=256, vocab=256000),
        2_506_172_416,
        KERAS,
    ),
    "gemma2-2b": (
        dict(family="gemma2", layers=26, hidden=2304, ffn=9216, heads=8, kv_heads=4, head_dim=256, vocab=256000),
        2_614_341_888,
        KERAS,
    ),
    "qwen2.5-32b": (
        dict(family="qwen2", layers=64, hidden=5120, ffn=27648, heads=40, kv_heads=8, vocab=152064),
        32_763_876_352,
        KERAS,
    ),
    "qwen3-4b": (
        dict(family="qwen3", tied=True, layers=36, hidden=2560, ffn=9728, heads=32, kv_heads=8, head_dim=128, vocab=151936),
        4_022_468_096,
        KERAS,
    ),
    "phi-3-mini": (
        dict(family="phi3", layers=32, hidden=3072, ffn=8192, heads=32, vocab=32064),
        3_821_079_552,
        KERAS,
    ),
    "olmo-2-13b": (
        dict(family="olmo2", layers=40, hidden=5120, ffn=13824, heads=40, vocab=100352),
        13_716_198_400,
        "safetensors total of OLMo-2-1124-13B",
    ),
    "pythia-12b without its embeddings": (
        dict(family="gpt_neox", layers=36, hidden=5120, heads=40, vocab=50688),
        11_327_027_200 + 2 * 50_688 * 5_120,
        "EleutherAI's table of Pythia: parameters without the embeddings",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_of_another_family_has_its_published_number_too(name):
    fields, published, source = OTHERS[name]
    assert sum(p.numel() for p in build(fields, meta=True).parameters()) == published, source


def test_gpt3_has_the_parameters_that_megatron_published_in_billions():
    assert round(count("gpt3-175b") / 1e9, 1) == 174.6, "Narayanan et al. 2021, table 2"


def test_every_shipped_model_is_counted_here():
    assert set(library.names("models")) == {*PUBLISHED, "gpt3-175b"}
