"""Models of other packages: like layers are one piece there too, and a second process compiles none of them again."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from opreg.backend import last_report

pytestmark = pytest.mark.slow


@torch.no_grad()
def test_a_32_layer_llama_is_three_pieces() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch._dynamo.reset()
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False)).eval()
    tokens = torch.randint(0, 128, (1, 9))
    options = {"inner": "aot_eager", "split_on": ["aten::scaled_dot_product_attention"]}
    compiled = torch.compile(model, backend="opreg", options=options)
    torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
    report = last_report()
    assert report.summary() == "65 pieces: 32 at aten::scaled_dot_product_attention, 33 compiled as 3 distinct"
    assert not report.notes


@pytest.fixture(scope="module")
def models() -> ModuleType:
    spec = importlib.util.spec_from_file_location("opreg_bench_models", Path(__file__).parent / "bench" / "models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "pieces", "distinct"), [("llama", 33, 3), ("qwen3_next", 13, 6)])
def test_a_second_process_compiles_nothing_again(
    models: ModuleType, tmp_path: Path, name: str, pieces: int, distinct: int
) -> None:
    """Each process also compares what the compiled model computes with what the model computes."""
    cold = models.fresh(name, "opreg", str(tmp_path))
    assert (cold["pieces"], cold["distinct"]) == (pieces, distinct)
    assert (cold["hits"], cold["misses"]) == (0, distinct)
    for irrelevant in ("", "names"):
        warm = models.fresh(name, "opreg", str(tmp_path), irrelevant)
        assert (warm["hits"], warm["misses"]) == (distinct, 0)
    changed = models.fresh(name, "opreg", str(tmp_path), "eps")
    assert (changed["hits"], changed["misses"]) == (0, distinct), "every piece holds a norm"
