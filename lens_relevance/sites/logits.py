"""The final soft-cap on the logits (Gemma 2, native models), which lies outside all HookPoints."""

from __future__ import annotations

from typing import Any

from lens_relevance.rules import SoftCap
from lens_relevance.sites.base import Site


def logit_sites(model: Any) -> list[Site]:
    """A site from `unembed.hook_out` to what the model returns, if it caps its logits."""
    original = model.original_model
    cap = getattr(getattr(original, "config", None), "final_logit_softcapping", None) or getattr(original, "output_logits_soft_cap", None)
    if not cap or cap <= 0:
        return []
    return [Site("logits", "logits", SoftCap(float(cap)), (model.unembed.hook_out,), None)]
