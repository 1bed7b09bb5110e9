"""A hand-made model with declared sites gets every ruleset, the audit and the pair rules; on a bridge they add to what was found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedRootModule import HookedRootModule
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2Config
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from lens_relevance import (
    CoverageError,
    LivenessError,
    MismatchError,
    RelevanceError,
    attach,
    coverage,
    declare_sites,
    logit_diff,
    propagate,
    rulesets,
)
from lens_relevance.ruleset_tables import needs_reference
from lens_relevance.sites import DeclaredSite, activation, anatomy, attention, linear, norm
from tests.engine.families import RULESETS, build, close, inputs_and_reference

TARGET = logit_diff(3, 4)
POINTS = ("embed", "resid", "norm_in", "norm_out", "q", "k", "v", "scores", "pattern", "z", "out", "resid_mid", "pre", "post", "final")


class HandMade(HookedRootModule):
    """One bidirectional block with two heads, an RMS norm without weight and a ReLU MLP of its own layout."""

    def __init__(self, decorative: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.decorative = decorative
        self.table = nn.Embedding(11, 8, dtype=torch.float64)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(8, 8, dtype=torch.float64) for _ in range(4))
        self.up, self.down = nn.Linear(8, 12, dtype=torch.float64), nn.Linear(12, 8, dtype=torch.float64)
        self.head = nn.Linear(8, 11, bias=False, dtype=torch.float64)
        for name in POINTS:
            setattr(self, f"hook_{name}", HookPoint())
        self.setup()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.hook_resid(self.hook_embed(self.table(tokens)))
        y = self.hook_norm_in(x)
        y = self.hook_norm_out(y * (y.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt())
        q, k, v = self.hook_q(self.to_q(y)), self.hook_k(self.to_k(y)), self.hook_v(self.to_v(y))
        heads = [t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v)]
        scores = self.hook_scores(heads[0] @ heads[1].transpose(-1, -2) / 2)
        pattern = self.hook_pattern(scores.softmax(-1))
        if self.decorative:
            pattern = scores.softmax(-1)
        z = self.hook_z((pattern @ heads[2]).transpose(1, 2).flatten(-2))
        x = self.hook_resid_mid(x + self.hook_out(self.to_out(z)))
        post = self.hook_post(torch.relu(self.hook_pre(self.up(x))))
        return self.head(self.hook_final(x + self.down(post)))


def _declared(**options: bool) -> HandMade:
    model = HandMade(**options).eval()
    sites = [
        norm("blocks.0.norm", "hook_norm_in", "hook_norm_out", eps=1e-5, rms=True),
        attention(
            "blocks.0.attn",
            "hook_q",
            "hook_k",
            hook_v="hook_v",
            hook_scores="hook_scores",
            hook_pattern="hook_pattern",
            hook_z="hook_z",
            n_heads=2,
            d_head=4,
        ),
        activation("blocks.0.mlp", "hook_pre", "hook_post", function=torch.relu),
        linear("blocks.0.q", "hook_norm_out", "hook_q", weight=model.to_q.weight, bias=model.to_q.bias),
        linear("blocks.0.k", "hook_norm_out", "hook_k", weight=model.to_k.weight, bias=model.to_k.bias),
        linear("blocks.0.v", "hook_norm_out", "hook_v", weight=model.to_v.weight, bias=model.to_v.bias),
        linear("blocks.0.out", "hook_z", "hook_out", weight=model.to_out.weight, bias=model.to_out.bias),
        linear("blocks.0.up", "hook_resid_mid", "hook_pre", weight=model.up.weight, bias=model.up.bias),
    ]
    cuts = ["hook_resid", "hook_final"]
    declare_sites(model, sites, embeddings=["hook_embed"], residual=cuts, z=["hook_z"], neurons=["hook_post"])
    return model


TOKENS, OTHER = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), torch.tensor([[1, 9, 3, 4], [5, 10, 7, 2]])


@pytest.mark.parametrize("rules", RULESETS)
def test_every_ruleset_runs_and_leaves_the_forward_alone(rules: str) -> None:
    model = _declared()
    reference = OTHER if needs_reference(rulesets()[rules]) else None
    logits = model(TOKENS)
    cache = propagate(model, TOKENS, TARGET, rules=rules, reference=reference)
    assert torch.equal(cache.logits, logits)
    assert cache.tokens().shape == (2, 4) and cache.residual().shape == (2, 4, 2) and cache.neurons(0).shape == (2, 4, 12)
    if rules == "deeplift":
        assert cache.reference_value is not None
        close(cache.residual().sum(1), (cache.value - cache.reference_value).unsqueeze(1).expand(-1, 2), 1e-10)


def test_what_has_no_site_shows_in_the_account() -> None:
    """`down` is declared nowhere, so its bias is the one thing that the account cannot name."""
    model = _declared()
    with torch.no_grad():
        model.down.bias.zero_()
    assert propagate(model, TOKENS, TARGET, rules="attnlrp", audit=True).conservation()["unexplained"].abs().max() < 1e-12
    with torch.no_grad():
        model.down.bias.fill_(0.5)
    assert propagate(model, TOKENS, TARGET, rules="attnlrp", audit=True).conservation()["unexplained"].abs().max() > 1e-3


def test_attach_works_too() -> None:
    model, gradients = _declared(), {}
    hook = ("hook_z", lambda gradient, hook: gradients.update(z=gradient.clone()))
    with attach(model, "attnlrp"), model.hooks(bwd_hooks=[hook]):
        logits = model(TOKENS)
        (logits[:, -1, 3] - logits[:, -1, 4]).sum().backward()
    cache = propagate(model, TOKENS, TARGET, rules="attnlrp")
    close(gradients["z"].unflatten(-1, (2, 4)), cache.coefficients["hook_z"], 1e-12)  # kept by head, as a bridge's
    close(cache.heads()[:, :, 0], cache["hook_z"].sum(-1), 1e-12)
    assert cache.heads().shape == (*TOKENS.shape, 1, 2)


def test_coverage_of_a_model_without_a_config() -> None:
    model = _declared()
    with torch.no_grad():
        model.down.bias.zero_()
    found = coverage(model)
    # z+ has rules for linear layers, and this one reads a HookPoint that the residual connection passes as well
    table = found.rulesets.set_index("ruleset")
    assert not table.loc["lrp_zplus", "works"] and "blocks.0.up (hook_resid_mid" in table.loc["lrp_zplus", "reason"]
    table = table.drop("lrp_zplus")
    assert table["works"].equals(table["applies"]) and found.sites["live"].all() and not found.uncovered
    assert set(found.sites["operation"]) == {"norm", "scores", "pattern", "z", "activation", "linear"}
    assert found.sites["off"].max() < 1e-12
    given = coverage(model, ["cp_lrp", "deeplift"], inputs=TOKENS)
    assert given.rulesets["works"].equals(given.rulesets["applies"]) and given.rulesets["unexplained"].max() < 1e-12


def test_coverage_shows_a_declaration_that_does_not_hold() -> None:
    """An eps that is not the model's: no ruleset need fail over it, and the site's own line shows it."""
    model = _declared()
    wrong = [
        norm("blocks.0.norm", "hook_norm_in", "hook_norm_out", eps=0.3, rms=True),
        activation("mlp", "hook_pre", "hook_post", function=torch.tanh),
    ]
    declare_sites(model, wrong, embeddings=["hook_embed"])
    sites = coverage(model, ["cp_lrp"], inputs=TOKENS).sites.set_index("site")
    assert sites.loc["blocks.0.norm", "off"] > 1e-2 and sites.loc["mlp", "off"] > 1e-2


def test_coverage_asks_for_inputs_where_it_cannot_make_them() -> None:
    model = _declared()
    model.table = nn.Identity().eval()
    with pytest.raises(RelevanceError, match="inputs="):
        coverage(model)


def test_a_decorative_hookpoint_is_refused() -> None:
    with pytest.raises(LivenessError, match="hook_pattern"):
        propagate(_declared(decorative=True), TOKENS, TARGET, rules="cp_lrp")


def test_bad_declarations_are_refused() -> None:
    with pytest.raises(RelevanceError, match="not a HookPoint"):
        declare_sites(HandMade(), [activation("mlp", "hook_pre", "hook_pots", function=torch.relu)], embeddings=["hook_embed"])
    with pytest.raises(RelevanceError, match="embeddings"):
        declare_sites(HandMade(), [], embeddings=[])
    with pytest.raises(RelevanceError, match="declare_sites"):
        propagate(HandMade().eval(), TOKENS, TARGET, rules="attnlrp")


class OddMLP(GPT2MLP):
    """GPT-2's MLP with its activation where nobody looks for it."""

    def __init__(self, intermediate_size: int, config: GPT2Config) -> None:
        super().__init__(intermediate_size, config)
        self.nonlinearity = self.act
        del self.act

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.c_proj(self.nonlinearity(self.c_fc(hidden_states)))


