"""Reading a compiler's schedule: regions, loops, slots, and the kernel's figures out of them."""

from pathlib import Path

import pytest
from opreg.kernels.pallas.tpu_bundles import DumpError, parse_schedule, read_schedule

LISTING = """\
// kernel: ragged_paged_attention
     0   : { %1 = sadd.s32 1, %0 }
   0x1   : { %2 = dma.hbm_to_vmem %1 }
   0x2 LB: > { %3 = vmatmul %2 }
   0x3   : > { %4 = vmatmul %3 ;; %5 = vadd %3, %3 }
   0x4 PF: { %6 = vadd %5, %5 }
"""

TABLE = """\
per-bundle slot counts
MATMUL,VALU,SALU
 2 4 2

 0 0 1
 0 0 1
 1 0 0
 1 1 0
 0 1 0
"""


def test_regions_are_cut_at_loops_and_depths():
    schedule = parse_schedule(LISTING, TABLE)
    assert schedule.capacity == {"MATMUL": 2, "VALU": 4, "SALU": 2}
    assert [(r.address, r.depth, r.loop, r.bundles, r.copies) for r in schedule.regions] == [
        (0, 0, False, 2, 1),
        (2, 1, True, 2, 0),
        (4, 0, False, 1, 0),
    ]
    assert schedule.bundles == 5
    (product,) = schedule.products(least=2)
    assert product.slots == {"MATMUL": 2, "VALU": 1}
    assert product.use("MATMUL", schedule.capacity) == 0.5


def test_a_listing_of_another_kernel_is_noticed():
    with pytest.raises(DumpError, match="the listing has 5 bundles and the table 4"):
        parse_schedule(LISTING, TABLE.removesuffix(" 0 1 0\n"))


def test_a_dump_that_is_not_there(tmp_path: Path):
    with pytest.raises(DumpError, match="no schedule of 'nothing'"):
        read_schedule(tmp_path, "nothing")


def test_files_are_found_by_the_kernels_name(tmp_path: Path):
    (tmp_path / "1-attention.1-02-final_bundles.txt").write_text(LISTING)
    (tmp_path / "1-attention.1-01-schedule-analysis_final_bundles.txt").write_text("something else")
    (tmp_path / "1-attention.1-00-final_hlo-static-per-bundle-utilization.txt").write_text(TABLE)
    assert read_schedule(tmp_path, "attention").bundles == 5
