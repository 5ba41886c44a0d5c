"""The C entry of paged attention: bit for bit what the way through Python gives, and None for what is not for it."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from opreg.kernels.cpu import build, rpa_cpp, rpa_cpp_update, rpa_entry
from opreg.kernels.cpu.rpa_cpp import Options
from opreg.ops.paged_attention_inputs import Batch, make_batch
from torch import Tensor
from torch._subclasses import FakeTensorMode

LENGTHS = [(5, 18), (1, 29), (0, 9), (20, 40), (1, 16), (3, 3)]
DEFAULTS = Options(0.25, None, None, None, None, None, "NHD", None)
KV_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]


@pytest.fixture(autouse=True, scope="module")
def loaded() -> None:
    rpa_cpp.library(rpa_cpp.level())
    assert rpa_entry.attend is not rpa_entry._nothing, "the entry could not be built"


def attend(batch: Batch, options: Options, lse: bool = False, k: Any = None, v: Any = None) -> Any:
    return rpa_entry.attend(*batch, *options, lse, k, v)


def through_python(batch: Batch, options: Options, with_lse: bool) -> Any:
    lse = torch.empty(batch.q.shape[:2]) if with_lse else None
    out = rpa_cpp.attend("test", *batch, options, lse)
    return (out, lse) if with_lse else out


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):
        return all(map(equal, one, other))
    return bool(one.dtype == other.dtype and torch.equal(one, other) and one.stride() == other.stride())


@pytest.mark.parametrize("kv_dtype", KV_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lse", [False, True])
def test_the_same_bits_as_through_python(dtype: torch.dtype, kv_dtype: torch.dtype, lse: bool) -> None:
    for kv_layout, changed in (
        ("NHD", {}),
        ("HND", {"sliding_window": 7, "soft_cap": 5.0, "mask_value": -1e30}),
        ("HND", {"sinks": torch.linspace(-1, 2, 4), "k_scale": 0.5, "v_scale": 2, "sm_scale": 1}),
    ):
        options = DEFAULTS._replace(kv_layout=kv_layout, **changed)
        batch = make_batch(
            LENGTHS, dtype=dtype, kv_dtype=kv_dtype, kv_layout=kv_layout, window=options.sliding_window, page_size=8
        )
        made = attend(batch, options, lse)
        assert made is not None
        assert equal(made, through_python(batch, options, lse))


@pytest.mark.parametrize(
    "lengths", [[], [(0, 4), (0, 0)], [(1, 16)], [(16, 16)]], ids=["none", "no rows", "page", "full"]
)
@pytest.mark.parametrize("spare", [0, 2])
def test_empty_and_full(lengths: list[tuple[int, int]], spare: int) -> None:
    batch = make_batch(lengths, spare_rows=spare, spare_seqs=spare, page_size=16)
    assert equal(attend(batch, DEFAULTS, True), through_python(batch, DEFAULTS, True))


def test_what_a_batch_is_a_part_of_is_not_read() -> None:
    batch = make_batch(LENGTHS)
    wide = torch.full((batch.q.shape[0], 3, 4, 40), torch.nan)
    wide[:, 1, :, 3:19] = batch.q
    stored = torch.full((batch.kv_pages.shape[0], 2, *batch.kv_pages.shape[1:]), torch.nan)
    stored[:, 1] = batch.kv_pages
    table = torch.full((batch.page_indices.shape[0], 50), -1, dtype=torch.int32)
    table[:, 5 : 5 + batch.page_indices.shape[1]] = batch.page_indices
    views = batch._replace(
        q=wide[:, 1, :, 3:19], kv_pages=stored[:, 1], page_indices=table[:, 5 : 5 + batch.page_indices.shape[1]]
    )
    assert equal(attend(views, DEFAULTS), through_python(batch, DEFAULTS, False))


def strided(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, -1)[..., ::2]


UNUSUAL: dict[str, Callable[[Batch, Options], tuple[Batch, Options]]] = {
    "strided q": lambda b, o: (b._replace(q=strided(b.q)), o),
    "strided kv_lens": lambda b, o: (b._replace(kv_lens=strided(b.kv_lens)), o),
    "strided cu_q_lens": lambda b, o: (b._replace(cu_q_lens=strided(b.cu_q_lens)), o),
    "strided table": lambda b, o: (b._replace(page_indices=strided(b.page_indices)), o),
    "sinks in bfloat16": lambda b, o: (b, o._replace(sinks=torch.tensor([0.5, 1, 2, 4], dtype=torch.bfloat16))),
    "strided sinks": lambda b, o: (b, o._replace(sinks=strided(torch.tensor([0.5, 1, 2, 4])))),
    "negative q": lambda b, o: (b._replace(q=torch._neg_view(b.q)), o),
    "negative sinks": lambda b, o: (b, o._replace(sinks=torch._neg_view(torch.tensor([0.5, 1, 2, 4])))),
}


@pytest.mark.parametrize("what", UNUSUAL)
def test_the_unusual_is_left_to_python(what: str) -> None:
    batch, options = UNUSUAL[what](make_batch(LENGTHS), DEFAULTS)
    assert attend(batch, options) is None
    plain = Batch(*(t.resolve_neg().contiguous() for t in batch))
    sinks = None if options.sinks is None else options.sinks.resolve_neg().float().contiguous()
    assert equal(rpa_cpp.rpa_cpp(*batch, **options._asdict()), attend(plain, options._replace(sinks=sinks)))


def wrong(**changed: Any) -> Callable[[Batch, Options], tuple[Batch, Options]]:
    tensors = {name: value for name, value in changed.items() if name in Batch._fields}
    rest = {name: value for name, value in changed.items() if name not in tensors}
    return lambda b, o: (
        b._replace(**{name: value(getattr(b, name)) for name, value in tensors.items()}),
        o._replace(**rest),
    )


WRONG = {
    "sm_scale is nan": wrong(sm_scale=float("nan")),
    "sm_scale is inf": wrong(sm_scale=float("inf")),
    "sliding_window is 0": wrong(sliding_window=0),
    "sliding_window is -3": wrong(sliding_window=-3),
    "soft_cap is 0.0": wrong(soft_cap=0.0),
    "soft_cap is inf": wrong(soft_cap=float("inf")),
    "mask_value is -1.0": wrong(mask_value=-1.0),
    "mask_value is nan": wrong(mask_value=float("nan")),
    "k_scale is 0.0": wrong(k_scale=0.0),
    "v_scale is -1.0": wrong(v_scale=-1.0),
    "kv_layout is 'DHN'": wrong(kv_layout="DHN"),
    r"sinks is \(3,\)": wrong(sinks=torch.zeros(3)),
    r"sinks is torch\.int32": wrong(sinks=torch.zeros(4, dtype=torch.int32)),
    "q has 2 dimensions": wrong(q=lambda q: q[0]),
    r"q is torch\.float64": wrong(q=lambda q: q.double()),
    r"q is torch\.float8_e5m2": wrong(q=lambda q: q.to(torch.float8_e5m2)),
    "q has head_dim 15 but kv_pages has 16": wrong(q=lambda q: q[..., :15]),
    "q has 3 heads and kv_pages 2": wrong(q=lambda q: q[:, :3]),
    "q has 0 heads": wrong(q=lambda q: q[:, :0]),
    "kv_pages has 3 dimensions": wrong(kv_pages=lambda kv: kv[0]),
    r"kv_pages is torch\.int32": wrong(kv_pages=lambda kv: kv.int()),
    "has 3 combined heads": wrong(kv_pages=lambda kv: kv[:, :, :3]),
    "has 0 combined heads": wrong(kv_pages=lambda kv: kv[:, :, :0]),
    "has an empty page_size": wrong(kv_pages=lambda kv: kv[:, :0]),
    r"kv_lens is torch\.int64": wrong(kv_lens=lambda t: t.long()),
    "kv_lens has 2 dimensions": wrong(kv_lens=lambda t: t[None]),
    r"page_indices is torch\.int64": wrong(page_indices=lambda t: t.long()),
    "page_indices has 1 dimensions": wrong(page_indices=lambda t: t[0]),
    "page_indices has 7 rows but kv_lens has 8": wrong(page_indices=lambda t: t[:7]),
    "page_indices has 0 rows but kv_lens has 8": wrong(page_indices=lambda t: t[:0]),
    "cu_q_lens has 8 values": wrong(cu_q_lens=lambda t: t[:8]),
    r"cu_q_lens is torch\.int64": wrong(cu_q_lens=lambda t: t.long()),
    "num_seqs has 0 values": wrong(num_seqs=lambda t: t[:0]),
    "num_seqs has 2 values": wrong(num_seqs=lambda t: t.repeat(2)),
    r"num_seqs is torch\.int64": wrong(num_seqs=lambda t: t.long()),
    "num_seqs is 9, but the index tensors hold 8": wrong(num_seqs=lambda t: t + 3),
    "num_seqs is -1": wrong(num_seqs=lambda t: t - 7),
    r"cu_q_lens\[0\] is 1": wrong(cu_q_lens=lambda t: t + 1),
    r"kv_lens\[1\] is -1": wrong(kv_lens=lambda t: torch.where(t == 29, -1, t).int()),
    r"page_indices\[0, 0\] is 1073741824, but kv_pages has": wrong(page_indices=lambda t: torch.full_like(t, 2**30)),
    r"page_indices\[0, 0\] is -7, but kv_pages has": wrong(page_indices=lambda t: torch.full_like(t, -7)),
}


@pytest.mark.parametrize("message", WRONG)
def test_the_wrong_is_left_to_python_which_words_it(message: str) -> None:
    batch, options = WRONG[message](make_batch(LENGTHS), DEFAULTS)
    assert attend(batch, options) is None
    with pytest.raises(ValueError, match="opreg::ragged_paged_attention: .*" + message):
        rpa_cpp.rpa_cpp(*batch, **options._asdict())


@pytest.mark.parametrize("place", [*range(14)])
def test_what_is_no_such_argument_at_all(place: int) -> None:
    values = [*make_batch(LENGTHS), *DEFAULTS]
    for value in (object(), "x", values, 10**400):
        given = [*values[:place], value, *values[place + 1 :]]
        assert rpa_entry.attend(*given, False, None, None) is None
    with pytest.raises(TypeError, match="17 positional arguments"):
        rpa_entry.attend(*values)


def test_tensors_that_are_not_in_memory_are_left_to_python() -> None:
    batch = make_batch(LENGTHS)
    assert attend(batch._replace(q=batch.q.to("meta")), DEFAULTS) is None
    assert attend(batch._replace(kv_pages=batch.kv_pages.to_sparse()), DEFAULTS) is None
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert attend(Batch(*map(mode.from_tensor, batch)), DEFAULTS) is None


def test_results_are_as_torch_makes_them() -> None:
    batch = make_batch(LENGTHS)
    with torch.inference_mode():
        out = attend(batch, DEFAULTS)
        assert out.is_inference()
    parameter = torch.nn.Parameter(batch.q)
    made = attend(batch._replace(q=parameter), DEFAULTS)
    assert type(made) is Tensor
    assert not made.requires_grad
    assert not made.is_inference()
    assert made._version == 0
    assert made.add_(1)._version == 1


@pytest.mark.parametrize("kv_dtype", KV_DTYPES, ids=str)
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_updates_write_the_same_bits(kv_dtype: torch.dtype, kv_layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(LENGTHS, kv_dtype=kv_dtype, kv_layout=kv_layout)
    k, v = (torch.randn(batch.q.shape[0], 2, 16, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    slots = torch.randperm(batch.kv_pages.shape[0] * 4)[: k.shape[0]]
    slots[2] = -1
    options = {"kv_layout": kv_layout, "k_scale": 0.5, "v_scale": None}
    found = []
    for direct in (True, False):
        if not direct:
            monkeypatch.setattr(rpa_entry, "attend", rpa_entry._nothing)
            monkeypatch.setattr(rpa_entry, "write", rpa_entry._nothing)
        for wide in (slots, slots.int()):
            pages = batch.kv_pages.clone()
            if direct:
                assert rpa_entry.write(k, v, pages, wide, *options.values()) is True
            else:
                rpa_cpp_update.rpa_cpp_write(k, v, pages, wide, **options)
            found.append(pages)
        pages = batch.kv_pages.clone()
        out = rpa_cpp_update.rpa_cpp_fused(batch.q, k, v, pages, *batch[2:], **options)
        found += [pages, out]
    as_bits = [t.view(torch.uint8) for t in found]
    assert all(map(torch.equal, as_bits[:4], as_bits[4:]))
    assert torch.equal(as_bits[0], as_bits[1])
    assert not torch.equal(as_bits[0], batch.kv_pages.view(torch.uint8))


@pytest.mark.parametrize(
    "change",
    [
        lambda k, v, pages, slots: (k[1:], v, pages, slots),
        lambda k, v, pages, slots: (k, v[:, :1], pages, slots),
        lambda k, v, pages, slots: (k, v.half(), pages, slots),
        lambda k, v, pages, slots: (strided(k), v, pages, slots),
        lambda k, v, pages, slots: (k, v, pages[0], slots),
        lambda k, v, pages, slots: (k, v, strided(pages), slots),
        lambda k, v, pages, slots: (k, v, pages, slots[1:]),
        lambda k, v, pages, slots: (k, v, pages, slots.float()),
        lambda k, v, pages, slots: (k, v, pages, slots + 1000),
        lambda k, v, pages, slots: (k, v, pages, slots - 2),
    ],
)
def test_writes_that_are_not_for_it_write_nothing(change: Callable[..., tuple[Tensor, ...]]) -> None:
    k, v, pages, slots = torch.ones(3, 2, 8), torch.ones(3, 2, 8), torch.zeros(2, 4, 4, 8), torch.arange(3)
    assert rpa_entry.write(*change(k, v, pages, slots), "NHD", None, None) is None
    assert (pages == 0).all()
    assert rpa_entry.write(k, v, pages, slots, "NHD", None, None) is True


def test_an_update_needs_a_row_of_k_and_v_for_every_row_of_q() -> None:
    batch = make_batch(LENGTHS)
    before = batch.kv_pages.nan_to_num()
    k = torch.ones(batch.q.shape[0] - 1, 2, 16)
    assert attend(batch, DEFAULTS, False, k, k) is None
    assert torch.equal(batch.kv_pages.nan_to_num(), before)


def test_negative_views_are_read_as_what_they_stand_for() -> None:
    batch = make_batch(LENGTHS, poison=False)
    k, v = torch.randn(2, batch.q.shape[0], 2, 16)
    found = []
    for one, other in ((k, v), (torch._neg_view(-k), torch._neg_view(-v))):
        pages = batch.kv_pages.clone()
        out = rpa_cpp_update.rpa_cpp_fused(batch.q, one, other, pages, *batch[2:])
        rpa_cpp_update.rpa_cpp_write(one, other, pages, torch.arange(len(k)))
        found.append((out, pages))
    assert equal(*found)
    pages = torch._neg_view(batch.kv_pages)
    assert "negative view" in (rpa_cpp.why_not_cache(pages) or "")
    assert attend(batch._replace(kv_pages=pages), DEFAULTS) is None


def test_memory_that_is_shared_until_a_write_is_read_after_it() -> None:
    batch = make_batch(LENGTHS, poison=False)
    k, v = torch.randn(2, batch.q.shape[0], 2, 16)
    lazy = torch._lazy_clone(batch.kv_pages)
    want = batch.kv_pages.clone()
    out = attend(batch._replace(kv_pages=lazy), DEFAULTS, False, k, v)
    assert equal(out, rpa_cpp_update.rpa_cpp_fused(batch.q, k, v, want, *batch[2:], sm_scale=0.25))
    assert torch.equal(lazy, want)
    assert not torch.equal(batch.kv_pages, want)


def test_where_it_cannot_be_built_calls_go_through_python(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    batch = make_batch(LENGTHS)
    want = attend(batch, DEFAULTS)
    monkeypatch.setattr(rpa_entry, "attend", rpa_entry._nothing)
    monkeypatch.setattr(rpa_entry, "write", rpa_entry._nothing)
    monkeypatch.setattr(rpa_cpp, "_libraries", {})
    monkeypatch.setattr(build.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    with caplog.at_level(logging.WARNING, "opreg"):
        assert equal(rpa_cpp.rpa_cpp(*batch, sm_scale=0.25), want)
        assert equal(rpa_cpp.rpa_cpp(*batch, sm_scale=0.25), want)
    assert caplog.text.count("no Python.h in /nowhere; install the headers of this Python") == 1
    assert rpa_entry.attend is rpa_entry._nothing
