"""Named tables from operation to rule.

A table's keys are the operations `norm`, `activation`, `gate` (the product act(gate) * up), `soft_cap`, `scores`, `pattern`, `z`,
`router` (router weight * expert), `linear`;
a key may name a mount position as well (`norm@q_norm`), which then goes first. An operation without an entry keeps its plain gradient.

| ruleset | norm | activation | gate | attention | source |
|---|---|---|---|---|---|
| `gradient` | - | - | - | - | gradient x input; attribution patching on pairs |
| `attnlrp` | LN-rule | identity | half | softmax gradient, half on both products | arXiv 2402.05602 |
| `cp_lrp` | LN-rule | identity | constant gate | constant pattern (AH-rule) | Ali et al. 2022; as LXT applies it to gated MLPs |
| `relp` | LN-rule | identity | half | plain gradient | arXiv 2508.21258 |
| `relp_ah` | LN-rule | identity | half | constant pattern | arXiv 2508.21258, the option with the AH-rule |
| `gim` | LN-rule | - | half | softmax temperature 2, half on both products | arXiv 2505.17630, as its authors describe it |
| `deeplift` | pair form | rescale | pair form | pair form | derived here (see docs/derivation.md); needs a reference run |
| `deeplift_ln` | LN-rule in pair form | rescale | pair form | pair form | derived here; needs a reference run |
"""

from __future__ import annotations

from collections.abc import Mapping

from lens_relevance.errors import RelevanceError
from lens_relevance.rules import (
    Constant,
    Experts,
    ExpertsRule,
    Gated,
    GatedActivation,
    Half,
    Identity,
    LNRule,
    NormWeight,
    PairLN,
    PairNorm,
    PairProduct,
    PairSoftmax,
    Rescale,
    Rule,
    Scale,
    Scores,
    SoftmaxTemperature,
    UniformScores,
    ZeroRule,
)
from lens_relevance.sites import Site

OPERATIONS = ("norm", "activation", "gate", "soft_cap", "scores", "pattern", "z", "router", "linear")
PLAIN = Rule()
_ZERO = ZeroRule()
_LRP = {"norm": LNRule(), "activation": Identity(), "gate": Half, "router": Half, "soft_cap": Identity()}
_PAIR = {
    "activation": Rescale(),
    "gate": PairProduct(),
    "router": PairProduct(),
    "soft_cap": Rescale(),
    "scores": PairProduct(),
    "pattern": PairSoftmax(),
    "z": PairProduct(),
}

Table = Mapping[str, Rule]

_RULESETS: dict[str, Table] = {
    "gradient": {},
    "attnlrp": {**_LRP, "scores": Half, "z": Half},
    "cp_lrp": {**_LRP, "gate": Constant, "router": Constant, "pattern": Constant},
    "relp": dict(_LRP),
    "relp_ah": {**_LRP, "pattern": Constant},
    "gim": {"norm": LNRule(), "gate": Half, "router": Half, "scores": Half, "pattern": SoftmaxTemperature(2.0), "z": Half},
    "deeplift": {"norm": PairNorm(), **_PAIR},
    "deeplift_ln": {"norm": PairLN(), **_PAIR},
}


def rulesets() -> dict[str, Table]:
    """All registered rulesets by name (a copy)."""
    return dict(_RULESETS)


def register_ruleset(name: str, table: Table) -> None:
    """Make a ruleset of your own available by name.

    A ruleset in three lines, for models with norms on queries and keys (Qwen3, OLMo 2, Gemma 3), on which AttnLRP gives the first token,
    where attention rests, too much (python -m analyses.benchmarks.first_token shows by how much, and what this switch leaves of it):

        register_ruleset("attnlrp_plain_qk", {**rulesets()["attnlrp"], "norm@q_norm": Rule(), "norm@k_norm": Rule()})

    Raises RelevanceError for an unknown operation, something that is not a rule, or a name that is taken.
    """
    if name in _RULESETS:
        raise RelevanceError(f"a ruleset named {name!r} exists already; choose another name")
    _RULESETS[name] = check_table(table)


