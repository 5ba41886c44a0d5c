"""Compile the ragged paged attention kernel with the real TPU compiler on a machine without a TPU.

Every compilation runs in a process of its own: an instruction that a chip lacks aborts the compiler instead of raising.
Needs the packages jax and libtpu.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .rpa_blocks import Blocks
from .tpu_bundles import Schedule, read_schedule

# Smallest topology of each chip that the compiler knows.
TOPOLOGIES = {"v4": "v4:1x1x1", "v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1", "7x": "tpu7x:1x1x1"}

KERNEL = "ragged_paged_attention"
RESULT = "tpu-compile-result "


class TpuCompileError(RuntimeError):
    """The TPU compiler refused the kernel, or died of it."""


@dataclass(frozen=True)
class Problem:
    """Shapes and options of one call; the defaults are one layer of Llama 3 8B."""

    tokens: int = 2048
    sequences: int = 128
    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 128
    pages: int = 2048
    pages_per_sequence: int = 64
    q_dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    layout: str = "HND"
    sliding_window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    lse: bool = False
    update: bool = False  # write the step into the cache first


@dataclass(frozen=True)
class Compiled:
    """What came of one compilation."""

    seconds: float
    temporary_bytes: int
    code_bytes: int
    schedule: Schedule | None


def compile_for(
    chip: str, problem: Problem, *, blocks: Blocks | None = None, schedule: bool = False, timeout: float = 1200.0
) -> Compiled:
    """Compile `problem` for `chip` ("v4", "v5e", "v5p", "v6e", "7x"), with its schedule if asked for (slower).

    Raises TpuCompileError with the compiler's own words; DumpError where the schedule cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",  # no metadata server to ask
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process stops at the first one's lock file
        }
        if schedule:
            environment["LIBTPU_INIT_ARGS"] = (
                f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*final_.*"
            )
        order = {"chip": chip, "problem": asdict(problem), "blocks": None if blocks is None else asdict(blocks)}
        try:
            done = subprocess.run(
                [sys.executable, "-m", __spec__.name, json.dumps(order)],
                env=environment,
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise TpuCompileError(f"{chip}: the compiler took more than {timeout:.0f} s on {problem}") from error
        answers = [line for line in done.stdout.split("\n") if line.startswith(RESULT)]
        if done.returncode or not answers:
            words = done.stderr.strip()[-3000:]
            raise TpuCompileError(f"{chip}: the compiler ended with code {done.returncode} on {problem}:\n{words}")
        answer = json.loads(answers[-1].removeprefix(RESULT))
        read = read_schedule(Path(folder), KERNEL) if schedule else None
        return Compiled(answer["seconds"], answer["temporary_bytes"], answer["code_bytes"], read)


def lower(chip: str, problem: Problem, blocks: Blocks | None) -> Any:
    """The problem lowered for the chip: call .compile() on it. Runs in the compiling process."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from .rpa import ragged_paged_attention, ragged_paged_attention_lse
    from .rpa_update import ragged_paged_attention_update

    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]

    def array(shape: tuple[int, ...], dtype: str) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=SingleDeviceSharding(device))

    p = problem
    combined = 2 * p.kv_heads
    page = (p.page_size, combined) if p.layout == "NHD" else (combined, p.page_size)
    arguments = [
        array((p.tokens, p.query_heads, p.head_dim), p.q_dtype),
        array((p.pages, *page, p.head_dim), p.kv_dtype),
        array((p.sequences,), "int32"),
        array((p.sequences, p.pages_per_sequence), "int32"),
        array((p.sequences + 1,), "int32"),
        array((1,), "int32"),
    ]
    if p.sinks:
        arguments.append(array((p.query_heads,), "float32"))
    attention: Any = ragged_paged_attention_lse if p.lse else ragged_paged_attention
    if p.update:
        attention = ragged_paged_attention_update
        new = array((p.tokens, p.kv_heads, p.head_dim), p.q_dtype)
        arguments[1:1] = [new, new]

    def call(*args: Any) -> Any:
        return attention(
            *(args[:-1] if p.sinks else args),
            sm_scale=p.head_dim**-0.5,
            sliding_window=p.sliding_window,
            soft_cap=p.soft_cap,
            sinks=args[-1] if p.sinks else None,
            kv_layout=p.layout,
            blocks=blocks,
            chip=chip,
        )

    return jax.jit(call, donate_argnums=(3,) if p.update else ()).lower(*arguments)


def main(order: str) -> None:
    """The compiling process: one order in JSON, one line of result on standard output."""
    wanted = json.loads(order)
    blocks = None if wanted["blocks"] is None else Blocks(**wanted["blocks"])
    lowered = lower(wanted["chip"], replace(Problem(), **wanted["problem"]), blocks)
    start = time.perf_counter()
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    result = {
        "seconds": time.perf_counter() - start,
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
    }
    sys.stdout.write(f"\n{RESULT}{json.dumps(result)}\n")


if __name__ == "__main__":
    main(sys.argv[1])
