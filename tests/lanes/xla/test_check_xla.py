"""`opreg check --device xla`: clean for what ships, and it finds what can go wrong on tensors without memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
import torch
from torch import Tensor

import opreg
from opreg import devices
from opreg.cli import main
from opreg.testing import check_op

X = Annotated[Tensor, "n d"]


@opreg.register_op("xla_check::good")
def good(x: X) -> X:
    """Twice x."""
    return x * 2


@opreg.register_op("xla_check::in_place", mutates_args=("out",))
def in_place(x: X, out: X) -> None:
    """Twice x into out."""
    out.copy_(x * 2)


@opreg.register_op("xla_check::writes_x")
def writes_x(x: X) -> X:
    """Twice x, and x is lost."""
    return x.mul_(2).clone()


@opreg.register_op("xla_check::returns_a_view")
def returns_a_view(x: X) -> X:
    """x itself, seen from elsewhere."""
    return x.view(-1).view(x.shape)


@opreg.register_op("xla_check::another_kernel")
def another_kernel(x: X) -> X:
    """Twice x, which the kernel for XLA does not give."""
    return x * 2


@another_kernel.register_kernel("xla")
def a_little_more(x: Tensor) -> Tensor:
    return x * 2.001


@opreg.register_op("xla_check::half_written", mutates_args=("out",))
def half_written(x: X, out: X) -> None:
    """Twice x into out, of which the first row is forgotten."""
    out[1:].copy_(x[1:] * 2)


@opreg.register_op("xla_check::fails_on_xla")
def fails_on_xla(x: X) -> X:
    """Twice x on a CPU."""
    if x.device.type == "xla":
        raise RuntimeError("no")
    return x * 2


@opreg.register_op("xla_check::layer", mutates_args=("out",), kind="attention")
def of_a_layer(x: X, out: X, layer_name: opreg.LayerName) -> None:
    """x times the first rows of what the layer holds."""
    layer, _ = opreg.current_layer(layer_name)
    out.copy_(x * layer["weight"][: x.shape[0]])


@of_a_layer.register_inputs
def _inputs(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    weight = torch.rand(5, 3, generator=generator, dtype=dtype).to(device)
    with opreg.forward_context(layers={"xla_check": {"weight": weight}}, metadata=3):
        yield {"x": torch.ones(4, 3, device=device), "out": torch.zeros(4, 3, device=device), "layer_name": "xla_check"}


@pytest.mark.parametrize("op", [good, in_place, of_a_layer])
def test_a_good_op_is_clean(op) -> None:
    report = check_op(op, device="xla", compilers=op is good)
    assert report.ok, str(report)
    states = {line.check: line.state for line in report.lines}
    assert states["kernel reference"] == states["writes"] == states["layouts"] == "ok"
    assert states["opcheck"] == "skipped"


@pytest.mark.parametrize(
    ("op", "check", "text"),
    [
        (writes_x, "writes", "writes x (seen in the values), but mutates_args does not name 'x'"),
        (returns_a_view, "aliasing", "result 0 shares memory with x; return a copy"),
        (another_kernel, "kernel ", "values differ"),
        (half_written, "outputs", "values of out are not written, first at [0, 0]"),
        (fails_on_xla, "kernel reference", "refuses: RuntimeError: no"),
    ],
)
def test_what_is_broken_is_found(op, check: str, text: str) -> None:
    failed = {line.check: line.detail for line in check_op(op, device="xla", input=0, compilers=False).failed}
    found = [detail for name, detail in failed.items() if name.startswith(check)]
    assert found, failed
    assert text in found[0]


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("segment_sum", "pallas/segment_sum"),
        ("ragged_paged_attention_update", "pallas/rpa_update"),
    ],
)
def test_the_command_finds_nothing_in_what_ships(name: str, kernel: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", name, "--device", "xla", "--input", "0", "--kernel", kernel]) == 0
    assert "openxla, static sizes, no graph break" in capsys.readouterr().out


def test_times_on_xla_are_of_work_that_was_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "segment_sum", "--device", "xla", "--seconds", "0.01", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["bench"]
    assert {row["what"] for row in rows} == {"pallas/segment_sum", "reference"}
    assert devices.present() == ["cpu", "xla"]
