"""The relevance of Chefer et al. 2021a beyond rules for operations: sums that are normalised, and a start at 1.

Where a branch is added to the residual stream, z = u + v, the shares u_i R_i / z_i of the stream and v_i R_i / z_i of the branch may be
large and of opposite signs. The paper (section 3.2) gives each the part |sum of its shares| / (|sum of one's| + |sum of the other's|) of
the whole, so that they add up and neither grows. Relevance starts as 1 at the logit that is explained, and not as the logit; where
several logits are explained, it starts with a total of 1, in the proportion of their shares of the target (our reading).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lens_relevance.inputs.metrics import Metric, gradient_at
from lens_relevance.inputs.targets import Target, top_prediction
from lens_relevance.rules.base import per_example, ratio, share, working
from lens_relevance.sites import Anatomy


@contextmanager
def normalised_additions(model: Any, body: Anatomy) -> Iterator[None]:
    """Inside, coefficients are normalised wherever attention or an MLP is added to the stream; values stay as they are."""
    seen: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> None:
        seen[hook.name] = x

    def normalise(parts: Sequence[str]) -> Callable[..., Tensor]:
        return lambda x, hook: _Normalised.apply(x, *(seen[name] for name in parts))

    found = additions(body)
    watched = list(dict.fromkeys(name for parts in found.values() for name in parts))
    hooks = [(name, keep) for name in watched] + [(name, normalise(parts)) for name, parts in found.items()]
    with model.hooks(fwd_hooks=hooks):
        yield


def additions(body: Anatomy) -> dict[str, tuple[str, ...]]:
    """By the HookPoint of the last branch: HookPoints of what it is added to, the stream and, where they are added at once, other branches.

    Of declared models only what attention adds is known.
    """
    found: dict[str, tuple[str, ...]] = {}
    for one in body.attentions:
        found[body.canonical(one.written)] = (body.canonical(one.before),)
    for name in body.points:
        block = name.removesuffix(".hook_in")
        mlp = body.aliases.get(f"{block}.hook_mlp_out")
        if not name.endswith(".hook_in") or mlp is None or "blocks." not in block:
            continue
        middle = _stream_before_mlp(body, block)
        attention = body.aliases.get(f"{block}.hook_attn_out")
        if middle is not None:
            found[mlp] = (middle,)
        elif attention is not None:  # attention and MLP side by side
            found[mlp] = (*found.pop(attention), attention)
    return found


def _stream_before_mlp(body: Anatomy, block: str) -> str | None:
    """The HookPoint that the stream passes between attention and MLP; None where they stand side by side."""
    own = next((f"{block}.{name}" for name in ("hook_resid_mid2", "hook_resid_mid") if f"{block}.{name}" in body.points), None)
    if own is not None:  # T5
        return own
    single = next((one for one in body.blocks if one.path == block), None)
    if single is not None and not single.norms_follow:
        return None if single.parallel else body.aliases.get(f"{block}.hook_resid_mid")
    norm = "ln2" if any(one.pattern.startswith(f"{block}.cross_attn.") for one in body.attentions) else "ln1"
    return body.aliases.get(f"{block}.{norm}.hook_out")  # norms follow (BERT, BART)


class _Normalised(torch.autograd.Function):
    """The last branch as it is; backward, each part of the sum gets its normalised shares. The others have the plain ones already."""

    @staticmethod
    def forward(ctx: Any, branch: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(branch, *others)
        return branch.detach()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, ...]:
        (g,) = upstream
        sums = torch.stack([per_example(share(part, g)) for part in ctx.saved_tensors])
        size = sums.abs().sum(0)
        factors = sums.sign() * sums.sum(0) / torch.where(size == 0, torch.ones_like(size), size)
        shaped = [factor.to(g).reshape(-1, *[1] * (g.ndim - 1)) for factor in factors]
        return (g * shaped[0], *(g * (factor - 1) for factor in shaped[1:]))


@dataclass(frozen=True, eq=False)
class FromOne(Target):
    """A target whose relevance starts with a total of 1.

    target: None for each row's top prediction against its runner-up.
    """

    target: Target | None

    @property
    def point(self) -> str | None:  # type: ignore[override]
        return None if self.target is None else self.target.point

    def extend(self, model: Any, tokens: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        return (tokens, attention_mask) if self.target is None else self.target.extend(model, tokens, attention_mask)

    def metric(self, model: Any, tokens: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"] | None = None) -> Metric:
        def value(logits: Tensor) -> Tensor:
            known = logits.detach()
            target = top_prediction(known, tokens, attention_mask) if self.target is None else self.target
            gradient = working(gradient_at(target.metric(model, tokens, attention_mask), known))
            total = per_example(gradient * working(known))
            return per_example(gradient * working(logits)) * ratio(torch.ones_like(total), total)

        return Metric(value)
