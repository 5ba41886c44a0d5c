"""Kernels: which one runs, why the others do not, how a choice is forced, what is refused."""

import importlib
import logging
import sys
import threading
import types

import pytest
import torch
from torch import Tensor

from opreg import KernelError, RegistrationError, SignatureError, UnknownOpError, register_op, use_kernel
from opreg.select import explain
from opreg.spec import KernelSpec

X = torch.ones(4)


def new_op(name):
    """An op whose kernels say by their value which one ran: the reference gives 0."""

    def body(x: Tensor, n: int = 0) -> Tensor:
        return x * 0

    return register_op(f"t_select::{name}")(body)


def returning(value, name):
    def kernel(x: Tensor, n: int = 0) -> Tensor:
        return x * 0 + value

    kernel.__name__ = kernel.__qualname__ = name
    return kernel


def ran(op, *args):
    return int(op(X, *args)[0])


def test_largest_priority_wins_and_a_tie_is_refused():
    op = new_op("priority")
    op.register_kernel("cpu", returning(1, "one"))
    op.register_kernel(("cpu", "xpu"), returning(2, "two"), priority=5)
    assert ran(op) == 2
    with pytest.raises(
        RegistrationError, match=r"'test_select/two' \(cpu xpu\) and 'test_select/three' \(xpu\) both have priority 5"
    ):
        op.register_kernel("xpu", returning(3, "three"), priority=5)
    assert ran(op) == 2


def test_registering_the_same_kernel_again_changes_nothing():
    op = new_op("again")
    kernel = returning(1, "one")
    op.register_kernel("cpu", kernel)
    op.register_kernel("cpu", kernel)
    assert [k.name for k in op.op.kernels] == ["test_select/one", "reference"]
    with pytest.raises(RegistrationError, match="there is already a kernel 'test_select/one' for cpu"):
        op.register_kernel("xpu", kernel)


def test_refusals_are_reasons():
    op = new_op("reasons")

    def small_only(x: Tensor, n: int = 0) -> str | None:
        return f"n is {n}; at most 8" if n > 8 else None

    op.register_kernel("cpu", returning(1, "small"), why_not=small_only, priority=2)
    op.register_kernel("cpu", returning(2, "absent"), requires="no_such_module.sub", priority=3)
    op.register_kernel("cuda", returning(3, "other"))
    assert ran(op, 3) == 1
    assert ran(op, 9) == 0
    text = str(op.explain(X, 9))
    assert text.splitlines() == [
        "t_select::reasons on cpu: reference",
        "  test_select/absent: missing (needs no_such_module.sub)",
        "  test_select/small: refused (n is 9; at most 8)",
        "  test_select/other: other device (for cuda)",
        "  reference: used",
    ]


def test_an_error_in_a_kernel_or_predicate_is_an_error():
    op = new_op("errors")

    def broken(x: Tensor, n: int = 0) -> str | None:
        raise ZeroDivisionError("in the predicate")

    op.register_kernel("cpu", returning(1, "one"), why_not=broken)
    with pytest.raises(ZeroDivisionError, match="in the predicate"):
        op(X)


def test_nothing_takes_the_call():
    @register_op("t_select::declared")
    def declared(x: Tensor) -> Tensor:
        """No body."""
        ...

    with pytest.raises(
        KernelError, match=r"t_select::declared on cpu: no kernel takes this call\n.*Register a kernel for 'cpu'"
    ):
        declared(X)
    declared.register_kernel("cuda", lambda x: x)
    with pytest.raises(KernelError, match="other device"):
        declared(X)


def test_kernels_by_name_are_imported_at_first_use(monkeypatch):
    module = types.ModuleType("t_select_kernels")
    monkeypatch.setitem(sys.modules, "t_select_kernels", module)
    op = new_op("by_name")
    op.register_kernel("cpu", "t_select_kernels:fast", why_not="t_select_kernels:limits")
    module.fast = returning(7, "fast")
    module.limits = lambda x, n=0: "n is odd" if n % 2 else None
    assert (ran(op, 2), ran(op, 3)) == (7, 0)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (
            "no_such_module_at_all:f",
            KernelError,
            "importing 'no_such_module_at_all' failed.*name the missing module in requires",
        ),
        ("math:sqroot", KernelError, r"module 'math' has no 'sqroot'\. Did you mean 'sqrt'\?"),
        ("statistics:mean", SignatureError, r"kernel statistics/mean has parameters \(data\) but the op has \(x, n\)"),
    ],
)
def test_kernels_that_cannot_be_loaded(target, error, message):
    op = new_op(f"load_{target.split(':')[0]}")
    op.register_kernel("cpu", target)
    with pytest.raises(error, match=message):
        op(X)