def check_table(table: Table) -> Table:
    """The table itself, if each key is an operation (with or without a mount position) and each value a rule."""
    for key, rule in table.items():
        if key.split("@")[0] not in OPERATIONS:
            raise RelevanceError(
                f"unknown operation {key!r} in a ruleset; operations are {', '.join(OPERATIONS)}, each also as operation@mount"
            )
        if not isinstance(rule, Rule):
            raise RelevanceError(f"the ruleset's entry for {key!r} is {rule!r}, not a Rule (see lens_relevance.rules)")
    return table


def ruleset(rules: str | Table) -> Table:
    """A ruleset by name, or a table as it is."""
    if isinstance(rules, str):
        if rules not in _RULESETS:
            raise RelevanceError(
                f"unknown ruleset {rules!r}; choose one of {', '.join(sorted(_RULESETS))}, or register_ruleset one of your own"
            )
        return _RULESETS[rules]
    return check_table(rules)


def ruleset_name(rules: str | Table) -> str:
    """Its name, or `custom` for a table that is not registered."""
    if isinstance(rules, str):
        return rules
    return next((name for name, table in _RULESETS.items() if table == rules), "custom")


def needs_reference(table: Table) -> bool:
    """Whether any rule compares with a reference run."""
    return any(rule.needs_reference for rule in table.values())


def rule_for(table: Table, site: Site) -> Rule:
    """The rule a table has for a site; operations that a model fuses get their parts' rules in one."""
    operation, rule = site.operation, _entry(table, site, site.kind)
    if isinstance(operation, Experts):
        return _experts(_entry(table, site, "activation"), _entry(table, site, "gate"), _entry(table, site, "router"))
    if isinstance(operation, GatedActivation):
        return _gated(_entry(table, site, "activation"), rule)
    cap = _entry(table, site, "soft_cap")
    if isinstance(operation, Scores) and operation.geometry.soft_cap is not None:
        return _capped(rule, cap)
    if isinstance(operation, NormWeight):  # a part of its norm, whatever rule the linear layers have
        return _ZERO
    return _ZERO if site.kind == "linear" and rule is PLAIN else rule


def _entry(table: Table, site: Site, kind: str) -> Rule:
    """A table's rule for an operation, the one for the site's mount position first."""
    return table.get(f"{kind}@{site.mount}", table.get(kind, PLAIN))


def _part(rule: Rule) -> float:
    """What a rule of a product leaves of the gradient."""
    return rule.factor if isinstance(rule, Scale) else 1.0


def _gated(activation: Rule, product: Rule) -> Rule:
    activations = {Rule: "gradient", Identity: "identity", Rescale: "rescale"}
    kind = _product_kind(product)
    if not kind:
        return product  # a rule of the user's own, for the gated activation as a whole
    if type(activation) not in activations:
        raise RelevanceError(
            f"a gated MLP cannot combine {activation!r} on its gate with {product!r}; give the 'gate' entry a rule for both"
        )
    return Gated(activations[type(activation)], kind)


def _experts(activation: Rule, product: Rule, router: Rule) -> Rule:
    """The rule of a mixture of experts, which is one operation."""
    gated = _gated(activation, product)
    if not isinstance(gated, Gated):
        raise RelevanceError("a mixture of experts takes one of the known rules for its gates, not a rule of your own")
    return ExpertsRule(gated, _product_kind(router))


def _product_kind(rule: Rule) -> str:
    """A rule of a product in one word, or nothing for a rule of the user's own."""
    if isinstance(rule, PairProduct):
        return "pair"
    if isinstance(rule, Scale):
        return {0.5: "half", 0.0: "constant"}.get(rule.factor, "")
    return "gradient" if rule.is_plain else ""


def _capped(product: Rule, cap: Rule) -> Rule:
    """The rule of scores that pass a soft-cap."""
    if isinstance(product, PairProduct) or not isinstance(cap, Identity):
        return product
    return UniformScores(_part(product), identity_cap=True)
