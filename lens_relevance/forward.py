"""One forward of a model: how it is called with rules attached, what the taps saw, and what the target makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from lens_relevance.errors import RelevanceError
from lens_relevance.hooked_model import HookedModel
from lens_relevance.hooks.conditional import AnyCondition, backward_through
from lens_relevance.hooks.read_positions import ReadPositions
from lens_relevance.hooks.recording import Part, Taps
from lens_relevance.hooks.session import Session
from lens_relevance.inputs.metrics import Metric, by_position, gradient_at
from lens_relevance.inputs.prompt import Prompt
from lens_relevance.inputs.references import ReferenceRun
from lens_relevance.inputs.targets import Target
from lens_relevance.inputs.token_ids import positions
from lens_relevance.logit_reading import can_read_some
from lens_relevance.sites import Anatomy


@dataclass
class Run:
    """One forward: what the taps saw, the logits, and the tensor that the target is a function of (the logits, or a latent)."""

    tensors: dict[str, Tensor]
    logits: Tensor
    root: Tensor


def at_once(run: Run, before: Run | None, seed: Tensor, *, conditions: list[AnyCondition]) -> Iterator[Part]:
    """The backward of a model whose graph was kept as a whole."""
    coefficients = backward_through(run.root, seed, run.tensors, conditions=conditions)
    yield Part(run.tensors, {} if before is None else before.tensors, coefficients)


@contextmanager
def recording(opened: Session) -> Iterator[None]:
    opened.recording = True
    for placed in opened.placed:
        placed.recorded.clear()
    try:
        yield
    finally:
        opened.recording = False


@contextmanager
def replaced_embeddings(opened: Session, body: Anatomy, run: ReferenceRun) -> Iterator[None]:
    """A reference's own embeddings in place of those of its tokens."""
    states = []
    for stack, (where, value) in run.embeddings.items():
        states.append(opened.state(body.points[body.stacks.roles[stack]["embeddings"][0]]))
        states[-1].replace = partial(_swap, where, value)
    try:
        yield
    finally:
        for state in states:
            state.replace = None


def _swap(where: Tensor, value: Tensor, x: Tensor) -> Tensor:
    return torch.where(where.to(x.device).unsqueeze(-1), value.to(x), x)


def one_pass(model: HookedModel, prompt: Prompt, taps: Taps, *, point: str | None) -> Run:
    logits = prompt.call(model)
    tensors = taps.take()
    if point is None:
        return Run(tensors, logits, by_position(logits))
    if point not in tensors:
        raise RelevanceError(f"the target's HookPoint {point} did not fire in this forward")
    return Run(tensors, logits, taps.convert(point, tensors[point]))


def metric_before(model: HookedModel, prompt: Prompt, target: Target | None, *, n: int) -> tuple[Metric | None, ReadPositions | None]:
    """The target's metric, and where in n references' runs of each example it reads logits; None for what is known after the forward
    (the top prediction, a latent), and for all positions."""
    if not can_read_some(model):
        return None, None
    metric = None if target is None or target.point is not None else target.metric(model, prompt.tokens, prompt.mask)
    at = positions(-1, prompt.tokens, prompt.mask).unsqueeze(1) if metric is None else metric.at
    return metric, None if at is None else ReadPositions(at.repeat_interleave(n, 0), prompt.tokens.shape[1])


def logit_positions(prompt: Prompt, logits: Tensor, reading: ReadPositions | None, *, n: int) -> Int[Tensor, "batch read"] | None:
    """Positions of the logits of a run; None for those of a classifier, which have none."""
    if reading is not None and reading.taken:
        return reading.at[::n]
    if logits.ndim < 3 or logits.shape[1] != prompt.tokens.shape[1]:
        return None
    return torch.arange(logits.shape[1], device=logits.device).expand(len(prompt.tokens), -1)


def positions_of(prompt: Prompt, body: Anatomy, point: str | None, *, run: Run) -> tuple[Tensor, Tensor]:
    """Ids and mask of the positions that the target chooses from; a classifier has one."""
    if point is None:
        tokens, mask = prompt.tokens, prompt.mask
    else:
        stack = body.stack_of(point.split(":")[0])
        tokens, mask = prompt.ids.get(stack, prompt.tokens), prompt.masks.get(stack, prompt.mask)
    if run.root.shape[1] == tokens.shape[1]:
        return tokens, mask
    nothing = torch.zeros(len(tokens), run.root.shape[1], dtype=torch.long, device=run.root.device)
    return nothing, torch.ones_like(nothing)


def seed_of(metric: Metric, root: Tensor, reference: Tensor | None, *, n: int) -> Tensor:
    """The coefficients that the target gives its root; rows of one example's n references are n apart."""
    seed = torch.empty_like(root)
    for i in range(n):
        seed[i::n] = gradient_at(metric, root[i::n]) if reference is None else metric.pair_coefficients(root[i::n], reference[i::n])
    return seed


def values_of(metric: Metric, root: Tensor, n: int) -> Tensor:
    batch = root.shape[0] // n
    return torch.stack([metric(root[i::n]).expand(batch) for i in range(n)], 1).flatten()
