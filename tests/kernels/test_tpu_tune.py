"""Block sizes: what the tuner makes of figures, what the table gives, and what fits where the table says nothing."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import pytest
from opreg.kernels.pallas import rpa_blocks, rpa_table, tpu_tune
from opreg.kernels.pallas.rpa_blocks import ANY_CHIP, VMEM_BYTES, Blocks, current_chip, default_blocks, vmem_bytes
from opreg.kernels.pallas.rpa_check import CacheShape
from opreg.kernels.pallas.rpa_table import TABLE
from opreg.kernels.pallas.tpu_bundles import Region, Schedule
from opreg.kernels.pallas.tpu_compile import Problem, TpuCompileError
from opreg.kernels.pallas.tpu_figures import figures

CAPACITY = {"MATMUL": 2, "SALU": 2}


def product(address, bundles, matmul=200):
    return Region(address, 3, False, bundles, 0, {"MATMUL": matmul})


def control(address, bundles, *, loop=False, copies=0):
    return Region(address, 1, loop, bundles, copies, {})


SCHEDULE = Schedule(
    [
        control(0, 100),
        control(100, 40, loop=True, copies=4),  # the first sequence's copies
        control(140, 15, loop=True, copies=1),
        control(155, 30, loop=True),  # the loop over sequences
        control(185, 38, loop=True, copies=4),  # next block
        control(223, 14, loop=True, copies=1),
        control(237, 39, loop=True, copies=4),  # next sequence
        control(276, 14, loop=True, copies=1),
        product(290, 690),
        product(980, 650),
        control(1630, 50),
        control(1680, 170, loop=True),  # prefill begins
        product(1850, 9500),
        product(11350, 9200),
        product(20550, 1700),
        product(22250, 1600),
    ],
    CAPACITY,
)


def test_figures_of_a_schedule():
    found = figures("v6e", Problem(), Blocks(256, 32, 512, 512), SCHEDULE)
    assert (found.masked, found.inside, found.small_masked, found.small_inside) == (9500, 9200, 1700, 1600)
    assert found.matrix_bound == 8192
    # The loop over sequences, four pages in one turn of four, one product, and the end.
    assert found.decode_sequence == 30 + 39 + 650 + 50
    assert found.copy_floor == pytest.approx(2238, abs=1)
    assert found.decode_ratio == 1.0


def test_another_number_of_products_is_an_error():
    with pytest.raises(RuntimeError, match="expected 4 regions with matrix products, found 6"):
        figures("v6e", Problem(), Blocks(32, 32, 512, 512), SCHEDULE)


def test_the_cheapest_candidate_that_compiles_is_chosen(monkeypatch):
    base = figures("v6e", Problem(), Blocks(256, 32, 512, 512), SCHEDULE)

    def measure(chip, problem, blocks):
        if blocks.kv_per_block == 1024:
            raise TpuCompileError("v6e: out of vector memory")
        share = blocks.kv_per_chunk / 512
        return dataclasses.replace(
            base, decode_product=int(690 * share) + 60, inside=9200 * blocks.tokens_per_block // 256
        )

    monkeypatch.setattr(tpu_tune, "measure", measure)
    monkeypatch.setattr(tpu_tune, "CANDIDATES", [(256, 32, 512, 512), (256, 32, 512, 256), (256, 32, 1024, 512)])
    assert tpu_tune.choose("v6e", Problem()) in {(256, 32, 512, 512), (256, 32, 512, 256)}
    monkeypatch.setattr(tpu_tune, "CANDIDATES", [(256, 32, 1024, 512)])
    with pytest.raises(TpuCompileError, match="no candidate compiles"):
        tpu_tune.choose("v6e", Problem())


def test_shapes_on_the_command_line():
    assert tpu_tune.parse_shape("32/8x128") == Problem()
    wanted = Problem(query_heads=16, kv_heads=2, head_dim=256, layout="NHD", kv_dtype="int8")
    assert tpu_tune.parse_shape("16/2x256:NHD:int8") == wanted


def test_the_table_comes_first(monkeypatch):
    shape = CacheShape(8, 16, 2, 4, 128)
    monkeypatch.setitem(rpa_blocks.TABLE, ("v6e", 4, 2, 128, "bfloat16", "int8", "NHD"), (64, 16, 128, 64))
    blocks = default_blocks(shape, jnp.bfloat16, jnp.int8, "v6e", "NHD")
    assert blocks == Blocks(64, 16, 128, 64, VMEM_BYTES["v6e"])


@pytest.mark.parametrize("chip", [*VMEM_BYTES, ANY_CHIP])
@pytest.mark.parametrize("heads", [(1, 1), (32, 8), (64, 8), (128, 128)])
def test_default_blocks_are_within_vector_memory(chip, heads):
    query_heads, kv_heads = heads
    shape = CacheShape(8, 16, kv_heads, query_heads, 128)
    blocks = default_blocks(shape, jnp.bfloat16, jnp.bfloat16, chip, "HND")
    limit = VMEM_BYTES.get(chip, min(VMEM_BYTES.values()))
    assert vmem_bytes(blocks, shape, jnp.bfloat16, jnp.bfloat16) <= limit
    assert blocks.vmem_limit_bytes == limit


def test_table_entries_are_whole_tiles_of_known_chips():
    for (chip, *_), (tokens, tile, kv, chunk) in TABLE.items():
        assert chip in VMEM_BYTES
        assert (tokens % tile, tile % 16, kv % chunk) == (0, 0, 0)


def test_without_a_tpu_the_chip_is_any():
    assert current_chip() == ANY_CHIP


def test_the_table_is_written_as_it_ships():
    assert tpu_tune.render(TABLE) == Path(rpa_table.__file__).read_text()
