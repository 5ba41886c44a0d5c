"""Compile the attention and cache kernels for a GPU that is not here, and print what ptxas says: one JSON list.

Run without TRITON_INTERPRET, which replaces the compiler for the whole process.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from opreg.kernels.triton import kv_cache_update, rpa_kernels, rpa_launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
INDEX = ("kv_lens", "page_indices", "cu_q_lens", "num_seqs", "slot_mapping")


def compiled(function: Any, pointers: dict[str, str], constants: dict[str, Any], chip: int, **options: int) -> Any:
    """`function` with pointers and strides that are multiples of 16, as a model's are."""
    signature, attributes = {}, {}
    for place, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers or name in INDEX:
            signature[name] = "*" + pointers.get(name, "i32")
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if re.search("scale|cap_", name) else "i32"
            if re.search("_token|_head|_position|kv_page", name):
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)


def figures(name: str, made: Any, chip: int) -> dict[str, Any]:
    """Registers, spilled bytes and shared memory of a program."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        target = f"sm_{chip}a" if chip >= 90 else f"sm_{chip}"
        command = [str(PTXAS), "-v", "--gpu-name", target, file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    return {
        "name": name,
        "registers": int(re.findall(r"Used (\d+) registers", said)[0]),
        "spilled": sum(map(int, spills)) if len(spills) == 2 else None,
        "shared": made.metadata.shared,
        "limit": SHARED_BYTES[chip],
        "tensor_cores": len(re.findall(r"wgmma\.mma_async|mma\.sync", made.asm["ptx"])),
        "async_copies": made.asm["ptx"].count("cp.async.c"),
        "exact_division": "div.rn.f32" in made.asm["ptx"],
    }


def attention(
    name: str,
    tokens: int,
    seqs: int,
    *,
    launch: int = 0,
    features: bool = False,
    q: str = "bf16",
    kv: str = "bf16",
    heads: int = 8,
    group: int = 4,
    head_dim: int = 128,
    page_size: int = 16,
    chip: int = 90,
) -> dict[str, Any]:
    """A launch that is planned for a batch: llama-3-8b, 32/8 heads of 128, bf16, pages of 16, unless said otherwise."""
    device = rpa_launch.Device(132, SHARED_BYTES[chip])
    itemsize = TYPES[q].primitive_bitwidth // 8
    plan = rpa_launch.plans(tokens, seqs, 8192, None, heads, group, head_dim, itemsize, device)[launch]
    constants = {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "PAGE_SIZE": page_size,
        "DOT": TYPES[q],
        "PRECISION": "ieee",
        "WINDOWED": features,
        "CAPPED": features,
        "SINKS": features,
        "LSE": features,
        "ANY": plan.any_sequence,
        "SKIP": plan.skip,
        "SPLIT": plan.splits > 1,
        "MIN_TILES": rpa_launch.MIN_TILES,
        "BLOCK_M": plan.tiles.rows,
        "BLOCK_N": plan.tiles.positions,
        "BLOCK_D": max(16, rpa_launch.power_of_two(head_dim)),
        "BLOCK_Q": plan.block_q,
    }
    pointers = {"q": q, "out": q, "kv": kv, **dict.fromkeys(("lse", "part", "part_lse", "sinks"), "fp32")}
    options = {"num_warps": plan.tiles.warps, "num_stages": plan.tiles.stages}
    made = compiled(rpa_kernels.attend_blocks, pointers, constants, chip, **options)
    return {**figures(name, made, chip), "splits": plan.splits, "rows": plan.tiles.rows}


def merge(name: str) -> dict[str, Any]:
    constants = {
        "GROUP": 4,
        "HEAD_DIM": 128,
        "LSE": True,
        "ANY": False,
        "BLOCK_M": 16,
        "BLOCK_D": 128,
        "BLOCK_Q": 4,
        "BLOCK_S": rpa_launch.MOST_SPLITS,
    }
    pointers = {"out": "bf16", **dict.fromkeys(("lse", "part", "part_lse"), "fp32")}
    return figures(name, compiled(rpa_kernels.merge_splits, pointers, constants, 90, num_warps=4), 90)


def write(name: str, function: Any, kv: str, scaled: bool) -> dict[str, Any]:
    block = kv_cache_update.blocks(8, 128)
    constants = {
        "PAGE_SIZE": 16,
        "HEADS": 8,
        "HEAD_DIM": 128,
        "K_SCALED": scaled,
        "V_SCALED": scaled,
        "BLOCK_H": block.heads,
        "BLOCK_D": block.elements,
    }
    pointers = {"k": "bf16", "v": "bf16", "kv": kv, "slot_mapping": "i64"}
    return figures(name, compiled(function, pointers, constants, 90, num_warps=block.warps), 90)


PREFILL = {"tokens": 2048, "seqs": 16, "launch": 1}
DECODE = {"tokens": 16, "seqs": 16}


def main() -> None:
    everything = [
        attention("prefill", **PREFILL),
        attention("prefill with window, cap, sinks and lse", **PREFILL, features=True),
        attention("prefill, pages of 128", **PREFILL, page_size=128),
        attention("prefill, head_dim 256", **PREFILL, head_dim=256),
        attention("prefill, float32", **PREFILL, q="fp32", kv="fp32"),
        attention("prefill, float16 over int8", **PREFILL, q="fp16", kv="i8"),
        attention("prefill, A100", **PREFILL, chip=80),
        attention("decode", **DECODE),
        attention("decode of drafts, 64/8 heads, with window, cap and sinks", 64, 16, group=8, features=True),
        attention("decode, fp8 cache", **DECODE, kv="fp8e4nv"),
        attention("decode, float16 over fp8 of range", **DECODE, q="fp16", kv="fp8e5"),
        attention("decode, no splits", 256, 256),
        attention("decode, head_dim 256", **DECODE, head_dim=256),
        attention("decode, float32", **DECODE, q="fp32", kv="fp32"),
        merge("merge"),
        write("kv_cache_update, fp8", kv_cache_update.write_slots, "fp8e4nv", True),
        write("fused write", kv_cache_update.write_step, "bf16", False),
    ]
    json.dump(everything, sys.stdout)


if __name__ == "__main__":
    main()
