"""The main job: a Qwen3-Next served with opreg's ops gives the untouched model's tokens, whatever the scheduling."""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import Qwen3NextForCausalLM

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def program() -> Iterator[ModuleType]:
    """The program as a module, with its folder on the path as Python puts it there for a script."""
    sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("opreg_example_05", EXAMPLES / "05_serve_qwen3_next.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the program does
    yield module
    torch.set_num_threads(threads)
    sys.path.remove(str(EXAMPLES))


class TestScheduler:
    """The scheduler alone, without a model: a fake step gives every request the token 7."""

    @staticmethod
    def drain(scheduler: object, room: object, requests: list[object]) -> list[list[object]]:
        """Run to the end and check at every step what must hold at every step."""
        steps = []
        while chunks := scheduler.plan():
            steps.append(chunks)
            running = scheduler.running
            slots = [r.slot for r in running]
            pages = [p for r in running for p in r.pages]
            assert sorted(slots + scheduler.free_slots) == list(range(room.slots))
            assert sorted(pages + scheduler.free_pages) == list(range(room.pages))
            assert sum(c.count for c in chunks) <= room.token_budget
            for chunk in chunks:
                assert chunk.start == chunk.request.cached
                assert len(chunk.request.pages) == room.pages_for(chunk.start + chunk.count)
            # Whoever has its whole prompt in the cache gets its next token in every step.
            fed = {c.request.name for c in chunks}
            assert all(r.name in fed for r in running if r.cached >= len(r.prompt))
            scheduler.commit(chunks, [7 for c in chunks if c.samples])
            assert len(steps) < 10_000
        assert sorted(scheduler.free_slots) == list(range(room.slots))
        assert sorted(scheduler.free_pages) == list(range(room.pages))
        assert all(r.generated == [7] * r.max_new_tokens for r in requests)
        return steps

    @pytest.mark.parametrize("seed", range(20))
    def test_random_loads_share_nothing_and_end(self, program: ModuleType, seed: int) -> None:
        from serving.scheduler import Request, Room, Scheduler

        rng = random.Random(seed)
        slots = rng.randint(1, 5)
        room = Room(slots, rng.randint(4, 20), page_size=rng.choice([1, 3, 16]), token_budget=rng.randint(slots, 40))
        scheduler = Scheduler(room)
        longest = room.pages * room.page_size
        requests = []
        for index in range(rng.randint(1, 12)):
            prompt = rng.randint(1, longest)
            requests.append(Request(f"r{index}", [1] * prompt, rng.randint(1, longest - prompt + 1)))
            scheduler.add(requests[-1])
        self.drain(scheduler, room, requests)

    def test_a_short_request_joins_while_a_long_prompt_is_read(self, program: ModuleType) -> None:
        from serving.scheduler import Request, Room, Scheduler

        room = Room(slots=2, pages=20, page_size=4, token_budget=8)
        scheduler = Scheduler(room)
        requests = [Request("short", [1, 2], 6), Request("long", [1] * 30, 2)]
        for request in requests:
            scheduler.add(request)
        steps = self.drain(scheduler, room, requests)
        assert [{c.request.name: c.count for c in chunks} for chunks in steps[:3]] == [
            {"short": 2, "long": 6},
            {"short": 1, "long": 7},
            {"short": 1, "long": 7},
        ]

    def test_what_can_never_run_is_refused_at_once(self, program: ModuleType) -> None:
        from serving.scheduler import Request, Room, Scheduler

        scheduler = Scheduler(Room(slots=1, pages=2, page_size=4))
        scheduler.add(Request("fits", [1] * 5, 4))
        with pytest.raises(ValueError, match="'big' needs 3 pages, the cache has 2"):
            scheduler.add(Request("big", [1] * 5, 5))
        with pytest.raises(ValueError, match="'empty' needs a prompt"):
            scheduler.add(Request("empty", [], 5))
        with pytest.raises(ValueError, match="token_budget 2 < 3 slots"):
            Scheduler(Room(slots=3, pages=2, token_budget=2))


@pytest.fixture(scope="module")
def answers(program: ModuleType) -> tuple[Qwen3NextForCausalLM, list[list[int]]]:
    """The untouched model of the quick run and its tokens; also once all in one padded batch, which must agree."""
    from serving import untouched
    from serving.model import build_model
    from serving.prompts import QUICK, make_requests

    model = build_model(program.QUICK_PLAN.pattern)
    expected = untouched.one_by_one(model, make_requests(QUICK))
    assert untouched.one_batch(model, make_requests(QUICK)) == expected
    return model, expected


@pytest.mark.parametrize(
    ("slots", "pages", "page_size", "token_budget"),
    [(1, 7, 16, 64), (3, 40, 4, 3), (3, 150, 1, 50), (3, 2, 128, 512), (2, 40, 5, 7)],
)
def test_any_room_gives_the_untouched_models_tokens(
    program: ModuleType,
    answers: tuple[Qwen3NextForCausalLM, list[list[int]]],
    slots: int,
    pages: int,
    page_size: int,
    token_budget: int,
) -> None:
    from serving.engine import Engine
    from serving.model import Step, build_model, replace_cores
    from serving.prompts import QUICK, make_requests
    from serving.scheduler import Room

    room = Room(slots, pages, page_size, token_budget)
    model = build_model(program.QUICK_PLAN.pattern)
    layers = replace_cores(model, room)
    engine = Engine(Step(model), layers, room)
    for _ in range(2):  # the second time every slot and page holds what the first left
        run = engine.serve(make_requests(QUICK))
        assert [r.generated for r in run.requests] == answers[1]


def test_the_tokens_are_worth_comparing(answers: tuple[Qwen3NextForCausalLM, list[list[int]]]) -> None:
    """A random model that repeats itself would agree with anything."""
    assert all(len(set(tokens)) > len(tokens) // 2 for tokens in answers[1])
    assert len({tuple(tokens) for tokens in answers[1]}) == len(answers[1])


def test_the_program(program: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    torch._dynamo.reset()
    assert program.main(["--quick"]) == 0
    out = capsys.readouterr().out
    assert "All 17 tokens of all 3 requests equal the untouched model's." in out
    assert "GRAPH   1 for every step, of 1 to 64 tokens (5 different counts)" in out
    assert "9 pieces: 4 at opreg::gdn_attention_core, opreg::paged_attention_core, 5 compiled as" in out
    assert "opreg, compiled" in out
    assert "1 of them with prompts and decodes in one batch" in out


def test_a_wrong_token_is_noticed(program: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """The comparison can fail: the program reports a request whose tokens differ, and its exit code says so."""
    from serving import untouched

    honest = untouched.one_by_one

    def lying(model: Qwen3NextForCausalLM, requests: list[object]) -> list[list[int]]:
        tokens = honest(model, requests)
        tokens[1][-1] ^= 1
        return tokens

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(untouched, "one_by_one", lying)
        patch.setattr(torch, "compile", lambda step, backend, fullgraph: step)
        patch.setattr(program, "show_graph", lambda run, graphs, compiling, report: None)
        patch.setattr(program.opreg.backend, "last_report", lambda: None)
        assert program.main(["--quick"]) == 1
    assert "Tokens of r1 differ from the untouched model's." in capsys.readouterr().err
