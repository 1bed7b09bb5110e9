"""Named tables from operation to rule.

A table's keys are operations: `norm`, `activation`, `gate` (the product act(gate) * up), `soft_cap`, `scores`, `pattern`, `z`, `router`
(router weight * expert), `linear` (convolutions too). A key may say where, by place, by layers or both (`norm@q_norm`, `linear[:4]`,
`linear@mlp.in[-1]`, see ruleset_keys.py); the one that says most about an operation is its own. What has no entry keeps its plain gradient.
So a composite by depth and kind, as in zennit, takes three lines:

    rules = {**rulesets()["attnlrp"], "linear@unembed": EpsilonRule(1e-3)}
    rules |= {"linear[:4]": GammaRule(0.25), "linear[4:]": EpsilonRule(1e-3)}
    rules |= {"linear@attn.q": ZeroRule(), "linear@attn.k": ZeroRule()}

| ruleset | norm | activation | gate | attention | source |
|---|---|---|---|---|---|
| `gradient` | - | - | - | - | gradient x input; attribution patching on pairs |
| `attnlrp` | LN-rule | identity | half | softmax gradient, half on both products | arXiv 2402.05602 |
| `attnlrp_plain_qk` | LN-rule, none on queries and keys | identity | half | as `attnlrp` | derived here (see below) |
| `cp_lrp` | LN-rule | identity | constant gate | constant pattern (AH-rule) | Ali et al. 2022; as LXT applies it to gated MLPs |
| `cp_lrp_gamma` | LN-rule | identity | constant gate | constant pattern | Ali et al. 2022; gamma as LXT has it on images (see below) |
| `relp` | LN-rule | identity | half | plain gradient | arXiv 2508.21258 |
| `relp_ah` | LN-rule | identity | half | constant pattern | arXiv 2508.21258, the option with the AH-rule |
| `gim` | LN-rule | - | half | softmax temperature 2, half on both products | arXiv 2505.17630, as its authors describe it |
| `lrp_zplus` | unchanged | identity | half | softmax unchanged, half on both products | Chefer et al. 2021, arXiv 2012.09838; linear: z+ |
| `deeplift` | pair form | rescale | pair form | pair form | DeepLIFT, SHAP, softmax derived here (docs/derivation.md); for two runs |
| `deeplift_ln` | LN-rule in pair form | rescale | pair form | pair form | derived here from the LN-rule, otherwise the same; for two runs |

`attnlrp_plain_qk` is for models with norms on queries and keys (Qwen3, OLMo 2, Gemma 3), on which AttnLRP gives the first token, where
attention rests, too much; analyses/benchmarks/first_token.py says why the plain gradient of these norms helps, and by how much. On a model
without such norms its entries match nothing, which is an error.

`cp_lrp_gamma` has gamma 0.05 on the two layers of each MLP and on the head, and the 0-rule in attention. So have the authors' published ViT
examples (LXT): they register gamma for every linear layer, but torch.nn.MultiheadAttention does not call its projections as layers. Which
gamma is our reading: the examples search 0, 0.01, 0.05, 0.1 and 1 by eye, and this is the middle one. The projection of the patches, a
convolution to which they give a gamma of its own, lies below the embedding, where our relevance ends.

`lrp_zplus` is the relevance of Chefer et al. 2021 (Transformer Interpretability Beyond Attention Visualization): in linear layers positive
contributions alone, everywhere else relevance passes as it is. Their normalisation of sums (residual connections) is no operation of ours
and not in it; token relevance by `chefer_2021a` has it. Matrices inside mixtures of experts have no entry and keep the plain gradient.
"""

from __future__ import annotations

from collections.abc import Mapping

from lens_relevance.errors import RelevanceError
from lens_relevance.rules import (
    ConstantFirstFactor,
    ConstantOutput,
    ElementwiseRule,
    GammaRule,
    Half,
    Identity,
    LinearRule,
    LNRule,
    NormIdentity,
    NormRule,
    PairLN,
    PairNorm,
    PairProduct,
    PairSoftmax,
    ProductRule,
    Rescale,
    Rule,
    SoftmaxIdentity,
    SoftmaxRule,
    SoftmaxTemperature,
    ZPlusRule,
)
from lens_relevance.ruleset_keys import entry, read_key
from lens_relevance.sites import Site

# What a ruleset has entries for, and the kind of rule that is made for each.
PARTS: dict[str, type[Rule]] = {
    "norm": NormRule,
    "activation": ElementwiseRule,
    "gate": ProductRule,
    "soft_cap": ElementwiseRule,
    "scores": ProductRule,
    "pattern": SoftmaxRule,
    "z": ProductRule,
    "router": ProductRule,
    "linear": LinearRule,
}
PLAIN = Rule()
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

