"""Attribution patching with its second-order term: curvature along the change of each layer, by Hessian-vector products."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import COMPONENTS
from analyses.methods.atp_star_method import recomputed_outputs
from analyses.methods.base import Estimator, Scores, activations, collect, hidden, points
from analyses.tasks import PromptPairs
from lens_relevance import RelevanceError
from lens_relevance.hooks.model_state import frozen
from lens_relevance.inputs.targets import as_target

RECOMPUTED = ("q", "k")
"""What acts through a softmax, which is recomputed rather than expanded."""


def second_order() -> Estimator:
    """g . d + d . H d / 2, d = a_clean - a_corrupt, H the Hessian of the target in the activations of one layer, in the corrupt run.

    The idea is that of Zhang & Wang 2026 (arXiv 2606.09899): the error of attribution patching is the curvature of what follows, and a
    Hessian-vector product gives its leading term. Our reading, as only the abstract was at hand: H d is taken once per layer and kind of
    component, d being the change of all components of that kind in the layer, so that a component's score also has half of what it does
    together with the others of its layer. Exact for a component alone in its layer, where the target is a polynomial of the second degree.

    Queries and keys act through a softmax, whose expansion is worth little where it saturates. As in AtP* (`atp_star`), the outputs of
    their heads are recomputed, and the expansion is taken there: d = z' - z.

    Each layer takes a further backward pass through what follows it. The attention must be one that can be differentiated twice, as eager
    attention can and fused kernels cannot.
    """

    def scores(model: TransformerBridge, pairs: PromptPairs, components: Sequence[str]) -> Scores:
        return {name: sum(expansion(model, pairs, name)) for name in components}  # type: ignore[misc]

    return Estimator("second_order", scores, forwards=4, backwards=2)


def expansion(
    model: TransformerBridge, pairs: PromptPairs, name: str
) -> tuple[Float[Tensor, "batch layer index"], Float[Tensor, "batch layer index"]]:
    """The first and the second term about the corrupt run, for a kind of component in every layer.

    Raises:
        RelevanceError: the model runs an operation that cannot be differentiated twice, or the target is no function of the logits.
    """
    read = points(model, [name])
    clean, corrupt = (activations(model, tokens, read, pairs=pairs) for tokens in (pairs.clean, pairs.corrupt))
    if name not in RECOMPUTED:
        return tuple(  # type: ignore[return-value]
            collect(model, [name], term.__getitem__)[name] for term in _terms(model, pairs, name, {p: clean[p] - corrupt[p] for p in read})
        )
    heads = points(model, ["heads"])
    z = activations(model, pairs.corrupt, heads, pairs=pairs)
    anew, n_nodes = recomputed_outputs(model, pairs, clean, z), clean[read[0]].shape[2]
    terms = _terms(model, pairs, "heads", {point: anew[point] - z[point] for point in heads})
    # under grouped-query attention a key has the heads of its group
    return tuple(collect(model, ["heads"], term.__getitem__)["heads"].unflatten(2, (n_nodes, -1)).sum(3) for term in terms)


def _terms(
    model: TransformerBridge, pairs: PromptPairs, name: str, change: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """g d and d H d / 2, element by element, by the HookPoint at which d is the change."""
    target = as_target(pairs.target).made_for(len(pairs))
    if target.point is not None:
        raise RelevanceError(f"second_order explains functions of the logits, and the target is a latent at {target.point}")
    metric = target.metric(model, pairs.corrupt, pairs.corrupt_mask)
    added = {point: torch.zeros_like(d).requires_grad_() for point, d in change.items()}

    def add(point: str, x: Tensor, hook: Any) -> Tensor:
        return x + added[point]

    hooks: list[Any] = [(COMPONENTS[name].write_at(layer), partial(add, point)) for layer, point in enumerate(change)]
    with frozen(model), torch.enable_grad(), model.hooks(fwd_hooks=hooks):
        value = metric(model(pairs.corrupt, return_type="logits", **hidden(pairs))).sum()
        slopes = torch.autograd.grad(value, list(added.values()), create_graph=True)
        second = {point: _curvature(slope, d, added[point]) / 2 for slope, (point, d) in zip(slopes, change.items(), strict=True)}
    return {point: slope.detach() * d for slope, (point, d) in zip(slopes, change.items(), strict=True)}, second


def _curvature(slope: Tensor, change: Tensor, at: Tensor) -> Tensor:
    """d H d, element by element."""
    if not slope.requires_grad:  # the target is linear from here on
        return torch.zeros_like(change)
    try:
        (product,) = torch.autograd.grad((slope * change).sum(), at, retain_graph=True, allow_unused=True)
    except (RuntimeError, NotImplementedError) as error:
        raise RelevanceError(f"this model cannot be differentiated twice ({error}); load it with eager attention") from error
    return torch.zeros_like(change) if product is None else product.detach() * change
