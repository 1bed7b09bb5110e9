"""Attention that can be computed for some query rows at a time: the three sites of a component as one.

The components of TransformerLens that compute attention themselves hand keys and values to `_update_kv_cache` last before they meet the
queries. While their result is computed by rows, they are given the first few keys there in place of all, and spend next to nothing on a
result that is not used, but compared: what the site says of these keys has to be the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components import (
    JointQKVAttentionBridge,
    JointQKVPositionEmbeddingsAttentionBridge,
    PositionEmbeddingsAttentionBridge,
)

from lens_relevance.errors import RelevanceError
from lens_relevance.rules import Mix, Scores, Softmax
from lens_relevance.rules.attention_by_rows import AttentionByRows
from lens_relevance.rules.softmax import is_masked
from lens_relevance.sites.base import Site

_JOINT = (JointQKVAttentionBridge, JointQKVPositionEmbeddingsAttentionBridge)  # a subclass may compute otherwise


@dataclass(eq=False)
class SiteByRows(Site):
    """An attention as one site. silent: the HookPoints of its scores and pattern, which never exist as a whole."""

    silent: tuple[HookPoint, ...] = ()


def as_one(sites: Sequence[Site]) -> SiteByRows | None:
    """The sites of an attention's scores, pattern and z as one; None where the component does not compute them itself."""
    if [site.kind for site in sites] != ["scores", "pattern", "z"]:
        return None
    (scores, pattern, z), component = (site.operation for site in sites), cast(Any, sites[0].component)
    known = type(component) in _JOINT or isinstance(component, PositionEmbeddingsAttentionBridge)
    if not known or any(site.rebuilt is not None for site in sites):
        return None
    assert isinstance(scores, Scores) and isinstance(pattern, Softmax) and isinstance(z, Mix)
    mask = _Mask(component)
    return SiteByRows(
        sites[2].name.removesuffix(":z"),
        sites[2].mount,
        AttentionByRows(scores.geometry, pattern, mask.masked, mask.visible),
        (*sites[0].inputs, sites[2].inputs[1]),
        sites[2].output,
        caller=component,
        on_call=mask.on_call,
        component=component,
        n_layers=sites[2].n_layers,
        silent=tuple(site.output for site in sites[:2] if site.output is not None),
    )


class _Mask:
    """The mask that a component was called with last, for some rows and keys at a time."""

    def __init__(self, component: Any) -> None:
        self._component = component
        self._given: Tensor | None = None
        self._seen: dict[tuple[int, int], slice] = {}

    def on_call(self, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        given = kwargs.get("attention_mask")
        if given is not None and not (isinstance(given, Tensor) and given.ndim == 4):
            raise RelevanceError(
                f"{self._component.name} is called with a mask that is not [batch, head, query, key], so that its attention cannot be "
                "computed by rows; ask for its pattern as well (names_filter), and it is computed at once"
            )
        self._given = given
        self._seen = {} if given is None else _SEEN.setdefault(given, {})

    def masked(self, scores: Tensor, rows: slice, keys: slice) -> Tensor:
        """Scores masked as the component does it."""
        mask = None if self._given is None else self._given[..., rows, keys]
        masked: Tensor = self._component._apply_reconstruct_attention_mask(
            attn_scores=scores, attention_mask=mask, seq_len=scores.shape[-1], q_seq_len=scores.shape[-2]
        )
        return masked

    def visible(self, rows: slice) -> slice:
        """The keys from the first to the last that any of these rows sees; all, where one of them sees none."""
        if self._given is None:
            component = self._component
            return slice(0, rows.stop) if component.is_causal and not component.is_cross_attention else slice(0, None)
        where = (rows.start, rows.stop)
        if where not in self._seen:
            self._seen[where] = _visible(self._given[..., rows, :])
        return self._seen[where]


_SEEN: WeakIdKeyDictionary = WeakIdKeyDictionary()  # layers are called with one and the same mask


def _visible(mask: Tensor) -> slice:
    seen = mask if mask.dtype == torch.bool else ~is_masked(mask)
    by_row = seen.any(-1)
    if not bool(by_row.all()):
        return slice(0, mask.shape[-1])
    keys = seen.flatten(0, -2).any(0).nonzero()
    return slice(int(keys[0]), int(keys[-1]) + 1)
