"""Ctrl-C at any moment leaves a model as it was: at every step of our own clean-up in turn, and at random moments of every analysis.

LENS_RELEVANCE_INTERRUPTS=300 tries so many random moments, and half as many steps of each action (30 by default).
"""

from __future__ import annotations

import dis
import linecache
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.circuits import faithfulness_table
from analyses.evaluation.comparison import compare
from analyses.evaluation.ranking import rank_heads, rank_neurons
from analyses.graph import flow_graph
from analyses.patching import activation_patching
from lens_relevance import attach, propagate, random_tokens, token_relevance
from lens_relevance.hooks import interrupts
from lens_relevance.hooks.interrupts import protected_contextmanager
from lens_relevance.hooks.model_state import as_found, frozen
from tests.analyses.test_ranking import random_pairs
from tests.engine.families import TARGET, inputs_and_reference
from tests.engine.test_guest import same, state
from tests.models import build_gpt2

TOKENS, OTHER = inputs_and_reference()
PAIRS = random_pairs(4)
N_INTERRUPTS = int(os.environ.get("LENS_RELEVANCE_INTERRUPTS", "30"))
Action = Callable[[TransformerBridge], object]


def inside_attach(model: TransformerBridge) -> None:
    """A block that the user does something in: a forward, a backward, a hook."""
    with attach(model, "deeplift", reference=OTHER):
        embeddings: list[torch.Tensor] = []

        def keep(x: torch.Tensor, hook: object) -> torch.Tensor:
            embeddings.append(x.detach().requires_grad_())
            return embeddings[-1]

        with as_found(model), model.hooks(fwd_hooks=[("embed.hook_out", keep)]):
            torch.autograd.grad(model(TOKENS)[:, -1, 3].sum(), embeddings)


ACTIONS: dict[str, Action] = {
    "propagate": lambda m: propagate(m, TOKENS, TARGET, rules="attnlrp", names_filter=lambda name: True),
    "propagate against references": lambda m: propagate(m, TOKENS, TARGET, reference=random_tokens(2), audit=True),
    "propagate block by block": lambda m: propagate(m, TOKENS, TARGET, reference=OTHER, recompute=True),
    "attach": inside_attach,
    "compare": lambda m: compare(m, PAIRS, ["deeplift", "eap_ig", "direct_logit_attribution"], components=["heads"], resamples=0),
    "rank": lambda m: (rank_heads(m, PAIRS, ablate=True), rank_neurons(m, PAIRS, "gradient")),
    "circuit": lambda m: [faithfulness_table(m, PAIRS, ["deeplift", "random"], level=level) for level in ("node", "edge")],
    "graph": lambda m: flow_graph(m, TOKENS[:1], TARGET, reference=OTHER[:1]),
    "patching": lambda m: activation_patching(m, PAIRS, "z"),
    "token relevance": lambda m: token_relevance(m, TOKENS, TARGET, method="weighted_accumulation"),
}


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    """A process that was started in the background of a script ignores SIGINT."""
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, found)


@pytest.fixture(scope="module")
def _model() -> TransformerBridge:
    """With hooks, a frozen parameter and a mode of its own here and there."""
    model = build_gpt2()
    for i, parameter in enumerate(model.original_model.parameters()):
        parameter.requires_grad_(i % 3 > 0)
    model.hook_dict["blocks.0.hook_out"].add_hook(lambda x, hook: x * 1)
    model.hook_dict["blocks.1.hook_in"].add_perma_hook(lambda x, hook: None)
    model.hook_dict["blocks.1.hook_in"].add_hook(lambda g, hook: None, dir="bwd")
    return model


@pytest.fixture
def guest(_model: TransformerBridge) -> TransformerBridge:
    return _model


def interrupted(action: Action, model: TransformerBridge, timer: threading.Timer | None = None) -> bool:
    """Whether an interrupt came out of the action, or after it: the timer may be late, and so is one that had to wait for a clean-up."""
    try:
        if timer is not None:
            timer.start()  # in here: it may go off before this returns
        action(model)
        if timer is not None:
            timer.join()
        time.sleep(0.2)
    except KeyboardInterrupt:
        return True
    return False


def end_of_with(frame: FrameType) -> bool:
    """Whether the next step calls the `__exit__` of a `with`.

    Python runs handlers of signals after a call and at a jump: none comes between the block and `__exit__`. Only a tracer can raise there.
    """
    code, line = frame.f_code, frame.f_lineno
    if not linecache.getline(code.co_filename, line).lstrip().startswith("with "):
        return False
    return frame.f_lasti > min(offset for offset, start in dis.findlinestarts(code) if start == line)


class InterruptAt:
    """Sends SIGINT at the n-th step (a call or a line) that the functions of our modules take; counts steps where n is None."""

    def __init__(self, n: int | None, modules: tuple[str, ...]) -> None:
        self.n, self.modules, self.steps = n, modules, []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.endswith(self.modules):
            return None
        if event not in ("call", "line") or (event == "line" and end_of_with(frame)):
            return self
        self.steps.append((frame.f_code.co_name, frame.f_lineno, event))
        if len(self.steps) - 1 == self.n:
            signal.raise_signal(signal.SIGINT)
        return self

    def __enter__(self) -> InterruptAt:
        sys.settrace(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)


OURS = ("hooks/interrupts.py", "hooks/model_state.py", "hooks/session.py", "lens_relevance/blockwise.py", "autograd/grad_mode.py")