def _odd_bridge(monkeypatch: pytest.MonkeyPatch) -> TransformerBridge:
    monkeypatch.setattr(modeling_gpt2, "GPT2MLP", OddMLP)
    return build("gpt2")


def _activations(model: TransformerBridge, function: Callable[[Tensor], Tensor]) -> list[list[DeclaredSite]]:
    return [
        activation(f"blocks.{i}.mlp", f"blocks.{i}.mlp.in.hook_out", f"blocks.{i}.mlp.out.hook_in", function=function) for i in range(2)
    ]


def test_a_declared_site_covers_a_component_of_a_bridge_that_had_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Declared, the odd model is GPT-2 again, to the bit; and everything else that was found on it is still there."""
    plain, model, (tokens, _) = build("gpt2"), _odd_bridge(monkeypatch), inputs_and_reference()
    assert set(anatomy(model).uncovered) == {"blocks.0.mlp", "blocks.1.mlp"}
    with pytest.raises(CoverageError, match="blocks.0.mlp.*not found"):
        propagate(model, tokens, TARGET, rules="attnlrp")
    declare_sites(model, _activations(model, plain.blocks[0].mlp.original_component.act))
    assert not anatomy(model).uncovered and {s.name for s in anatomy(model).sites} == {s.name for s in anatomy(plain).sites}
    found, expected = (propagate(m, tokens, TARGET, rules="attnlrp", names_filter=lambda name: True, audit=True) for m in (model, plain))
    assert set(found.coefficients) == set(expected.coefficients)
    assert all(torch.equal(found.coefficients[name], expected.coefficients[name]) for name in expected.coefficients)
    assert found.conservation()["unexplained"].abs().max() < 1e-12


def test_a_declared_site_takes_the_place_of_the_one_that_was_found() -> None:
    """A norm that is said to be an element-wise function passes relevance by the identity rule: g_in = g_out y / x."""
    model, (tokens, _) = build("gpt2"), inputs_and_reference()
    names = [f"blocks.1.ln1.hook_{end}" for end in ("in", "out")]
    before, found = anatomy(model), propagate(model, tokens, TARGET, rules="attnlrp", names_filter=names)
    declare_sites(model, [activation("blocks.1.ln1", *names, function=lambda x: x)])
    with pytest.raises(MismatchError, match="blocks.1.ln1 does not compute what its site says"):
        propagate(model, tokens, TARGET, rules="attnlrp", names_filter=names)
    cache = propagate(model, tokens, TARGET, rules="attnlrp", names_filter=names, check=False)
    x, y = (cache.activations[name] for name in names)
    close(cache.coefficients[names[0]], cache.coefficients[names[1]] * y / x, 1e-12)
    assert float((cache.coefficients[names[0]] - found.coefficients[names[0]]).abs().max()) > 1e-2
    assert coverage(model, ["cp_lrp"]).sites.set_index("site").loc["blocks.1.ln1", "off"] > 0.1
    original = model.blocks[1].ln1.original_component
    declare_sites(model, [norm("blocks.1.ln1", *names, weight=original.weight, bias=original.bias)])  # said again: the later one holds
    cache = propagate(model, tokens, TARGET, rules="attnlrp", names_filter=names)
    close(cache.coefficients[names[0]], found.coefficients[names[0]], 1e-12)
    assert [s.name for s in anatomy(model).sites] == [s.name for s in before.sites if not s.name.startswith("blocks.1.ln1:")]


def test_the_steps_of_a_component_go_with_the_whole_of_it() -> None:
    """A norm is one operation or three; who says what it is replaces all of them."""
    model = build("gpt2")
    declare_sites(model, [norm("blocks.0.mine", "blocks.0.ln1.hook_in", "blocks.0.ln1.hook_out", rms=True)])
    names = [s.name for s in anatomy(model).sites]
    assert "blocks.0.mine" in names and not [n for n in names if n.startswith("blocks.0.ln1")]
    assert [n for n in names if n.startswith("blocks.1.ln1")]


@pytest.mark.parametrize(
    ("sites", "options", "message"),
    [
        (lambda m: [activation("mlp", "blocks.0.mlp.in.hook_out", "blocks.0.mlp.out.hook_inn", function=torch.relu)], {}, "out.hook_in"),
        (lambda m: [norm("blocks.0.mlp", "blocks.0.ln1.hook_in", "blocks.0.ln1.hook_out")], {}, "'blocks.0.mlp' already"),
        (lambda m: [*_activations(m, torch.relu), *_activations(m, torch.relu)], {}, "two sites have the name 'blocks.0.mlp'"),
        (
            lambda m: [norm(name, "blocks.0.ln1.hook_in", "blocks.0.ln1.hook_out") for name in ("one", "two")],
            {},
            "two sites have the output 'blocks.0.ln1.hook_out'",
        ),
        (lambda m: [], {"residual": ["blocks.0.hook_in"]}, "give it sites alone"),
    ],
)
def test_bad_declarations_on_a_bridge_are_refused(sites: Any, options: dict[str, Any], message: str) -> None:
    model = build("gpt2")
    before = [s.name for s in anatomy(model).sites]
    with pytest.raises(RelevanceError, match=message):
        declare_sites(model, sites(model), **options)
    assert [s.name for s in anatomy(model).sites] == before
