"""What a user adds is one call, without touching the package, and everything behind the command line then knows it.

An attention module and a mixture of experts that neither Hugging Face nor lens_relevance has seen are written here, put into a tiny OPT
and a tiny Mixtral, and described by one `register_` call each.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import MixtralConfig, OPTConfig
from transformers.activations import ACT2FN
from transformers.models.mixtral import modeling_mixtral
from transformers.models.opt import modeling_opt
from transformers.models.opt.modeling_opt import OPTAttention

from analyses import PromptPairs, activation_patching, compare_with_patching, rank_heads
from analyses.methods import Estimator, Scores, register_method
from analyses.methods.registry import _METHODS
from analyses.report import find, from_task
from analyses.report.terminal import show
from lens_relevance import (
    AttentionFamily,
    CoverageError,
    ExpertsFamily,
    MismatchError,
    RelevanceError,
    coverage,
    logit_diff,
    propagate,
    register_attention,
    register_experts,
    register_ruleset,
    rulesets,
)
from lens_relevance.rules import ElementwiseRule, Expert, GatedActivation, Router
from lens_relevance.rules.activation import KnownFunction
from lens_relevance.ruleset_tables import _RULESETS
from lens_relevance.sites.families import ATTENTION, EXPERTS
from tests.engine.families import close, inputs_and_reference, unexplained
from tests.precision import no_upcasts
from tests.wider_models import build_wider

TOKENS, OTHER = inputs_and_reference()
PAIRS = PromptPairs(TOKENS, OTHER, logit_diff(7, 11))
TARGET = PAIRS.target


class DistanceAttention(OPTAttention):
    """Attention with a scale per layer, capped scores, and a penalty on distance in place of what OPT does."""

    def __init__(self, config: OPTConfig, layer_idx: int | None = None, **kwargs: Any) -> None:
        super().__init__(config, layer_idx=layer_idx, **kwargs)
        self.sharpness, self.slope = 0.7 + 0.2 * (layer_idx or 0), 0.3

    def forward(self, hidden_states: Tensor, past_key_values: Any = None, attention_mask: Any = None, **_: Any) -> tuple[Tensor, Tensor]:
        q, k, v = (
            project(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = 2.0 * torch.tanh(self.sharpness * q @ k.transpose(-1, -2) / 2.0)
        scores = scores - self.slope * distances(scores) + (0.0 if attention_mask is None else attention_mask)
        pattern = scores.softmax(-1)
        return self.out_proj((pattern @ v).transpose(1, 2).flatten(-2)), pattern


def distances(scores: Tensor) -> Tensor:
    queries, keys = (torch.arange(n, dtype=scores.dtype) for n in scores.shape[-2:])
    return (queries.unsqueeze(1) - keys).abs()


DISTANCE = AttentionFamily(
    scale=lambda module: module.sharpness,
    soft_cap=lambda module: 2.0,
    position_bias=lambda module, call, scores: -module.slope * distances(scores),
)


class ListedMoeBlock(nn.Module):
    """Experts in a list, a linear router, and weights that are the chosen experts' share of a softmax over all of them, times two."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        d_model, d_expert, self.k = config.hidden_size, config.intermediate_size, config.num_experts_per_tok
        self.gate = nn.Linear(d_model, config.num_local_experts)
        self.first, self.second = (nn.ModuleList(nn.Linear(d_model, d_expert) for _ in range(config.num_local_experts)) for _ in range(2))
        self.last = nn.ModuleList(nn.Linear(d_expert, d_model) for _ in range(config.num_local_experts))

    def forward(self, hidden_states: Tensor) -> Tensor:
        weights = self.gate(hidden_states).softmax(-1)
        chosen = torch.zeros_like(weights).scatter(-1, weights.topk(self.k).indices, 1.0)
        outs = [last(torch.relu(first(hidden_states)) * second(hidden_states)) for first, second, last in self.experts()]
        return sum(2.0 * (weights * chosen)[..., e : e + 1] * out for e, out in enumerate(outs))  # type: ignore[return-value]

    def experts(self) -> list[tuple[nn.Linear, nn.Linear, nn.Linear]]:
        return list(zip(self.first, self.second, self.last, strict=True))


def listed_router(block: Any) -> Router:
    gate = getattr(block.gate, "original_component", block.gate)
    return Router(gate.weight, lambda x: gate(x).softmax(-1).topk(block.k).indices, gate.bias, over_all=True, scale=2.0)


def listed_expert(block: Any, e: int) -> Expert:
    parts = block.experts()[e]
    return Expert(*(part.weight for part in parts), *(part.bias for part in parts))


