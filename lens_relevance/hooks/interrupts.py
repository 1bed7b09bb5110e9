"""Ctrl-C waits while a model is being changed or put back.

Python raises KeyboardInterrupt between any two steps of the main thread, also within a clean-up, and what is cut there stays undone. So
while a `protected_contextmanager` is open, our handler of SIGINT looks where the program is: below a protected function it sends the signal
again a moment later, everywhere else it calls the handler that was there before. (Python raises no KeyboardInterrupt in other threads.)
"""

from __future__ import annotations

import _thread
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from types import CodeType, FrameType, TracebackType
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_MOMENT = 0.01  # seconds
_PROTECTED: set[CodeType] = set()


def protected(function: Callable[P, T]) -> Callable[P, T]:
    """A function that Ctrl-C cannot cut inside a `protected_contextmanager`: a change to a model together with the note of it."""
    # A frame of its own: the function may be a wrapper whose code others share (that of a type checker, which leaves lambdas alone).
    call = wraps(function)(lambda *args, **kwargs: function(*args, **kwargs))
    _PROTECTED.add(call.__code__)  # type: ignore[attr-defined]
    return call


for _kind in (torch.no_grad, torch.enable_grad, torch.set_grad_enabled):  # whether gradients are recorded is set back in Python, too
    _PROTECTED |= {_kind.__enter__.__code__, _kind.__exit__.__code__}


def _drops_exceptions(frame: FrameType) -> bool:
    """Whether Python calls this function by itself, when an object goes, and ignores what it raises."""
    return frame.f_code.co_name == "__del__" or frame.f_globals.get("__name__") == "weakref"


class _Handler:
    """The handler of SIGINT while at least one block is open."""

    def __init__(self) -> None:
        self._blocks = 0
        self._waiting = False
        self._previous: Callable[[int, FrameType | None], Any] = signal.default_int_handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        at = frame
        while at is not None:
            if at.f_code in _PROTECTED or _drops_exceptions(at):
                self._waiting = True
                again = threading.Timer(_MOMENT, self._send_again)
                again.daemon = True
                again.start()
                return
            at = at.f_back
        self._previous(number, frame)

    def _send_again(self) -> None:
        if self._waiting:
            self._waiting = False
            _thread.interrupt_main(signal.SIGINT)

    def start(self) -> bool:
        """Begin to listen where that is possible; says whether `stop` has to be called."""
        if threading.current_thread() is not threading.main_thread():
            return False
        if not self._blocks:
            found = signal.getsignal(signal.SIGINT)
            if not callable(found):  # ignored, or left to the system: no KeyboardInterrupt is raised then
                return False
            if found is not self:  # it is where a program kept it from inside a block, and put it back later
                self._previous = found
                signal.signal(signal.SIGINT, self)
        self._blocks += 1
        return True

    def stop(self) -> None:
        """End of a block. With the last one ends the waiting."""
        self._blocks -= 1
        if self._blocks:
            return
        previous = self._previous
        if signal.getsignal(signal.SIGINT) is self:  # else the program has put another one in its place
            signal.signal(signal.SIGINT, previous)
        if self._waiting:
            self._waiting = False
            previous(signal.SIGINT, None)


_handler = _Handler()


class _Protected(AbstractContextManager[T]):
    """A context manager whose beginning and end are protected."""

    def __init__(self, inner: AbstractContextManager[T]) -> None:
        self._inner, self._listening = inner, False

    @protected
    def __enter__(self) -> T:
        self._listening = _handler.start()
        try:
            return self._inner.__enter__()
        except BaseException:
            self._stop()
            raise

    @protected
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool | None:
        try:
            return self._inner.__exit__(kind, error, trace)
        finally:
            self._stop()

    def _stop(self) -> None:
        if self._listening:
            _handler.stop()


def protected_contextmanager(function: Callable[P, Iterator[T]]) -> Callable[P, AbstractContextManager[T]]:
    """`contextlib.contextmanager` for what has to be undone whatever happens: Ctrl-C cuts neither what is before nor what is after `yield`.

    It can be raised in the block between; one that arrives before or after is raised as soon as that is done.
    """
    unprotected = contextmanager(function)

    @wraps(function)
    def build(*args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[T]:
        return _Protected(unprotected(*args, **kwargs))

    return build
