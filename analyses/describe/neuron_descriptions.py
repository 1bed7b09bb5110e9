"""What an MLP neuron does, beside its rank: the contexts in which it matters or fires, and what it writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.datasets.batches import Batch, batches, text_of
from analyses.describe.direct_logits import DirectLogits, neuron_output_weight
from analyses.describe.strongest import Strongest, check_top, effects_in_words, extremes
from analyses.tasks import PromptPairs
from lens_relevance import RelevanceError, propagate
from lens_relevance.hooks.model_state import left_as_found
from lens_relevance.inputs.prompt import Inputs
from lens_relevance.inputs.targets import AnyTarget
from lens_relevance.ruleset_tables import Table
from lens_relevance.sites import anatomy


@dataclass(frozen=True, eq=False)
class NeuronDescription:
    """What an MLP neuron (after the activation) does on a set of prompts. Relevance is in units of the target; positive speaks for it.

    Attributes:
        relevance: of the neuron, summed over positions, mean over prompts.
        contexts: strongest ones: example, position, token, context (the token between « and »), activation, reference (activation on the
            corrupt prompt; pairs alone), relevance.
        writes: effect (promotes or suppresses), rank, token, logit: direct logits of the neuron's output weights per unit of activation,
            norms as in `DirectLogits`, mean over the contexts.
    """

    layer: int
    neuron: int
    relevance: float
    n_prompts: int
    contexts: pd.DataFrame
    writes: pd.DataFrame

    def to_dataframe(self) -> pd.DataFrame:
        """One row: layer, neuron, relevance, the strongest context, and what the neuron writes."""
        first = self.contexts.iloc[0]
        row = {"layer": self.layer, "neuron": self.neuron, "relevance": self.relevance}
        row |= {"token": first["token"], "context": first["context"], "activation": first["activation"]}
        return pd.DataFrame([row | effects_in_words(self.writes)])


@left_as_found
def describe_neuron(
    model: TransformerBridge,
    prompts: PromptPairs | Inputs,
    layer: int,
    *,
    neuron: int,
    target: AnyTarget | None = None,
    rules: str | Table | None = None,
    top_k: int = 10,
    by: Literal["relevance", "activation"] = "relevance",
) -> NeuronDescription:
    """Describe one MLP neuron by the contexts in which it matters (`by` relevance) or fires (`by` activation) most.

    Source: naming a unit by where it is relevant is from AttnLRP (arXiv 2402.05602, section 4).

    Args:
        layer, neuron: which one, counted from 0.
        by: what contexts are ordered by.

    Other arguments are those of `describe_head`.

    Raises:
        RelevanceError: a neuron out of range, or bad input.
        CoverageError: an MLP whose output layer is not one linear layer (mixtures of experts).
    """
    body = anatomy(model)
    if not 0 <= layer < body.n_layers:
        raise RelevanceError(f"layer {layer} is out of range: the model has {body.n_layers} layers, 0 to {body.n_layers - 1}")
    width = neuron_output_weight(model, layer).shape[1]
    if not 0 <= neuron < width:
        raise RelevanceError(f"neuron {neuron} is out of range: the layer has {width} neurons, 0 to {width - 1}")
    check_top(top_k)
    if by not in ("relevance", "activation"):
        raise RelevanceError(f"contexts are ordered by 'relevance' or 'activation', not {by!r}")
    direct, name = DirectLogits(model, layer, "mlp"), body.layout["neurons"][layer]
    output = neuron_output_weight(model, layer)[:, neuron]
    strongest: Strongest | None = None
    total, n = 0.0, 0
    for batch in batches(model, prompts, target):
        cache = propagate(
            model,
            batch.tokens,
            batch.target,
            rules=rules or ("attnlrp" if batch.reference is None else "deeplift"),
            names_filter=[name, *direct.norms],
            reference=batch.reference,
            attention_mask=batch.mask,
        )
        relevance, activation = cache[name][..., neuron], cache.activations[name][..., neuron]
        counterpart = cache.reference_activations[name][..., neuron] if batch.reference is not None else None
        norms = {point: cache.activations[point] for point in direct.norms}
        order = torch.where(batch.mask.bool(), (relevance if by == "relevance" else activation).abs(), -1.0)
        rows, vectors = [], {point: list[Tensor]() for point in ("written", *norms)}
        for flat in order.flatten().topk(min(top_k, int(batch.mask.sum()))).indices.tolist():
            example, position = divmod(flat, order.shape[1])
            row = {"example": batch.start + example, "position": position}
            row |= {"token": text_of(model, [int(batch.tokens[example, position])]), "context": _context(model, batch, example, position)}
            row |= {"activation": float(activation[example, position])}
            row |= {} if counterpart is None else {"reference": float(counterpart[example, position])}
            rows.append(row | {"relevance": float(relevance[example, position])})
            vectors["written"].append(output.to(activation))
            for point, inputs in norms.items():
                vectors[point].append(inputs[example, position])
        found = Strongest(pd.DataFrame(rows), {point: torch.stack(listed) for point, listed in vectors.items()})
        strongest = found.merge(strongest, by, top_k)
        total, n = total + float(relevance.double().sum()), n + len(relevance)
    assert strongest is not None
    logits = direct(strongest.vectors["written"], strongest.vectors).mean(0)
    return NeuronDescription(layer, neuron, total / n, n, strongest.rows, pd.DataFrame(extremes(model, logits)))


def _context(model: TransformerBridge, batch: Batch, example: int, position: int, before: int = 8, after: int = 3) -> str:
    """The words around a token, which stands between « and »."""
    tokens, real = batch.tokens[example], batch.mask[example].bool()
    spans = (slice(max(0, position - before), position), slice(position, position + 1), slice(position + 1, position + after + 1))
    left, here, right = (text_of(model, tokens[span][real[span]].tolist()).strip() for span in spans)
    return f"{left} «{here}» {right}".strip()
