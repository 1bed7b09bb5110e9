"""A page with the contexts of units: their tokens in colour, and the next token that the unit spoke for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import parse_node
from analyses.contexts.atlas import Atlas
from analyses.datasets.batches import strings_of
from analyses.views import Page, token_view
from analyses.views.markup import format_number
from lens_relevance import propagate
from lens_relevance.errors import RelevanceError
from lens_relevance.hooks.model_state import left_as_found
from lens_relevance.sites import anatomy


@left_as_found
def contexts_page(model: TransformerBridge, atlas: Atlas, units: Sequence[str], *, shown: int = 5) -> Page:
    """The contexts in which units are most relevant, for and against, beside those in which they are most active.

    What colours the tokens, the unit's relevance position by position, is computed again here: an atlas holds its sum.

    Args:
        model: the one that the atlas is of.
        units: `L9N1841`, `L11H3`.
        shown: how many contexts of each kind.

    Raises:
        RelevanceError: a unit that the atlas does not hold, or another model.
    """
    title = units[0] if len(units) == 1 else "Contexts by relevance"
    page = Page(title, f"{atlas.info.get('model')}, {atlas.info.get('windows')} windows of {atlas.info.get('corpus')}")
    for unit in units:
        page.heading(unit)
        for by, lowest, words in (
            ("relevance", False, "Most relevant: what it speaks for"),
            ("relevance", True, "Least relevant: what it speaks against"),
            ("activation", False, "Most active"),
        ):
            page.heading(words, 3)
            for row in atlas.contexts(unit, by=by, lowest=lowest).head(shown).to_dict("records"):  # type: ignore[arg-type]
                tokens = atlas.window(int(row["window"]))
                relevance = _relevance(model, unit, tokens, str(atlas.info["ruleset"]))
                total = float(relevance.sum())
                if abs(total - row["relevance"]) > 1e-2 * max(abs(total), abs(row["relevance"]), 1e-2):
                    said = f"{unit} has the relevance {total:.4g} in window {row['window']}, and the atlas says {row['relevance']:.4g}"
                    raise RelevanceError(f"{said}: it is of another model")
                strings = strings_of(model, tokens.tolist())
                relevant, active = format_number(row["relevance"]), format_number(row["activation"])
                caption = f"predicts {row['predicted']!r}; relevance {relevant}, activation {active} at {row['token']!r}"
                page.view(token_view(strings, relevance, caption))
    return page


def _relevance(model: TransformerBridge, unit: str, tokens: torch.Tensor, rules: str) -> torch.Tensor:
    """A unit's relevance at each position of a window."""
    node, body = parse_node(unit), anatomy(model)
    name = body.layout["z" if node.head is not None else "neurons"][node.layer]
    cache = propagate(model, tokens[None].long(), rules=rules, names_filter=name)
    values = cache[name][0]
    return values[:, node.head].sum(-1) if node.head is not None else values[:, node.neuron]
