"""Whether a run is a trial, on a few tokens, of one on many, and which way of running is tried."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Trial:
    """A way of running. recompute: block by block; by_rows: attention for some query rows at a time, as if the prompt were long."""

    recompute: bool = False
    by_rows: bool = False


_TRIAL: ContextVar[Trial | None] = ContextVar("trial", default=None)
_IN_PIECE: ContextVar[bool] = ContextVar("in_piece", default=False)


def trial() -> Trial | None:
    """The trial under way, if any."""
    return _TRIAL.get()


@contextmanager
def trying(way: Trial) -> Iterator[None]:
    """Every run inside is a trial."""
    token = _TRIAL.set(way)
    try:
        yield
    finally:
        _TRIAL.reset(token)


@contextmanager
def piece() -> Iterator[None]:
    """Inside, attention is computed for some query rows at a time; in a trial, these are all."""
    _IN_PIECE.set(True)
    try:
        yield
    finally:
        _IN_PIECE.set(False)


def in_piece() -> bool:
    """Whether attention is being computed for some query rows."""
    return _IN_PIECE.get()
