"""Models of other packages: layers that are alike are one piece there too."""

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
