"""Each published ruleset against its paper's rules on models written out in plain torch (explicit_rules.py), to 1e-9 in float64.

The account shows that a run is consistent, whatever its rules; only this shows that they are the paper's.
"""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from analyses.benchmarks.tiny_models import build
from lens_relevance import logit_diff, propagate, rulesets
from tests.engine.explicit_rules import PUBLISHED, Explained, gpt2, llama
from tests.engine.families import PAIRS, close
from tests.models import random_tokens
from tests.precision import no_upcasts

ANSWER, WRONG = 7, 11
FAMILIES = ("gpt2", "llama", "qwen3", "mixtral")
ONLY_WITH_NORMS_ON_QUERIES = ("attnlrp_plain_qk",)
HOLD_GATES = ("cp_lrp", "cp_lrp_gamma")
HOLD_ATTENTION = (*HOLD_GATES, "relp_ah")
# The two MLP layers of a mixture's experts are no operations of their own, so that gamma and z+ have no place there.
CASES = [
    (family, rules)
    for family in FAMILIES
    for rules in PUBLISHED
    if not (rules in ONLY_WITH_NORMS_ON_QUERIES and family != "qwen3")
    and not (rules in ("cp_lrp_gamma", "lrp_zplus") and family == "mixtral")
]


def explicit(model: torch.nn.Module, family: str, tokens: torch.Tensor, rules: str) -> Explained:
    """One prompt [pos], written out."""
    original = model.original_model
    weights = {name.replace("._original_component", ""): value for name, value in original.state_dict().items()}
    config = original.config
    if family == "gpt2":
        return gpt2(weights, tokens, config.n_head, config.layer_norm_epsilon, PUBLISHED[rules], ANSWER, WRONG)
    frequencies, d_head = original.model.rotary_emb.inv_freq.double(), getattr(config, "head_dim", None) or 4
    top_k = config.num_experts_per_tok if family == "mixtral" else 0
    return llama(weights, tokens, d_head, config.rms_norm_eps, frequencies, PUBLISHED[rules], ANSWER, WRONG, top_k)


def test_every_ruleset_for_one_run_is_here() -> None:
    assert set(PUBLISHED) | set(PAIRS) == set(rulesets())


@pytest.mark.parametrize("family, rules", CASES)
def test_a_ruleset_is_what_its_paper_says(family: str, rules: str) -> None:
    with no_upcasts():
        model, tokens = build(family), random_tokens(pos=7)
        rows = [explicit(model, family, row, rules) for row in tokens]
        names = list(rows[0].relevance)
        cache = propagate(model, tokens, logit_diff(ANSWER, WRONG), rules=rules, names_filter=names)
    close(cache.logits, torch.stack([row.logits[-1:] for row in rows]), 1e-12)
    for name in names:
        expected = torch.stack([row.relevance[name] for row in rows])
        if rules in HOLD_ATTENTION and name.endswith(("q.hook_out", "k.hook_out")):
            assert not expected.any() and not cache[name].any()
        elif rules in HOLD_GATES and name.endswith("gate.hook_out"):
            assert not expected.any() and not cache[name].any()
        else:
            close(cache[name], expected, 1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_two_rulesets_agree_there(family: str) -> None:
    """So that a ruleset cannot stand in for another: at the embeddings their results differ by more than a hundredth.

    Without gates `relp_ah` and `cp_lrp` are one.
    """
    with no_upcasts():
        model, tokens = build(family), random_tokens(pos=7)
        by_rules = {rules: explicit(model, family, tokens[0], rules).relevance["embed.hook_out"] for name, rules in CASES if name == family}
    if family == "gpt2":
        del by_rules["relp_ah"]
    for one, other in combinations(by_rules, 2):
        gap = (by_rules[one] - by_rules[other]).abs().max() / by_rules[one].abs().max()
        assert gap > 1e-2, (one, other)