@pytest.mark.parametrize("name", ["propagate", "block by block", "attach", "nested", "rank"])
def test_an_interrupt_at_any_step_of_our_own(guest: TransformerBridge, name: str) -> None:
    """Lines of setting up and of cleaning up, each when it last runs."""
    short: dict[str, Action] = {
        "propagate": lambda m: propagate(m, TOKENS, TARGET),
        "attach": inside_attach,
        "nested": nested,
        "block by block": ACTIONS["propagate block by block"],
        "rank": lambda m: rank_heads(m, PAIRS[:1], "gradient"),
    }
    action = short[name]
    action(guest)
    before = state(guest)  # with what is computed once, at a model's first call
    with InterruptAt(None, OURS) as counted:
        action(guest)
    moments = sorted({step: i for i, step in enumerate(counted.steps)}.values())
    assert len(moments) > 50
    moments = sorted(random.Random(time.time_ns()).sample(moments, min(len(moments), N_INTERRUPTS // 2)))
    came = 0
    for n in moments:
        with InterruptAt(n, OURS):
            came += interrupted(action, guest)
        after = state(guest)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, (
            f"interrupted at {n} {counted.steps[n]} {interrupts._handler.__dict__}"
        )
        try:
            same(before, after)
        except AssertionError as error:
            raise AssertionError(f"interrupted at {counted.steps[n]}: {error}") from None
    assert came > 0.8 * len(moments)  # Python drops what is raised while it does away with an object


def flags(model: TransformerBridge) -> list[dict[str, Any]]:
    """What modules note on themselves, which a forward (in `state`) could put back by itself."""
    return [{name: value for name, value in vars(module).items() if isinstance(value, bool)} for module in model.original_model.modules()]


@pytest.mark.parametrize("name", ["propagate", "attach", "propagate block by block"])
def test_an_interrupt_inside_a_component_of_transformer_lens(guest: TransformerBridge, name: str) -> None:
    """Its MLP tells the next layer to leave out a hook once, and takes that back by itself only if it comes to its end."""
    action = ACTIONS[name]
    action(guest)
    noted, before = flags(guest), state(guest)
    where = ("generalized_components/mlp.py",)
    with InterruptAt(None, where) as counted:
        action(guest)
    moments = sorted({step: i for i, step in enumerate(counted.steps) if step[0] == "forward"}.values())
    assert 10 < len(moments) < 60
    came = 0
    for n in moments:
        with InterruptAt(n, where):
            came += interrupted(action, guest)
        changed = [new for old, new in zip(noted, flags(guest), strict=True) if old != new and new.get("_suppress_next_hook_in")]
        assert not changed, f"interrupted at {counted.steps[n]}"
        same(before, state(guest))
    assert came > 0.9 * len(moments)


def nested(model: TransformerBridge) -> None:
    with frozen(model), torch.no_grad(), attach(model, "attnlrp"):
        model(TOKENS)


def test_interrupts_at_random_moments(guest: TransformerBridge) -> None:
    chance = random.Random(time.time_ns())
    taken, came = {}, 0
    for name, action in ACTIONS.items():
        start = time.perf_counter()
        action(guest)
        taken[name] = time.perf_counter() - start
    before = state(guest)  # with what is computed once, at a model's first call
    for trial in range(N_INTERRUPTS):
        name = list(ACTIONS)[trial % len(ACTIONS)]
        delay = chance.uniform(0, taken[name])
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
        came += interrupted(ACTIONS[name], guest, timer)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        try:
            same(before, state(guest))
        except AssertionError as error:
            raise AssertionError(f"{name}, {delay:.4f} s of {taken[name]:.4f} s: {error}") from None
    assert came > 0.9 * N_INTERRUPTS


def test_a_clean_up_that_is_interrupted_is_finished_first() -> None:
    done = []

    @protected_contextmanager
    def slow():  # type: ignore[no-untyped-def]
        try:
            signal.raise_signal(signal.SIGINT)
            done.append("set up")
            yield
        finally:
            signal.raise_signal(signal.SIGINT)
            done.append("cleaned up")

    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with slow():
            done.append("inside")
        time.sleep(0.05)
    assert done == ["set up", "inside", "cleaned up"]


def test_a_handler_of_the_program_is_called_and_kept() -> None:
    calls = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: calls.append(number))
    try:
        mine = signal.getsignal(signal.SIGINT)
        model = build_gpt2()
        with attach(model, "attnlrp"):
            signal.raise_signal(signal.SIGINT)
            assert calls == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is mine
        with attach(model, "attnlrp"):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program changes its mind inside
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        with attach(model, "attnlrp"):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


def test_our_handler_put_back_by_the_program_is_no_trap() -> None:
    """A program that changes the handler inside a block, and restores what it found there after the block."""
    model = build_gpt2()
    with attach(model, "attnlrp"):
        found = signal.signal(signal.SIGINT, signal.default_int_handler)
    assert isinstance(found, type(interrupts._handler))
    signal.signal(signal.SIGINT, found)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), attach(model, "attnlrp"):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_go_without() -> None:
    found: list[object] = []

    def work() -> None:
        found.append(signal.getsignal(signal.SIGINT))
        propagate(build_gpt2(), TOKENS, TARGET)
        found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler] * 2


def test_what_transformer_lens_was_cut_in_is_put_back() -> None:
    """An interrupt in the clean-up of TransformerLens's own hooks, which is not ours to protect."""
    model = build_gpt2()
    model.hook_dict["blocks.0.hook_out"].add_hook(lambda x, hook: x * 1.5)
    state(model)
    before = state(model)  # with what TransformerLens notes at a first forward

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), as_found(model):  # noqa: PT012
        model._remove_temporary_hook = cut
        model.eval().blocks[0].train()
        next(iter(model.original_model.parameters())).requires_grad_(False)
        with model.hooks(fwd_hooks=[("blocks.0.hook_in", cut), ("blocks.1.hook_in", cut)], bwd_hooks=[("blocks.1.hook_in", cut)]):
            pass
    del model.__dict__["_remove_temporary_hook"]
    same(before, state(model))