LISTED = ExpertsFamily(
    router=listed_router,
    experts=lambda block: lambda e: listed_expert(block, e),
    n_experts=lambda block: len(block.first),
    gated=lambda block: GatedActivation(torch.relu),
)


@pytest.fixture
def distance(monkeypatch: pytest.MonkeyPatch) -> TransformerBridge:
    monkeypatch.delitem(ATTENTION, "DistanceAttention", raising=False)  # what a test registers is taken back
    monkeypatch.setattr(modeling_opt, "OPTAttention", DistanceAttention)
    return build_wider("opt")


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> TransformerBridge:
    monkeypatch.delitem(EXPERTS, "ListedMoeBlock", raising=False)
    monkeypatch.setattr(modeling_mixtral, "MixtralSparseMoeBlock", ListedMoeBlock)
    return build_wider("mixtral")


def holds(model: TransformerBridge) -> None:
    """Every ruleset works, the account closes for one run and for two, and the analyses behind the command line run."""
    with no_upcasts():
        found = coverage(model)
        assert found.rulesets["works"].equals(found.rulesets["applies"]) and not found.uncovered, found.rulesets
        assert found.sites["live"].all() and found.sites["off"].max() < 1e-10
        assert unexplained(propagate(model, TOKENS, TARGET, audit=True)) < 1e-10
        assert unexplained(propagate(model, TOKENS, TARGET, reference=OTHER, audit=True)) < 1e-10
        ranking = rank_heads(model, PAIRS)
    assert len(ranking) == 8 and ranking["score"].abs().max() > 0


def test_an_attention_family_is_one_call(distance: TransformerBridge) -> None:
    with pytest.raises(CoverageError, match="DistanceAttention as a whole.*register_attention"):
        propagate(distance, TOKENS, TARGET)
    register_attention("DistanceAttention", DISTANCE)
    holds(distance)
    cache = propagate(distance, TOKENS, TARGET, reference=OTHER)
    assert cache.reference_value is not None
    close(cache.residual().sum(1), (cache.value - cache.reference_value).unsqueeze(1).expand(-1, 3), 1e-10)


def test_an_attention_family_gives_what_its_formula_says(distance: TransformerBridge) -> None:
    """Halves at both products and the identity rule at the cap: g_q = 1/2 scale (s / r) g_s k, with r the product and s the capped one."""
    register_attention("DistanceAttention", DISTANCE)
    at = "blocks.1.attn."
    names = [f"{at}{point}" for point in ("q.hook_out", "k.hook_out", "hook_attn_scores")]
    cache = propagate(distance, TOKENS, TARGET, rules="attnlrp", names_filter=names)
    q, k = (cache.activations[name].transpose(1, 2) for name in names[:2])
    raw = (0.7 + 0.2) * q @ k.transpose(-1, -2)
    capped = 2.0 * torch.tanh(raw / 2.0)
    upstream = cache.coefficients[names[2]] * capped / raw * (0.7 + 0.2) / 2
    close(cache.coefficients[names[0]], (upstream @ k).transpose(1, 2), 1e-10)
    close(cache.coefficients[names[1]], (upstream.transpose(-1, -2) @ q).transpose(1, 2), 1e-10)


def test_a_family_that_says_something_else_is_an_error(distance: TransformerBridge, listed: TransformerBridge) -> None:
    register_attention("DistanceAttention", replace(DISTANCE, scale=lambda module: 0.5))
    with pytest.raises(MismatchError, match="blocks.0.attn:z does not compute what its site says"):
        propagate(distance, TOKENS, TARGET)
    register_experts("ListedMoeBlock", replace(LISTED, gated=lambda block: GatedActivation(torch.tanh)))
    with pytest.raises(MismatchError, match="blocks.0.mlp does not compute what its site says"):
        propagate(listed, TOKENS, TARGET)


def test_an_experts_family_is_one_call(listed: TransformerBridge) -> None:
    with pytest.raises(CoverageError, match="ListedMoeBlock routes.*register_experts"):
        propagate(listed, TOKENS, TARGET)
    register_experts("ListedMoeBlock", LISTED)
    holds(listed)


