"""opreg::gdn_attention_core_xpu: the name under which vLLM's XPU callers know opreg::gdn_attention_core."""

from typing import Annotated

from torch import Tensor

from opreg import LayerName, register_op

from .gdn_attention_core import _inputs, gdn_attention_core


@register_op("opreg::gdn_attention_core_xpu", mutates_args=("core_attn_out", "z"), kind="attention")
def gdn_attention_core_xpu(
    core_attn_out: Annotated[Tensor, "t hv v"],
    z: Annotated[Tensor, "t hv v"],
    projected_states_qkvz: Annotated[Tensor, "t _"],
    projected_states_ba: Annotated[Tensor, "t _"],
    layer_name: LayerName,
) -> None:
    """Alias of opreg::gdn_attention_core, by the name and argument order of vLLM PR #39466."""
    gdn_attention_core(core_attn_out, z, projected_states_qkvz, projected_states_ba, layer_name)


gdn_attention_core_xpu.register_inputs(_inputs)
for _dtype, (_rms, _why) in gdn_attention_core.op.tolerances.items():
    gdn_attention_core_xpu.tolerance(_dtype, _rms, _why)
gdn_attention_core_xpu.register_sharding("hv", others={"projected_states_qkvz": 1, "projected_states_ba": 1})