@pytest.mark.parametrize("target", ["module", "a:b:c", ":f", "m:"])
def test_targets_are_checked(target):
    with pytest.raises(RegistrationError, match=r"is not of the form 'package.module:function'"):
        new_op("targets").register_kernel("cpu", target)


def test_signatures_are_compared():
    op = new_op("signatures")
    for wrong in (lambda x: x, lambda n, x: x, lambda x, *, n: x):
        with pytest.raises(SignatureError, match="by the same names, in the same order"):
            op.register_kernel("cpu", wrong)
    with pytest.raises(SignatureError, match=r"takes \*args or"):
        op.register_kernel("cpu", lambda *args: args)


def test_unknown_device_type():
    with pytest.raises(UnknownOpError, match=r"unknown device type 'cuda0'.*Did you mean 'cuda'\?"):
        new_op("device").register_kernel("cuda0", returning(1, "one"))


def test_use_kernel_forces_nests_and_restores():
    op = new_op("force")
    op.register_kernel("cpu", returning(1, "one"))
    op.register_kernel("cpu", returning(2, "two"), priority=1)
    with use_kernel("t_select::force", "test_select/one"):
        assert ran(op) == 1
        with use_kernel("force", "reference"):
            assert ran(op) == 0
        assert ran(op) == 1
        assert op.explain(X).forced == "use_kernel"
    assert ran(op) == 2


def test_use_kernel_is_for_this_thread_only():
    op = new_op("thread")
    op.register_kernel("cpu", returning(1, "one"))
    seen = []
    with use_kernel("t_select::thread", "reference"):
        thread = threading.Thread(target=lambda: seen.append(ran(op)))
        thread.start()
        thread.join()
        assert ran(op) == 0
    assert seen == [1]


