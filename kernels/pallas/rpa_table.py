"""Block sizes that the tuner chose; written by tpu_tune, not by hand.

(chip, query heads, kv heads, head_dim, q dtype, cache dtype, layout):
(tokens_per_block, tokens_per_tile, kv_per_block, kv_per_chunk)
"""

TABLE: dict[tuple[str, int, int, int, str, str, str], tuple[int, int, int, int]] = {
    ("7x", 8, 1, 128, "bfloat16", "bfloat16", "HND"): (256, 32, 1024, 512),
    ("v5e", 8, 1, 128, "bfloat16", "bfloat16", "HND"): (256, 32, 512, 256),
    ("v6e", 8, 1, 128, "bfloat16", "bfloat16", "HND"): (256, 32, 1024, 512),
}
