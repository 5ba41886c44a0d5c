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
from opreg.kernels.reference.paged_attention_check import CacheShape
from opreg.kernels.triton import kv_cache_update, rpa_kernels, rpa_launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
TYPES = {"bf16": tl.bfloat16, "fp32": tl.float32}
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
    decode: bool,
    *,
    split: bool = False,
    search: bool = True,
    features: bool = False,
    q: str = "bf16",
    kv: str = "bf16",
    head_dim: int = 128,
    page_size: int = 16,
    chip: int = 90,
    group: int = 4,
) -> dict[str, Any]:
    """llama-3-8b: 32/8 heads of 128, bf16, pages of 16, unless said otherwise."""
    block_d, itemsize = max(16, triton.next_power_of_2(head_dim)), TYPES[q].primitive_bitwidth // 8
    choose = rpa_launch.decode_tiles if decode else rpa_launch.prefill_tiles
    tiles = choose(group, block_d, itemsize, SHARED_BYTES[chip])
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
        "ANY": search,
        "SKIP": 0 if decode else 4,
        "SPLIT": split,
        "MIN_TILES": rpa_launch.MIN_TILES,
        "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.positions,
        "BLOCK_D": block_d,
        "BLOCK_Q": tiles.rows // group,
    }
    pointers = {"q": q, "out": q, "kv": kv, **dict.fromkeys(("lse", "part", "part_lse", "sinks"), "fp32")}
    made = compiled(
        rpa_kernels.attend_blocks, pointers, constants, chip, num_warps=tiles.warps, num_stages=tiles.stages
    )
    return figures(name, made, chip)


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
    constants = kv_cache_update.blocks(CacheShape(pages=1, page_size=16, heads=8, head_dim=128))
    warps = constants.pop("num_warps")
    constants |= {"PAGE_SIZE": 16, "K_SCALED": scaled, "V_SCALED": scaled}
    pointers = {"k": "bf16", "v": "bf16", "kv": kv, "slot_mapping": "i64"}
    return figures(name, compiled(function, pointers, constants, 90, num_warps=warps), 90)


json.dump(
    [
        attention("prefill", False),
        attention("prefill with window, cap, sinks and lse", False, features=True),
        attention("prefill, pages of 128", False, page_size=128),
        attention("prefill, head_dim 256", False, head_dim=256),
        attention("prefill, float32", False, q="fp32", kv="fp32"),
        attention("prefill, A100", False, chip=80),
        attention("decode, split", True, split=True),
        attention(
            "decode in a mixed batch, split, window, cap and sinks", True, split=True, search=False, features=True
        ),
        attention("decode, split, fp8 cache", True, split=True, kv="fp8e4nv"),
        attention("decode, not split", True),
        attention("decode, split, head_dim 256", True, split=True, head_dim=256),
        attention("decode, split, float32", True, split=True, q="fp32", kv="fp32"),
        merge("merge"),
        write("kv_cache_update, fp8", kv_cache_update.write_slots, "fp8e4nv", True),
        write("fused write", kv_cache_update.write_step, "bf16", False),
    ],
    sys.stdout,
)