@pytest.mark.parametrize(
    ("requirement", "version", "why"),
    [
        ("acme_math>=1.2", None, "needs acme_math>=1.2"),
        ("acme_math>=1.2", "", "needs acme_math>=1.2 (its version is not known)"),
        ("acme_math>=1.2", "1.1.9", "needs acme_math>=1.2 (1.1.9 is installed)"),
        ("acme_math>=1.2", "1.2rc1", "needs acme_math>=1.2 (1.2rc1 is installed)"),
        ("acme_math>=1.2", "1.2.dev3+g0a", "needs acme_math>=1.2 (1.2.dev3+g0a is installed)"),
        ("acme_math>=1.2", "1.2.0", None),
        ("acme_math>=1.2.0", "1.2", None),
        ("acme_math.sub>=1.2", "1.10", None),
        ("acme_math", "0.1", None),
    ],
)
def test_a_required_version_is_read_without_importing(tmp_path, monkeypatch, requirement, version, why):
    if version is not None:
        package = tmp_path / "acme_math"
        package.mkdir()
        (package / "__init__.py").write_text("raise AssertionError('imported')" if "." not in requirement else "")
        (package / "sub.py").write_text("raise AssertionError('imported')")
        if version:
            facts = tmp_path / f"acme_math-{version}.dist-info"
            facts.mkdir()
            (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: acme-math\nVersion: {version}\n")
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
    assert KernelSpec("acme/kernel", None, "acme:kernel", (requirement,)).missing() == why
    sys.modules.pop("acme_math", None)


@pytest.mark.parametrize("requirement", ["acme-math", "acme>1", "acme>=", "acme>=1.2,<2", ""])
def test_a_requirement_of_another_form_is_refused(requirement):
    with pytest.raises(RegistrationError, match=r"is neither 'module' nor 'module>=1\.2' nor 'c\+\+'"):
        new_op("form").register_kernel("cpu", returning(1, "form"), requires=requirement)


def test_a_forced_kernel_that_cannot_run_raises():
    op = new_op("cannot")
    op.register_kernel("cuda", returning(1, "gpu"))
    op.register_kernel("cpu", returning(2, "absent"), requires="no_such_module")
    op.register_kernel("cpu", returning(3, "picky"), why_not=lambda x, n=0: "never", priority=1)
    for kernel, reason in [
        ("test_select/gpu", "it is for cuda, not cpu"),
        ("test_select/absent", "needs no_such_module"),
        ("test_select/picky", "never"),
    ]:
        with use_kernel("t_select::cannot", kernel), pytest.raises(KernelError, match=f"cannot run here: {reason}"):
            op(X)
    assert ran(op) == 0


@pytest.mark.parametrize(
    ("op", "kernel", "message"),
    [
        ("t_select::forse", "reference", r"no op 't_select::forse'.*Did you mean 't_select::force'\?"),
        ("t_select::names", "referense", r"has no kernel 'referense'; it has reference\. Did you mean 'reference'\?"),
    ],
)
def test_use_kernel_with_unknown_names(op, kernel, message):
    new_op("names")
    new_op("force")
    with pytest.raises(UnknownOpError, match=message), use_kernel(op, kernel):
        pass


def test_environment_forces(monkeypatch):
    op = new_op("environment")
    op.register_kernel("cpu", returning(1, "one"))
    monkeypatch.setenv("OPREG_KERNELS", "other::op=x, t_select::environment=reference")
    assert ran(op) == 0
    assert op.explain(X).forced == "OPREG_KERNELS"
    monkeypatch.setenv("OPREG_KERNELS", "t_select::environment")
    with pytest.raises(UnknownOpError, match="is not of the form ns::op=kernel"):
        op.explain(X)


def test_a_predicate_without_parameters_is_asked_once(caplog):
    op, asked = new_op("once"), []

    def nothing_here() -> str | None:
        asked.append("nothing")
        return "no such machine"

    def here() -> str | None:
        asked.append("here")

    op.register_kernel("cpu", returning(1, "far"), why_not=nothing_here, priority=2)
    op.register_kernel("cpu", returning(2, "near"), why_not=here, priority=1)
    with caplog.at_level(logging.INFO, logger="opreg"):
        assert [ran(op), ran(op), ran(op)] == [2, 2, 2]
    assert asked == ["nothing", "here"]
    assert [record.getMessage() for record in caplog.records] == [
        "t_select::once on cpu: test_select/far refused: no such machine",
        "t_select::once on cpu runs test_select/near",
    ]
    assert "test_select/far: refused (no such machine)" in str(op.explain(X))
    with use_kernel("t_select::once", "test_select/far"), pytest.raises(KernelError, match="here: no such machine"):
        op(X)


def test_what_is_compiled_at_first_use_needs_a_compiler(monkeypatch):
    op = new_op("compiled")
    op.register_kernel("cpu", returning(1, "native"), requires="c++")
    monkeypatch.delenv("OPREG_NO_BUILD", raising=False)
    monkeypatch.setenv("CXX", sys.executable)
    assert explain(op.op, "cpu").selected.name == "test_select/native"
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    found = explain(op.op, "cpu")
    assert found.selected.name == "reference"
    assert found.decisions[0].why == (
        "needs a C++ compiler (looked for no-such-compiler, from CXX); install g++ or set CXX"
    )
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert "looked for g++, c++, clang++)" in explain(op.op, "cpu").decisions[0].why
    monkeypatch.setenv("OPREG_NO_BUILD", "1")
    assert explain(op.op, "cpu").decisions[0].why == (
        "needs to be built with a C++ compiler, and OPREG_NO_BUILD is set"
    )
    assert ran(op) == 0


def test_choice_is_logged_once(caplog):
    op = new_op("logged")
    op.register_kernel("cpu", returning(1, "one"), why_not=lambda x, n=0: "too big" if n else None)
    with caplog.at_level(logging.INFO, logger="opreg"):
        for _ in range(3):
            op(X, 0)
            op(X, 1)
    assert [record.getMessage() for record in caplog.records] == [
        "t_select::logged on cpu runs test_select/one",
        "t_select::logged on cpu: test_select/one refused: too big",
        "t_select::logged on cpu runs reference",
    ]


def test_falling_back_to_the_reference_on_an_accelerator(caplog, monkeypatch):
    from opreg.select import runner

    op = new_op("fallback")
    op.register_kernel("xpu", returning(1, "absent"), requires="no_such_module")
    with caplog.at_level(logging.WARNING, logger="opreg"):
        runner(op.op, "xpu")
        runner(op.op, "xpu")
    (record,) = caplog.records
    assert record.getMessage() == (
        "t_select::fallback on xpu falls back to its reference, which is slow; "
        "test_select/absent: missing (needs no_such_module)"
    )
    monkeypatch.setenv("OPREG_STRICT", "1")
    with pytest.raises(KernelError, match="OPREG_STRICT is set, so this is an error"):
        runner(op.op, "xpu")


def test_explain_of_a_device_that_is_not_here():
    op = new_op("elsewhere")
    op.register_kernel("tpu", returning(1, "one"))
    assert explain(op.op, "tpu").selected.name == "test_select/one"
