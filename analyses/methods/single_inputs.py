"""The target of one example as a function of its token embeddings or pixels, for methods that try many values of these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_relevance import RelevanceError, Target, mean_embedding
from lens_relevance.hooked_model import HookedModel
from lens_relevance.inputs.prompt import Prompt, read_inputs
from lens_relevance.inputs.references import reference_inputs, reference_run
from lens_relevance.inputs.targets import as_target, top_prediction
from lens_relevance.logit_reading import LogitReading, can_read_some, logits_with_positions
from lens_relevance.sites import Anatomy, anatomy
from lens_relevance.sites.token_sets import TOKENS

ROWS = 64
"""Copies of one example that are run together."""
IMAGE = "pixel_values"
Hooks = Sequence[tuple[str, Callable[..., Any]]]


@dataclass(frozen=True)
class SingleInput:
    """One example, as values that can be changed: token embeddings, or the pixels of a picture.

    Attributes:
        values: the example's own, [1, pos, d_model] or [1, channel, height, width].
        baseline: what they are compared with, of the same shape; tokens that are never replaced (BOS, padding) have their own values here.
        items: the token or patch that each value belongs to, in a shape that broadcasts over `values`.
        real: whether an item is a token or patch of the example and no padding.
        stack: the token set of the items.
        explained: what is explained.
        target: (values of n copies, forward hooks) -> the target of each [n].
    """

    values: Float[Tensor, "1 ..."]
    baseline: Float[Tensor, "1 ..."]
    items: Int[Tensor, "1 ..."]
    real: Bool[Tensor, " item"]
    stack: str
    explained: Target
    target: Callable[[Tensor, Hooks], Float[Tensor, " n"]]

    def __call__(self, values: Float[Tensor, "n ..."]) -> Float[Tensor, " n"]:
        """The target of n copies with these values."""
        return self.target(values, ())

    @property
    def n_items(self) -> int:
        return len(self.real)

    @property
    def replaceable(self) -> Bool[Tensor, " item"]:
        """Whether a token or patch has another value in the baseline."""
        return self.sums((self.values != self.baseline).double()) > 0

    def sums(self, attribution: Float[Tensor, "1 ..."]) -> Float[Tensor, " item"]:
        """Attributions of values summed over each token or patch."""
        index = self.items.expand_as(attribution).flatten()
        return attribution.new_zeros(self.n_items).index_add(0, index, attribution.flatten())


def single_inputs(
    model: HookedModel, inputs: Any, target: Any, *, attention_mask: Tensor | None, reference: Any, stack: str | None
) -> Iterator[SingleInput]:
    """The examples one by one; arguments as for `TokenScores`.

    Prompts are compared with `mean_embedding()` where no reference is given, pictures with zeros.

    Raises:
        RelevanceError: a target or a reference that these methods cannot take, or a model with several token sets and no `stack`.
    """
    body, prompt = anatomy(model), read_inputs(model, inputs, attention_mask)
    given = prompt
    resolved = _resolved(model, prompt, target)
    tokens, mask = resolved.extend(model, prompt.tokens, prompt.mask)
    prompt = prompt if tokens is prompt.tokens else prompt.with_tokens(tokens, mask)
    if IMAGE in prompt.arguments and not prompt.ids:
        yield from _pictures(model, body, prompt, resolved, reference)
        return
    stack = token_set(body, stack)
    point = body.stacks.roles[stack]["embeddings"][0]
    tail = int(prompt.mask.sum() - given.mask.sum()) // len(given.mask)
    other = reference_run(model, mean_embedding() if reference is None else reference, given if tail == 0 else prompt, tail=tail)
    if other.n > 1:
        raise RelevanceError(f"{reference} is {other.n} references, and these methods compare with one")
    own = values_at(model, prompt, point)
    baseline = own if other.prompt is prompt or other.prompt is given else values_at(model, other.prompt, point)
    if stack in other.embeddings:
        where, value = other.embeddings[stack]
        baseline = torch.where(where.unsqueeze(-1), value.to(baseline), baseline)
    real = prompt.masks.get(stack, torch.ones(own.shape[:2], device=own.device)).bool().to(own.device)
    baseline = torch.where(real.unsqueeze(-1), baseline, own)
    items = torch.arange(own.shape[1], device=own.device).reshape(1, -1, 1)
    for row in range(len(own)):
        of_row = _function(model, prompt, resolved, row, point)
        yield SingleInput(own[row : row + 1], baseline[row : row + 1], items, real[row], stack, resolved, of_row)


def token_set(body: Anatomy, stack: str | None) -> str:
    """The token set that is meant: the one there is, or the one named.

    Raises:
        RelevanceError: there are several and none is named, or there is none of this name.
    """
    known = [name for name, roles in body.stacks.roles.items() if roles["embeddings"]]
    if stack is None and len(known) == 1:
        return known[0]
    if stack not in known:
        raise RelevanceError(f"this model has the token sets {', '.join(known)}: say which is meant (stack=...)")
    return stack


def rows_of(prompt: Prompt, rows: Int[Tensor, " n"]) -> Prompt:
    """The call for some of the examples, each as often as it is named."""
    arguments = {name: value[rows] for name, value in prompt.arguments.items()}
    return replace(prompt, tokens=prompt.tokens[rows], mask=prompt.mask[rows], arguments=arguments)


def target_values(model: HookedModel, prompt: Prompt, target: Target) -> Float[Tensor, " n"]:
    """The target of each row; logits are computed only where it reads them."""
    tokens, mask = prompt.tokens, prompt.mask
    if not can_read_some(model):
        logits, tokens, mask = logits_with_positions(prompt.call(model), tokens, mask)
        return target.metric(model, tokens, mask)(logits).expand(len(tokens))
    reading = LogitReading(model, target.metric(model, tokens, mask), tokens.shape[1])
    with reading.narrow():
        logits = prompt.call(model)
    return reading.metric(logits).expand(len(tokens))


@torch.no_grad()
def values_at(model: Any, prompt: Prompt, point: str) -> Float[Tensor, "batch pos d_model"]:
    """What passes a HookPoint in the forward of these prompts."""
    kept: dict[str, Tensor] = {}
    with model.hooks(fwd_hooks=[(point, lambda x, hook: kept.update(x=x.detach().clone()))]):
        prompt.call(model)
    return kept["x"]


def _resolved(model: HookedModel, prompt: Prompt, target: Any) -> Target:
    if target is None:
        with torch.no_grad():
            logits = prompt.call(model)
        return top_prediction(
            logits if logits.ndim < 3 or logits.shape[1] == prompt.tokens.shape[1] else logits[:, 0], prompt.tokens, prompt.mask
        )
    resolved = as_target(target)
    if resolved.point is not None:
        raise RelevanceError("this method explains a function of the logits, not an activation (latent): propagate(...) explains both")
    return resolved.made_for(len(prompt.tokens))


def _function(model: Any, prompt: Prompt, target: Target, row: int, point: str | None) -> Callable[[Tensor, Hooks], Tensor]:
    """The target of copies of one example, whose values take the place of what passes a HookPoint, or of the picture."""

    def value(values: Tensor, hooks: Hooks) -> Tensor:
        rows = torch.full((len(values),), row, device=prompt.tokens.device)
        copies = rows_of(prompt, rows)
        placed = []
        if point is None:
            copies = replace(copies, arguments=copies.arguments | {IMAGE: values})
        else:
            placed = [(point, lambda x, hook: values)]
        with model.hooks(fwd_hooks=[*placed, *hooks]):
            return target_values(model, copies, target.select(rows))

    return value


def _pictures(model: HookedModel, body: Anatomy, prompt: Prompt, target: Target, reference: Any) -> Iterator[SingleInput]:
    pictures, grid = prompt.arguments[IMAGE], body.stacks.grid
    if grid is None:
        raise RelevanceError("it is not known into which patches this model cuts pictures")
    baseline = torch.zeros_like(pictures)
    if reference is not None:
        baseline = reference_inputs(model, reference, prompt).arguments[IMAGE]
    patch = torch.arange(grid[0] * grid[1], device=pictures.device).reshape(1, 1, *grid)
    height, width = pictures.shape[2] // grid[0], pictures.shape[3] // grid[1]
    items = patch.repeat_interleave(height, 2).repeat_interleave(width, 3)
    real = torch.ones(grid[0] * grid[1], dtype=torch.bool, device=pictures.device)
    for row in range(len(pictures)):
        value = _function(model, prompt, target, row, None)
        yield SingleInput(pictures[row : row + 1], baseline[row : row + 1], items, real, TOKENS, target, value)
