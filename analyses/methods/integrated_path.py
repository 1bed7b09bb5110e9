"""Runs on the straight line between the embeddings of the corrupt and the clean prompts, for methods that integrate along it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.edges.attribution import EdgeAttribution, passes
from analyses.edges.heads import Constants
from analyses.edges.wiring import Wiring
from analyses.methods.base import activations
from analyses.tasks import PromptPairs
from lens_relevance import RelevanceCache, RelevanceError
from lens_relevance.sites import anatomy

DEFAULT_STEPS = 20


def embeddings_of(model: TransformerBridge) -> str:
    """The HookPoint of the token embeddings."""
    return anatomy(model).leaves[0]


@contextmanager
def embeddings_moved(model: TransformerBridge, change: Float[Tensor, "batch pos d_model"], share: float) -> Iterator[None]:
    """Inside, every run has its token embeddings moved by a share of `change`: from the corrupt ones on, all of it gives the clean ones."""
    with model.hooks(fwd_hooks=[(embeddings_of(model), lambda embeddings, hook: embeddings + share * change)]):
        yield


def edge_passes(
    model: TransformerBridge, streams: Wiring, pairs: PromptPairs, shares: Sequence[float]
) -> Iterator[tuple[RelevanceCache, Constants]]:
    """A forward and a backward pass at each share of the way, with everything kept that edges need."""
    leaf = embeddings_of(model)
    clean, corrupt = (activations(model, tokens, [leaf], pairs=pairs)[leaf] for tokens in (pairs.clean, pairs.corrupt))
    for share in shares:
        with embeddings_moved(model, clean - corrupt, share):
            yield from passes(
                model, streams, pairs.corrupt, target=pairs.target, rules="gradient", reference=None, attention_mask=pairs.clean_mask
            )


_SCORES = ("scores", "writer_scores", "reader_scores")


def with_edges(total: EdgeAttribution | None, edges: EdgeAttribution, weight: float) -> EdgeAttribution:
    """`total` and `weight` times the scores of `edges`."""
    return replace(edges, **{name: weight * getattr(edges, name) + (0 if total is None else getattr(total, name)) for name in _SCORES})


def midpoints(steps: int) -> list[float]:
    """Middles of `steps` equal parts of the line: the midpoint rule, whose error falls with the square of the steps.

    End points of the parts, on either side, have an error that falls with the steps alone.
    """
    return [(step + 0.5) / steps for step in range(steps)]


def check_steps(steps: int) -> None:
    """Refuse fewer steps than one."""
    if steps < 1:
        raise RelevanceError(f"integrated gradients need at least one step, not {steps}")


def named(method: str, steps: int) -> str:
    """The method's name, with its steps where they are not the default."""
    return method if steps == DEFAULT_STEPS else f"{method} ({steps} steps)"
