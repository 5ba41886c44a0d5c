"""Sum of rows by segment with torch's index_add."""

import torch
from torch import Tensor


def segment_sum(data: Tensor, segment_ids: Tensor, num_segments: int) -> Tensor:
    """One pass; rows whose id is out of range go to a row of their own that is cut off."""
    wide = torch.promote_types(data.dtype, torch.float32) if data.dtype.is_floating_point else data.dtype
    inside = (segment_ids >= 0) & (segment_ids < num_segments)
    ids = torch.where(inside, segment_ids, num_segments)
    sums = torch.zeros(num_segments + 1, *data.shape[1:], dtype=wide, device=data.device)
    return sums.index_add_(0, ids, data.to(wide))[:num_segments].to(data.dtype).contiguous()