_ATTNLRP = {**_LRP, "scores": Half, "z": Half}
_CP_LRP = {**_LRP, "gate": ConstantFirstFactor(), "router": ConstantFirstFactor(), "pattern": ConstantOutput}
_ZPLUS = {**_LRP, "norm": NormIdentity(), "scores": Half, "pattern": SoftmaxIdentity(), "z": Half, "linear": ZPlusRule()}
_GAMMA = dict.fromkeys(("linear@mlp.in", "linear@mlp.out", "linear@unembed"), GammaRule(0.05))

Table = Mapping[str, Rule]

_RULESETS: dict[str, Table] = {
    "gradient": {},
    "attnlrp": _ATTNLRP,
    "attnlrp_plain_qk": {**_ATTNLRP, "norm@q_norm": PLAIN, "norm@k_norm": PLAIN},
    "cp_lrp": _CP_LRP,
    "cp_lrp_gamma": {**_CP_LRP, **_GAMMA},
    "relp": dict(_LRP),
    "relp_ah": {**_LRP, "pattern": ConstantOutput},
    "gim": {"norm": LNRule(), "gate": Half, "router": Half, "scores": Half, "pattern": SoftmaxTemperature(2.0), "z": Half},
    "lrp_zplus": _ZPLUS,
    "deeplift": {"norm": PairNorm(), **_PAIR},
    "deeplift_ln": {"norm": PairLN(), **_PAIR},
}


def rulesets() -> dict[str, Table]:
    """All registered rulesets by name (a copy)."""
    return dict(_RULESETS)


def register_ruleset(name: str, table: Table) -> None:
    """Make a ruleset of your own available by name.

        register_ruleset("attnlrp_gamma", {**rulesets()["attnlrp"], "linear@mlp.in": GammaRule(0.25), "linear@mlp.out": GammaRule(0.25)})

    Raises:
        RelevanceError: an unknown operation, a key that is not one, something that is not a rule, a rule that is made for another kind of
            operation, or a name that is taken.
    """
    if name in _RULESETS:
        raise RelevanceError(f"a ruleset named {name!r} exists already; choose another name")
    _RULESETS[name] = check_table(table)


def check_table(table: Table) -> Table:
    """The table itself, if each key is one and each value a rule that its operation can take."""
    for key, rule in table.items():
        part = read_key(key).part
        if part not in PARTS:
            raise RelevanceError(
                f"unknown operation {key!r} in a ruleset; operations are {', '.join(PARTS)}, each also as operation@place, "
                "operation[layers] or operation@place[layers]"
            )
        if not isinstance(rule, Rule):
            raise RelevanceError(f"the ruleset's entry for {key!r} is {rule!r}, not a Rule (see lens_relevance.rules)")
        _check_kind(rule, part, key)
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
    """The rule a table has for a site: that of its one part, or what the operation composes of its parts' rules.

    Raises RelevanceError where a step that a model fuses with others gets a rule that cannot be called for that step alone.
    """
    rules = {}
    for part in site.operation.parts:
        key = entry(table, part, site) or part
        rules[part] = _at(table.get(key, PLAIN), site)
        _check_kind(rules[part], part, key)
        if len(site.operation.parts) > 1 and not (rules[part].is_plain or isinstance(rules[part], PARTS[part])):
            raise RelevanceError(
                f"the ruleset's entry {key!r} is {rules[part]!r}, which cannot pass one step of {site.name} alone: the model fuses "
                f"{', '.join(site.operation.parts)} there. It takes {_in_words(PARTS[part])}"
            )
    return site.operation.compose(rules)


def _at(rule: Rule, site: Site) -> Rule:
    """The rule for a site, which may not be the first to ask for a reference run."""
    here = rule.at(site)
    if here.needs_reference and not rule.needs_reference:
        raise RelevanceError(f"{rule!r} gives {site.name} {here!r}, which compares two runs; it has to say needs_reference itself")
    return here


def _check_kind(rule: Rule, part: str, key: str) -> None:
    """Refuse a rule that is made for another kind of operation; one that only scales the output fits any, and so may one of your own."""
    if rule.is_plain or rule.on_output or isinstance(rule, PARTS[part]):
        return
    kinds = [kind for kind in dict.fromkeys(PARTS.values()) if isinstance(rule, kind)]
    if kinds:
        raise RelevanceError(f"the ruleset's entry {key!r} is {rule!r}, {_in_words(kinds[0])}; it takes {_in_words(PARTS[part])}")


def _in_words(kind: type[Rule]) -> str:
    says = {ElementwiseRule: " (a rule with `slope`)", ProductRule: " (a rule with `factors`)"}
    return f"{'an' if kind.__name__[0] in 'AEIO' else 'a'} {kind.__name__}{says.get(kind, '')}"
