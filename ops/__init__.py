if __name__ != "opreg.ops":
    raise ImportError("this package is opreg.ops; install opreg and import it by that name")

from .gated_delta_rule import gated_delta_rule as gated_delta_rule
from .gated_delta_rule import gated_delta_rule_backward as gated_delta_rule_backward
from .gdn_attention import gdn_attention as gdn_attention
from .gdn_attention_core import gdn_attention_core as gdn_attention_core
from .gdn_attention_core_xpu import gdn_attention_core_xpu as gdn_attention_core_xpu
from .grouped_matmul import grouped_matmul as grouped_matmul
from .kv_cache_update import kv_cache_update as kv_cache_update
from .paged_attention_core import paged_attention_core as paged_attention_core
from .ragged_paged_attention import ragged_paged_attention as ragged_paged_attention
from .ragged_paged_attention import ragged_paged_attention_lse as ragged_paged_attention_lse
from .ragged_paged_attention_update import ragged_paged_attention_update as ragged_paged_attention_update
from .rms_norm import rms_norm as rms_norm
from .segment_sum import segment_sum as segment_sum
from .shard_alike import shard_alike as shard_alike
from .splash_attention import splash_attention as splash_attention
from .splash_attention import splash_attention_backward as splash_attention_backward
