"""The model families every engine test runs over, and what they need."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pandas as pd
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_relevance import RelevanceCache, logit_diff, rulesets
from tests import models
from tests.precision import no_upcasts

Builder = Callable[..., TransformerBridge]

_BUILDERS: dict[str, tuple[Builder, dict[str, object]]] = {
    "gpt2": (models.build_gpt2, {}),
    "neox_parallel": (models.build_neox, dict(parallel=True)),
    "neox_sequential": (models.build_neox, dict(parallel=False)),
    "llama": (models.build_llama, {}),
    "qwen3": (models.build_qwen3, {}),
    "gemma2": (models.build_gemma2, {}),
    "olmo2": (models.build_olmo2, {}),
    **{f"native_{name}": (models.build_native, settings) for name, settings in models.NATIVE_VARIANTS.items()},
}
FAMILIES = list(_BUILDERS)
# RMSNorm is computed in float32 there, and so are some rotary tables, whatever the dtype.
UPCASTING = ("llama", "qwen3", "gemma2", "olmo2", "native_rms_norm", "native_gated")
RULESETS = list(rulesets())
PAIRS = ("deeplift", "deeplift_ln")
TARGET = logit_diff(7, 11)


def build(family: str, dtype: torch.dtype = torch.float64, **settings: object) -> TransformerBridge:
    """A tiny random model of the family."""
    builder, own = _BUILDERS[family]
    return builder(dtype=dtype, **(own | settings))


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
