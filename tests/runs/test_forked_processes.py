"""A forked process is a process of its own, and nothing of the tests before it is in it."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.forked_processes import Forked

CHANGED = False


def tell() -> None:
    print("out:", sys.stdin.readline().strip(), os.environ.get("TOLD"), os.environ.get("LEFT_OUT"), Path.cwd(), os.getpid(), CHANGED)
    print("−", file=sys.stderr)
    print(torch.initial_seed(), torch.is_grad_enabled(), random.random(), np.random.random())


def test_streams_environment_directory_and_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.CHANGED", True)
    monkeypatch.setenv("LEFT_OUT", "x")
    monkeypatch.chdir(tmp_path)
    random.seed(0)
    drawn = []
    for _ in range(2):
        child = Forked(tell, environment={"TOLD": "y", "PYTHONIOENCODING": "ascii"})
        child.stdin.write("a line\n")
        child.stdin.close()
        said, error = child.stdout.read().splitlines(), child.stderr.read()
        assert child.wait() == 0 and child.pid != os.getpid()
        assert said[0] == f"out: a line y None {tmp_path} {child.pid} False" and error == "\\u2212\n"
        seed, grad, *numbers = said[1].split()
        assert (int(seed), grad) == (67280421310721, "True")
        drawn.append(numbers)
    assert drawn[0][0] != drawn[1][0] and drawn[0][1] != drawn[1][1] and "x" == os.environ["LEFT_OUT"] and CHANGED


def end(how: str) -> None:
    if how == "error":
        raise ValueError("of this kind")
    sys.exit({"3": 3, "nothing": None, "a text": "in words"}[how])


@pytest.mark.parametrize(("how", "status"), [("error", 1), ("3", 3), ("nothing", 0), ("a text", 1)])
def test_exit_statuses_are_those_of_an_interpreter(how: str, status: int) -> None:
    child = Forked(end, how)
    errors = child.stderr.read()
    assert child.wait() == status
    assert errors.endswith({"error": "ValueError: of this kind\n", "a text": "in words\n"}.get(how, ""))


def sleep() -> None:
    print("asleep", flush=True)
    time.sleep(60)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_signals_reach_it_alone(number: signal.Signals) -> None:
    other, child = Forked(sleep), Forked(sleep)
    assert child.stdout.readline() == other.stdout.readline() == "asleep\n"
    os.kill(child.pid, number)
    error = child.stderr.read()
    assert child.wait() == (1 if number == signal.SIGINT else -number)
    assert ("KeyboardInterrupt" in error) == (number == signal.SIGINT)
    other.kill()
    assert other.wait() == -signal.SIGKILL


def gradient() -> None:
    x = torch.ones(3, requires_grad=True)
    (x**2).sum().backward()
    print(x.grad.tolist())


def test_a_backward_runs() -> None:
    torch.ones(2, requires_grad=True).sum().backward()
    child = Forked(gradient)
    assert child.stdout.read() == "[2.0, 2.0, 2.0]\n" and child.wait() == 0


def test_it_starts_at_once() -> None:
    before = time.perf_counter()
    assert Forked(gradient).wait() == 0
    assert time.perf_counter() - before < 5
