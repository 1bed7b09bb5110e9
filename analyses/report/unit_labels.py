"""What heads and neurons of a ranking are about: the tokens that each writes, and its best context in an atlas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import Node, parse_node
from analyses.contexts import Atlas
from analyses.datasets.batches import text_of
from analyses.describe.written_by_units import written_tokens
from analyses.tasks import PromptPairs
from lens_relevance import propagate
from lens_relevance.errors import RelevanceError
from lens_relevance.provenance import name_of
from lens_relevance.sites import anatomy

_RULES = "attnlrp"
_SIDE = 22  # characters of a context on each side of its token


def unit_labels(
    model: TransformerBridge, pairs: PromptPairs, units: Sequence[str], *, atlas: Atlas | None = None
) -> tuple[pd.DataFrame, str]:
    """A row per unit, and a sentence on what the columns hold, or why one is left out.

    Args:
        pairs: those that the units were ranked over; the first clean prompt is looked at.
        units: heads and neurons: `L11H3`, `L9N1841`.
        atlas: for the column with the context in which the unit is most relevant.

    Returns:
        Columns unit; at (the token at which the unit has most relevance in that prompt, by `attnlrp`) and writes (the three tokens whose
        logits it raises most from there by the straight way), where the weights of the model's unembedding can be read; context, with an
        atlas.

    Raises:
        RelevanceError: an atlas of another model.
    """
    if atlas is not None and atlas.info.get("model") != name_of(model):
        raise RelevanceError(f"the atlas is of {atlas.info.get('model')}, and this model is {name_of(model)}")
    table = pd.DataFrame({"unit": list(units)})
    try:
        written = _written(model, pairs, [parse_node(unit) for unit in units])
        table["at"], table["writes"] = zip(*written, strict=True)
        note = "writes: the tokens that it raises most by the straight way to the logits; at: where it is most relevant in the first prompt"
    except RelevanceError as error:
        note = f"what they write is left out: {error}"
    if atlas is not None:
        held = set(atlas.names())
        table["context"] = [_best(atlas, unit) if unit in held else "–" for unit in units]
        note += "; context: that in which it is most relevant in the atlas"
    return table, note


def _written(model: TransformerBridge, pairs: PromptPairs, nodes: list[Node]) -> list[tuple[str, str]]:
    """Where each unit is most relevant in the first prompt, and what it writes there."""
    first = pairs[slice(0, 1)]
    real, layout = first.clean_mask[0].bool(), anatomy(model).layout
    points = {node: layout["z" if node.head is not None else "neurons"][node.layer] for node in nodes}
    cache = propagate(
        model, first.clean, first.target, rules=_RULES, names_filter=sorted(set(points.values())), attention_mask=first.clean_mask
    )
    placed = []
    for node, point in points.items():
        values = cache[point][0][real]
        relevance = values[:, node.head].sum(-1) if node.head is not None else values[:, node.neuron]
        placed.append(replace(node, position=int(relevance.abs().argmax())))
    tokens = first.clean[0][real]
    said = written_tokens(model, tokens[None], placed, sources=1).tokens
    return [(f"{text_of(model, [int(tokens[node.position])]).strip()} ({node.position})", said[str(node)]) for node in placed]


def _best(atlas: Atlas, unit: str) -> str:
    """The unit's most relevant context, cut to a line."""
    found = atlas.contexts(unit)["context"]
    if not len(found):
        return "–"
    left, mark, rest = found[0].partition("«")
    here, closing, right = rest.partition("»")
    return " ".join((left[-_SIDE:] + mark + here + closing + right[:_SIDE]).split())