def test_an_experts_family_gives_what_its_formula_says(listed: TransformerBridge) -> None:
    """Under the plain gradient of everything but the gate, whose activation is a constant: the expert is linear in its `second`."""
    register_experts("ListedMoeBlock", LISTED)
    rules = {part: rulesets()["cp_lrp"][part] for part in ("gate", "router")}
    names = ["blocks.1.mlp.hook_in", "blocks.1.mlp.hook_out"]
    cache = propagate(listed, TOKENS, TARGET, rules=rules, names_filter=names)
    block, x = listed.blocks[1].mlp.original_component, cache.activations[names[0]]
    with torch.no_grad():
        weights = block.gate(x).softmax(-1)
        weights = 2.0 * weights * torch.zeros_like(weights).scatter(-1, weights.topk(2).indices, 1.0)
        expected = torch.zeros_like(x)
        for e, (first, second, last) in enumerate(block.experts()):
            at_neurons = cache.coefficients[names[1]] @ last.weight * torch.relu(first(x))
            expected = expected + weights[..., e : e + 1] * (at_neurons @ second.weight)
    close(cache.coefficients[names[0]], expected, 1e-10)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(RelevanceError, match="'OPTAttention' is registered already; replace=True"):
        register_attention("OPTAttention", DISTANCE)
    with pytest.raises(RelevanceError, match="'GptOssMLP' is registered already; replace=True"):
        register_experts("GptOssMLP", LISTED)


def test_a_registered_family_can_be_replaced(distance: TransformerBridge) -> None:
    register_attention("DistanceAttention", replace(DISTANCE, scale=lambda module: 0.5))
    register_attention("DistanceAttention", DISTANCE, replace=True)
    propagate(distance, TOKENS, TARGET)


class Squared(ElementwiseRule):
    """A rule of one's own: the square of the identity rule's slope."""

    def slope(self, f: KnownFunction, x: Tensor, other: Tensor | None) -> Tensor:
        return (f(x) / x) ** 2


@pytest.fixture
def squared() -> Iterator[str]:
    """The rule in a table of one's own, registered by name."""
    register_ruleset("squared", {**rulesets()["attnlrp"], "activation": Squared()})
    yield "squared"
    del _RULESETS["squared"]


@pytest.mark.parametrize(("family", "function"), [("gpt2", "gelu_new"), ("llama", "silu")])
def test_a_rule_is_one_class_and_a_ruleset_one_call(squared: str, family: str, function: str) -> None:
    """At a plain activation g_in = g_out (f(x) / x)^2; at a gate the half rule gives it half of the other factor."""
    model, at = build_wider(family), "blocks.1.mlp."
    names = [f"{at}{point}" for point in ("gate.hook_out", "in.hook_out", "out.hook_in")][family == "gpt2" :]
    cache = propagate(model, TOKENS, TARGET, rules=squared, names_filter=names)
    x, f = cache.activations[names[0]], ACT2FN[function]
    expected = cache.coefficients[names[-1]] * (f(x) / x) ** 2
    close(cache.coefficients[names[0]], expected * (1 if family == "gpt2" else cache.activations[names[1]] / 2), 1e-10)


def test_a_registered_ruleset_is_known_everywhere(squared: str, embedded: TransformerBridge) -> None:
    """`coverage`, `rank` and `explain`: what is behind these commands."""
    found = coverage(embedded, [squared])
    assert found.rulesets["works"].all() and (found.sites[squared] == "Squared").any()
    question = from_task(embedded, None, 2)
    ranking = rank_heads(embedded, question.pairs, squared)
    assert not ranking["score"].equals(rank_heads(embedded, question.pairs, "attnlrp")["score"])
    shown = Console(width=200, record=True, file=io.StringIO())
    show(find(embedded, question, squared), shown)
    assert "squared" in shown.export_text()


def test_an_attribution_method_is_one_call(gpt2: TransformerBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that knows the answer (the effect of patching each head) ranks and compares like any other, and better than any."""
    monkeypatch.setattr("analyses.methods.registry._METHODS", dict(_METHODS))  # what a test registers is taken back

    def effects(model: TransformerBridge, pairs: PromptPairs, components: Sequence[str]) -> Scores:
        heads = activation_patching(model, pairs, "heads", direction="denoising").effect.unflatten(0, (len(model.blocks), -1))
        return {"heads": heads.movedim(2, 0)}

    register_method("patched", Estimator("patched", effects, forwards=0, backwards=0, components=("heads",)))
    assert rank_heads(gpt2, PAIRS, "patched")["score"].abs().max() > 0
    table = compare_with_patching(gpt2, PAIRS, ["patched", "relp"], components=["heads"], direction="denoising", resamples=0).set_index(
        "method"
    )
    assert table.loc["patched", "pearson"] > 1 - 1e-9 > table.loc["relp", "pearson"]
    with pytest.raises(RelevanceError, match="'patched' exists already"):
        register_method("patched", Estimator("patched", effects, forwards=0, backwards=0))
