"""Models as TransformerLens rewrites them: compatibility mode, and `process_weights` with its norms folded and weights centred.

Folding and centring leave every logit difference as it is, and the relevance of every token under rules that are linear where they rewrite
(the weight of a norm, the mean of the stream, the bias of values).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.benchmarks.tiny_models import build
from lens_relevance import RelevanceError, coverage, propagate
from tests.engine.families import TARGET, close, inputs_and_reference, reference_for, unexplained, whole

TOKENS, OTHER = inputs_and_reference()
MODES: dict[str, Callable[[TransformerBridge], object]] = {
    "compatibility mode": lambda model: model.enable_compatibility_mode(),
    "compatibility mode, weights as they are": lambda model: model.enable_compatibility_mode(no_processing=True),
    "norms folded": lambda model: model.process_weights(fold_ln=True),
}
CASES = [(family, "compatibility mode") for family in ("gpt2", "neox_parallel", "llama", "qwen3", "gemma2", "mixtral")]
CASES += [(family, mode) for family in ("gpt2", "llama") for mode in MODES if mode != "compatibility mode"]
GATED = ("llama", "qwen3", "gemma2")
pytestmark = pytest.mark.filterwarnings("ignore:.*processed:UserWarning")


@pytest.mark.parametrize("family, mode", CASES)
def test_audit_and_coverage_of_a_processed_model(family: str, mode: str) -> None:
    plain, processed = build(family, torch.float32), build(family, torch.float32)
    MODES[mode](processed)
    for rules in ("gradient", "attnlrp", "deeplift"):
        one, two = (
            propagate(model, TOKENS, TARGET, rules=rules, reference=reference_for(rules, OTHER), audit=True) for model in (plain, processed)
        )
        assert float(whole(one).abs().min()) > 0.1 and unexplained(two) < 1e-5
        close(whole(two), whole(one), 1e-5)
        close(two.tokens(), one.tokens(), 1e-5)
    found, as_found = coverage(processed), coverage(plain, ["gradient"])
    assert list(found.sites["operation"]) == list(as_found.sites["operation"]) and found.uncovered == {}
    assert found.sites["live"].all() and float(found.sites["off"].max()) < 1e-5
    table = found.rulesets.set_index("ruleset")
    is_bypassed = family in GATED and "as they are" not in mode
    assert list(table.index[table["applies"] & ~table["works"]]) == ["cp_lrp_gamma"] * is_bypassed
    assert float(table["unexplained"].max()) < 1e-4


def test_a_processed_gated_mlp_goes_past_a_point_of_its_first_layer() -> None:
    """So that the one ruleset with a rule for that layer is refused."""
    model = build("llama", torch.float32)
    model.enable_compatibility_mode()
    with pytest.raises(RelevanceError, match="GammaRule.* at blocks.1.mlp.in .* was bypassed"):
        propagate(model, TOKENS, TARGET, rules="cp_lrp_gamma")
