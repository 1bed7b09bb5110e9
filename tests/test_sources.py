"""What implements a published method says which, and what does not says that it is ours."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType
from typing import Any

import analyses.circuits
import analyses.edges
import analyses.evaluation.removal_measures
import analyses.graph
import analyses.methods
import analyses.patching
import analyses.perturbation
import lens_relevance
import lens_relevance.rules
from analyses.methods import registry
from analyses.perturbation.removal_runs import Removal
from analyses.tasks import TASKS
from lens_relevance import Target, dictionaries, ruleset_tables, token_relevance
from lens_relevance.attention_methods.methods import METHODS
from lens_relevance.dictionaries import FeatureActivation
from lens_relevance.inputs.references import Baseline
from lens_relevance.rules import ElementwiseRule, LinearRule, NormRule, ProductRule, Rule, SoftmaxRule

ARXIV = r"arXiv \d{4}\.\d{4,5}"
AUTHORS = r"(?:et al\.|[A-Z]\w+(?: (?:and|&) [A-Z]\w+)?|nostalgebraist),? (?:[A-Z]+ )?(?:19|20)\d\d"
OURS = r"\b[Oo]urs\b|\b[Oo]ur reading\b|\b[Dd]erived here\b"
SOURCE = re.compile(f"{ARXIV}|{AUTHORS}|{OURS}")
BASES = (Rule, ElementwiseRule, LinearRule, NormRule, ProductRule, SoftmaxRule, FeatureActivation)

# Functions that implement something published, or something that could have been, and are in no table of names.
FURTHER = (
    lens_relevance.head_flow,
    analyses.circuits.faithfulness_curve,
    analyses.circuits.frequent,
    analyses.circuits.greedy,
    analyses.circuits.mib_areas,
    analyses.edges.attribute_edges,
    analyses.graph.flow_graph,
    analyses.graph.head_routes,
    analyses.methods.by_attention,
    analyses.methods.by_ruleset,
    analyses.methods.integrated_edges,
    analyses.patching.ablation,
    analyses.patching.activation_patching,
    analyses.patching.path_patching,
    analyses.perturbation.against,
    analyses.perturbation.areas,
    analyses.perturbation.occlusion,
    analyses.perturbation.perturbation_curves,
    analyses.perturbation.random_order,
    analyses.perturbation.removal_curves,
    analyses.evaluation.removal_measures.comprehensiveness,
    analyses.evaluation.removal_measures.faithfulness_correlation,
    analyses.evaluation.removal_measures.saco,
    analyses.evaluation.removal_measures.sufficiency,
)


def silent(named: Iterable[tuple[str, Any]]) -> list[str]:
    """Names of those whose docstring names no source."""
    return [name for name, value in named if not SOURCE.search(inspect.getdoc(value) or "")]


def derived_from(base: type, module: ModuleType) -> list[tuple[str, type]]:
    """The public classes of a module that derive from this one, but for those that only others derive from."""
    exported = [(name, getattr(module, name)) for name in module.__all__]
    return [(name, value) for name, value in exported if inspect.isclass(value) and issubclass(value, base) and value not in BASES]


def that_make(base: type, module: ModuleType) -> list[tuple[str, Callable[..., object]]]:
    """The public functions of a module that return such a thing."""
    functions = [(name, getattr(module, name)) for name in module.__all__ if inspect.isfunction(getattr(module, name))]
    found = []
    for name, function in functions:
        returned = re.search(r"\) -> (\w+):\n", inspect.getsource(function))  # the checks of the tests may have replaced the annotation
        made = inspect.unwrap(function).__globals__.get(returned[1]) if returned else None
        if inspect.isclass(made) and issubclass(made, base):
            found.append((name, function))
    return found


def table_rows(text: str) -> dict[str, str]:
    """The first names of a table's rows, each with its last column."""
    rows = re.findall(r"^\s*\| `(\w+)`[^|]*\|(?:.*\|)?([^|]*)\|\s*$", text, flags=re.MULTILINE)
    return {name: last.strip() for name, last in rows}


def test_methods_name_their_sources() -> None:
    makers = {name: maker for name, maker in registry._METHODS.items() if not isinstance(maker, partial)}
    assert len(makers) > 10 and set(METHODS) <= set(registry._METHODS) - set(makers)
    assert not silent(makers.items())


def test_methods_of_token_relevance_name_their_sources() -> None:
    sources = table_rows(inspect.getdoc(token_relevance) or "")
    assert set(sources) == set(METHODS)
    # gradient x input and the patterns themselves are nobody's invention
    assert {name for name, source in sources.items() if not SOURCE.search(source)} == {"gradient_attention", "raw_attention"}


def test_rulesets_name_their_sources() -> None:
    sources = table_rows(ruleset_tables.__doc__ or "")
    assert set(ruleset_tables._RULESETS) <= set(sources)
    assert {name for name in ruleset_tables._RULESETS if not SOURCE.search(sources[name])} == {"gradient"}


def test_rules_activations_of_features_and_removals_name_their_sources() -> None:
    rules, features = derived_from(Rule, lens_relevance.rules), derived_from(FeatureActivation, dictionaries)
    removals = derived_from(Removal, analyses.perturbation)
    assert len(rules) > 15 and len(features) > 3 and len(removals) > 2
    assert not silent([*rules, *features, *removals])


def test_targets_and_references_name_their_sources() -> None:
    targets, references = that_make(Target, lens_relevance), that_make(Baseline, lens_relevance)
    assert len(targets) > 5 and len(references) > 2
    assert not silent([*targets, *references])


def test_tasks_and_measures_name_their_sources() -> None:
    assert len(TASKS) > 8
    assert not silent([*TASKS.items(), *((function.__name__, function) for function in FURTHER)])


def test_a_docstring_without_a_source_is_found() -> None:
    def without() -> None:
        """The best there is, found in 2024, as everybody knows (see 2402)."""

    def paper() -> None:
        """As in arXiv 2402.05602."""

    def authors() -> None:
        """EpsilonRule (Bach et al. 2015)."""

    def own() -> None:
        """Derived here."""

    assert silent([("without", without), ("paper", paper), ("authors", authors), ("own", own)]) == ["without"]
    assert table_rows("| `one` | a | Ali et al. 2022 |\n| `two` | b | |") == {"one": "Ali et al. 2022", "two": ""}
