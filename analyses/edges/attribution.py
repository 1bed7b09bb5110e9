"""attribute_edges: the relevance of every edge from writer to reader, at every position, from one backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.edges.dictionaries import Units
from analyses.edges.heads import Constants, HeadCoefficients, head_coefficients, rotary_constants
from analyses.edges.in_the_stream import InTheStream
from analyses.edges.readers import attention_readers
from analyses.edges.residual_stream import ResidualStream
from analyses.edges.wiring import Wiring, points, wiring
from analyses.edges.writers import attention_writes, mlp_writes, sources
from lens_relevance.cache import RelevanceCache
from lens_relevance.defaults import with_defaults
from lens_relevance.engine import propagate
from lens_relevance.errors import CoverageError
from lens_relevance.hooks.model_state import left_as_found
from lens_relevance.inputs.prompt import Inputs, Prompt, tokenize
from lens_relevance.inputs.references import reference_run
from lens_relevance.inputs.targets import AnyTarget
from lens_relevance.rules.base import working
from lens_relevance.ruleset_tables import Table, rule_for, ruleset


@dataclass(frozen=True, eq=False)
class EdgeAttribution:
    """Signed relevance of every edge. Units are those of the target.

    Attributes:
        writers, readers: their names, see `analyses.edges.wiring`.
        scores: [batch, pos, writer, reader]; 0 where there is no edge.
        exists: [writer, reader], whether the reader comes after the writer.
        writer_scores: [batch, pos, writer], contribution times the coefficient where it is written; equals the sum over readers.
        reader_scores: [batch, pos, reader], relevance that enters a reader; equals the sum over writers.
        value: [batch], the target; reference_value: the same on the reference run.
        tokens, mask: token ids and 1 where they are real.
        info: model, ruleset, target, reference and versions.
        units: of the dictionaries that stand in the stream.
    """

    writers: list[str]
    readers: list[str]
    scores: Float[Tensor, "batch pos writer reader"]
    exists: Bool[Tensor, "writer reader"]
    writer_scores: Float[Tensor, "batch pos writer"]
    reader_scores: Float[Tensor, "batch pos reader"]
    value: Float[Tensor, " batch"]
    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    reference_value: Float[Tensor, " batch"] | None = None
    info: dict[str, str] = field(default_factory=dict)
    units: tuple[Units, ...] = ()

    @property
    def n_edges(self) -> int:
        """Edges per position, those of the bias included."""
        return int(self.exists.sum())

    def to_frame(self, example: int = 0) -> pd.DataFrame:
        """The edges of one example: columns source, target, position, score, strongest first."""
        writer, reader = self.exists.nonzero(as_tuple=True)
        values = self.scores[example][:, writer, reader].double().cpu().numpy()
        position, edge = np.indices(values.shape)
        frame = pd.DataFrame(
            {
                "source": pd.Categorical.from_codes(writer.numpy()[edge.ravel()], categories=pd.Index(self.writers)),
                "target": pd.Categorical.from_codes(reader.numpy()[edge.ravel()], categories=pd.Index(self.readers)),
                "position": position.ravel(),
                "score": values.ravel(),
            }
        )
        return frame.iloc[np.argsort(-np.abs(values.ravel()), kind="stable")].reset_index(drop=True)


@left_as_found
def attribute_edges(
    model: TransformerBridge,
    inputs: Inputs,
    target: AnyTarget | None = None,
    *,
    rules: str | Table | None = None,
    reference: Any = None,
    attention_mask: Shaped[Tensor, "batch pos"] | None = None,
) -> EdgeAttribution:
    """The relevance of every edge of the residual stream: u . g_v, or (u - u_reference) . g_v where there is a reference.

    u is what a writer contributes and g_v the coefficient at the reader's own input, which comes from its q, k, v (MLP input, logits)
    through the weights and the norm's rule. Arguments are those of `propagate`; the denoising estimate that TransformerLens's
    `attribution_patch(granularity="edge")` gives is that of `attribute_edges(corrupt, reference=clean)` with the sign turned. A reference
    of several runs (`random_tokens(8)`) is averaged, one backward pass each.

    With a post-norm (Gemma2, OLMo2) a contribution is the writer's part of the norm's output under the norm's rule; where the stream itself
    passes norms (BERT), every contribution in it does.

    Source: EAP (Syed et al. 2023, arXiv 2310.10348), with coefficients of a ruleset in place of gradients; that the scores add up exactly
    is ours.

    Args:
        inputs, target, rules, reference, attention_mask: as for `propagate`.

    Raises:
        RelevanceError: bad input.
        CoverageError: a model whose residual stream is not the sum of what is known to be written.
    """
    tokens, mask = tokenize(model, inputs, attention_mask)
    rules, reference = with_defaults(model, Prompt(tokens, mask), rules, reference=reference)
    table, streams = ruleset(rules), wiring(model)
    results = [
        edges_of(streams, cache, constants, table=table)[0]
        for cache, constants in passes(model, streams, tokens, target=target, rules=rules, reference=reference, attention_mask=mask)
    ]
    return results[0] if len(results) == 1 else _mean(results)


def passes(
    model: TransformerBridge,
    streams: Wiring,
    inputs: Inputs,
    *,
    target: AnyTarget | None,
    rules: str | Table,
    reference: Any,
    attention_mask: Shaped[Tensor, "batch pos"] | None = None,
    flows: bool = False,
) -> Iterator[tuple[RelevanceCache, Constants]]:
    """One backward pass per reference run, with everything kept that edges need, through the dictionaries that stand in the stream.

    Args:
        flows: also keep what flows inside heads and MLPs need.
        inputs, target, rules, reference, attention_mask: as for `propagate`.

    Raises:
        CoverageError: the model lacks something that edges need.
    """
    if flows and all(site.name != "unembed" for site in streams.body.sites):
        raise CoverageError("flows end at the logits of tokens (unembed), and this model has none: it gives classes or a hidden state")
    wanted = set(points(streams, flows))
    tokens, mask = tokenize(model, inputs, attention_mask)
    references, dictionaries = [reference], [one.dictionary for one in streams.dictionaries]
    if getattr(reference, "n", 1) > 1:
        runs = reference_run(model, reference, Prompt(tokens, mask))
        references = [runs.prompt.tokens[i :: runs.n] for i in range(runs.n)]
    for each in references:
        with rotary_constants(streams) as constants:
            cache = propagate(
                model,
                tokens,
                target,
                rules=rules,
                names_filter=lambda name: name in wanted,
                reference=each,
                attention_mask=mask,
                dictionaries=dictionaries,
            )
        missing = sorted(wanted - set(cache.coefficients))
        if missing:
            raise CoverageError(f"edges need {', '.join(missing[:3])}, but {cache.absent.get(missing[0], 'it was not kept')}")
        yield cache, constants


def edges_of(
    streams: Wiring, cache: RelevanceCache, constants: Constants, *, table: Table, flows: bool = False, values: RelevanceCache | None = None
) -> tuple[EdgeAttribution, list[HeadCoefficients]]:
    """Edges from one backward pass, walking up the layers, and what happens inside the heads of each.

    Args:
        streams: who writes and who reads.
        cache: the pass whose coefficients count; it holds what `passes` asks for.
        constants: see `rotary_constants`.
        table: the rules of that pass.
        flows: also what passes inside heads.
        values: another pass whose contributions meet the coefficients of `cache` (integrated gradients).
    """
    inside, values = [], cache if values is None else values
    with torch.no_grad():
        stream = ResidualStream(streams, cache, values)
        dictionaries = InTheStream(stream, streams.dictionaries, cache, table)
        dictionaries.write(sources(streams, values, cache, table=table), 0, "in")
        for layer in streams.layers:
            if layer.index > 0:
                dictionaries.write_anew(layer.index, "in")
            heads = head_coefficients(layer, cache, table, constants=constants, flows=flows)
            inside.append(heads)
            stream.read(layer.attn_readers, attention_readers(layer, cache, table, heads=heads), layer.attn_input)
            if layer.has_mlp and layer.parallel:  # reads what attention reads
                dictionaries.read_mlp(layer, replaced=streams.replaces_mlp(layer))
            dictionaries.write(attention_writes(layer, values, cache, table=table), layer.index, "attn")
            if layer.attn_after is not None:
                stream.normalize(layer.attn_after, rule_for(table, layer.attn_after))
            if layer.has_mlp:
                if not layer.parallel:
                    dictionaries.read_mlp(layer, replaced=streams.replaces_mlp(layer))
                if streams.replaces_mlp(layer):
                    dictionaries.write_mlp(layer)
                else:
                    dictionaries.write(mlp_writes(layer, values, cache, table=table), layer.index, "after_mlp")
                if layer.mlp_after is not None:
                    stream.normalize(layer.mlp_after, rule_for(table, layer.mlp_after))
            dictionaries.write_anew(layer.index, "out")
        stream.read(["logits"], working(cache.coefficients[streams.final]).unsqueeze(0), streams.final)
    available = streams.available()
    limit = torch.tensor([available[name] for name in streams.readers])
    edges = EdgeAttribution(
        writers=streams.writers,
        readers=streams.readers,
        scores=stream.scores,
        exists=torch.arange(len(streams.writers)).unsqueeze(1) < limit,
        writer_scores=stream.writer_scores,
        reader_scores=stream.reader_scores,
        value=cache.value,
        tokens=cache.input_tokens,
        mask=cache.mask,
        reference_value=cache.reference_value,
        info=dict(cache.info),
        units=tuple(dictionaries.units.values()),
    )
    return edges, inside


def _mean(results: list[EdgeAttribution]) -> EdgeAttribution:
    """Edges averaged over several references of the same inputs."""

    def mean(name: str) -> Tensor:
        return torch.stack([getattr(r, name) for r in results]).mean(0)

    info = results[0].info | {"reference": f"mean over {len(results)} references"}
    return replace(
        results[0],
        scores=mean("scores"),
        writer_scores=mean("writer_scores"),
        reader_scores=mean("reader_scores"),
        reference_value=mean("reference_value"),
        info=info,
    )
