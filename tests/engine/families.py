"""The model families every engine test runs over, and what they need."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pandas as pd
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.benchmarks.tiny_models import build
from lens_relevance import RelevanceCache, logit_diff, rulesets
from tests import models
from tests.precision import no_upcasts

__all__ = ["build"]

FAMILIES = ["gpt2", "neox_parallel", "neox_sequential", "llama", "qwen3", "gemma2", "olmo2"]
FAMILIES += [f"native_{name}" for name in models.NATIVE_VARIANTS]
# RMSNorm is computed in float32 there, and so are some rotary tables, whatever the dtype.
UPCASTING = ("llama", "qwen3", "gemma2", "olmo2", "native_rms_norm", "native_gated")
# Those that are for every model; lrp_zplus, whose rules all keep sums, has tests of its own (attention_methods/test_chefer_2021a.py).
RULESETS = [name for name, table in rulesets().items() if not any("@" in key for key in table) and name != "lrp_zplus"]
PAIRS = ("deeplift", "deeplift_ln")
TARGET = logit_diff(7, 11)


def exact(family: str) -> AbstractContextManager[None]:
    """The context in which the family is float64 throughout."""
    return no_upcasts() if family in UPCASTING else nullcontext()


def inputs_and_reference(batch: int = 2, pos: int = 6) -> tuple[Tensor, Tensor]:
    """Two token batches that share their first token, as a prompt and its counterpart share BOS."""
    one, two = models.random_tokens(batch, pos, seed=0), models.random_tokens(batch, pos, seed=1)
    two[:, 0] = one[:, 0]
    return one, two


def reference_for(rules: str, reference: Tensor) -> Tensor | None:
    """The reference where the ruleset needs one."""
    return reference if rules in PAIRS else None


def whole(cache: RelevanceCache) -> Tensor:
    """What the relevance has to account for: the target, or its difference between the two runs."""
    return cache.value if cache.reference_value is None else cache.value - cache.reference_value


def unexplained(cache: RelevanceCache) -> float:
    """Largest unexplained remainder of any layer, relative to the target (to 1 where the target is smaller)."""
    account: pd.DataFrame = cache.conservation()
    return float((account["unexplained"].abs() / account["value"].abs().clip(lower=1.0)).max())


@torch.no_grad()
def zero_all_that_keeps(model: TransformerBridge) -> None:
    """Set all biases, norm betas, the unembedding's bias and the learned positions to 0, whatever the family calls them."""
    for name, parameter in model.original_model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if last in ("bias", "b") or last.startswith("b_") or "wpe" in name or name.startswith("pos."):
            parameter.zero_()


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal relative to the largest expected entry, which may not be zero."""
    assert actual.shape == expected.shape
    size = float(expected.detach().abs().max())
    assert size > 0, "comparing zeros proves nothing"
    worst = float((actual - expected).detach().abs().max()) / size
    assert worst <= tolerance, f"off by {worst:.2e} of {size:.3g}"
