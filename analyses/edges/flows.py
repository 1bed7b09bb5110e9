"""All flows of one prompt: edges of the stream, what passes inside heads and MLPs, and what stays behind, node by node.

For every head and MLP, its score is the sum of the edges that enter it plus its sinks, and the sum of the edges that leave it. For every
reader, the sum of the edges that leave it is its score (the relevance that enters it) plus its sinks. For the logits, the score is the sum
of the edges that enter plus the sinks. A feature is one node that reads and writes: its score is the sum of what enters it plus its sinks,
and the sum of what leaves it. What a dictionary misses has no edges that enter it: relevance ends there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from analyses.edges.attribution import EdgeAttribution
from analyses.edges.dictionaries import Units
from analyses.edges.heads import HeadCoefficients
from analyses.edges.wiring import Layer, Wiring, linear
from lens_relevance.cache import RelevanceCache
from lens_relevance.rules.base import share, working
from lens_relevance.sites import Site

Names = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Flows:
    """Scores of one prompt.

    Attributes:
        edges: by (kind, sources, targets): `residual` [pos, writer, reader]; `within` a position [name, pos]; `between` positions
            [name, destination, source], where sources and targets are given name by name.
        nodes: by names, [name, pos].
        sinks: by (kind, names), [name, pos]; kinds are bias, norm, softmax, product, activation (of a mixture of experts: all that stays
            inside it).
        neurons: by MLP, [pos, neuron].
        activations: by features, [name, pos].
        value: the target, less that of the reference run.
        info: model, ruleset, target, reference and versions.
    """

    edges: dict[tuple[str, Names, Names], Tensor]
    nodes: dict[Names, Tensor]
    sinks: dict[tuple[str, Names], Tensor]
    neurons: dict[str, Tensor]
    activations: dict[Names, Tensor]
    value: float
    info: dict[str, str]


def flows_of(wiring: Wiring, cache: RelevanceCache, edges: EdgeAttribution, *, heads: list[HeadCoefficients]) -> Flows:
    """The flows of the first row of a pass that kept them (`passes(..., flows=True)`)."""
    reader = {name: i for i, name in enumerate(edges.readers)}
    entering = edges.reader_scores[0].T
    value = edges.value[0] - (0.0 if edges.reference_value is None else edges.reference_value[0])
    flows = Flows(
        edges={("residual", tuple(edges.writers), tuple(edges.readers)): edges.scores[0]},
        nodes={tuple(edges.writers): edges.writer_scores[0].T},
        sinks={},
        neurons={},
        activations={},
        value=float(value),
        info={key: str(text) for key, text in edges.info.items()},
    )
    writers = set(edges.writers)
    only_read = [name for name in edges.readers if name != "logits" and name not in writers]
    flows.nodes[tuple(only_read)] = entering[[reader[name] for name in only_read]]
    for units in edges.units:
        _features(flows, units, entering[[reader[name] for name in units.standing.readers]])
    for layer, inside in zip(wiring.layers, heads, strict=True):
        _heads(flows, layer, cache, inside, entering[[reader[name] for name in layer.attn_readers]])
        if layer.has_mlp and not wiring.replaces_mlp(layer):
            _mlp(flows, layer, cache, edges, entering[[reader[name] for name in layer.mlp_reader]])
    at_logits = cache["unembed.hook_out"].sum(-1)
    flows.nodes["logits",] = at_logits
    unembed = next(site for site in wiring.body.sites if site.name == "unembed")
    bias = _bias(unembed, cache)
    flows.sinks["bias", ("logits",)] = bias
    flows.sinks["norm", ("logits",)] = at_logits - entering[-1:] - bias
    return flows


def _heads(flows: Flows, layer: Layer, cache: RelevanceCache, inside: HeadCoefficients, entering: Tensor) -> None:
    """Within and between positions, and the sinks of heads and of their readers. entering: [q of every head, k, v; pos]."""
    assert inside.from_q is not None and inside.from_k is not None and inside.from_v is not None
    assert inside.softmax is not None and inside.product is not None
    names = tuple(layer.heads)
    q, k, v = (tuple(f"{name}.{read}" for name in names) for read in "qkv")
    flows.edges["within", q, names] = inside.from_q[0]
    flows.edges["between", k, names] = inside.from_k[0]
    flows.edges["between", v, names] = inside.from_v[0]
    flows.sinks["softmax", names] = inside.softmax[0]
    flows.sinks["product", names] = inside.product[0]
    leaving = torch.cat([inside.from_q[0], inside.from_k[0].sum(1), inside.from_v[0].sum(1)])
    bias = torch.cat([_head_bias(site, c, cache) for site, c in ((layer.q, inside.q), (layer.k, inside.k), (layer.v, inside.v))])
    flows.sinks["bias", q + k + v] = bias
    flows.sinks["norm", q + k + v] = leaving - entering - bias


def _features(flows: Flows, units: Units, entering: Tensor) -> None:
    """The sinks of features, and their activations. entering: [reader, pos]."""
    names = tuple(units.standing.readers)
    scores, sinks = units.scores[:, 0], {kind: score[:, 0] for kind, score in units.sinks.items()}
    for kind, score in sinks.items():
        flows.sinks[kind, names] = score
    flows.sinks["norm", names] = scores - entering - sum(sinks.values())
    flows.activations[names[: len(units.standing.chosen)]] = units.activation[:, 0]


def _mlp(flows: Flows, layer: Layer, cache: RelevanceCache, edges: EdgeAttribution, entering: Tensor) -> None:
    """From the MLP's reader to the MLP. entering: [1, pos]."""
    name, into = tuple(layer.mlp_writer), tuple(layer.mlp_reader)
    score = edges.writer_scores[0, :, edges.writers.index(name[0])].unsqueeze(0)
    inputs = [] if layer.mlp is None else [str(p.name) for p in layer.mlp.inputs]
    linears = [s for s in (layer.mlp_gate, layer.mlp_in) if s is not None and s.output_name in inputs]
    bias = torch.stack([_bias(s, cache) for s in linears]).sum(0) if linears else torch.zeros_like(entering)
    if not linears:  # a mixture of experts, one step as a whole
        inputs = [f"{layer.path}.mlp.hook_in"]
    elif layer.mlp is not None:
        flows.neurons[name[0]] = cache[layer.mlp.output_name][0]
    leaving = torch.stack([cache[point].sum(-1) for point in inputs]).sum(0)
    flows.edges["within", into, name] = leaving
    flows.sinks["activation", name] = score - leaving
    flows.sinks["bias", into] = bias
    flows.sinks["norm", into] = leaving - entering - bias


def _bias(site: Site, cache: RelevanceCache) -> Tensor:
    """Share of a layer's bias, [1, pos]; none between two runs."""
    coefficient = working(cache.coefficients[site.output_name])
    bias = linear(site).bias
    if bias is None or cache.reference_activations:
        return torch.zeros_like(coefficient[..., 0])
    return share(bias.to(coefficient.dtype).expand_as(coefficient), coefficient).sum(-1)


def _head_bias(site: Site, coefficient: Tensor, cache: RelevanceCache) -> Tensor:
    """Share of the bias of q, k or v for each query head, [head, pos]."""
    bias = linear(site).bias
    if bias is None or cache.reference_activations:
        return torch.zeros_like(coefficient[0, :, :, 0].T)
    per_head = bias.to(coefficient.dtype).unflatten(0, (-1, coefficient.shape[-1]))
    per_head = per_head.repeat_interleave(coefficient.shape[2] // per_head.shape[0], 0)
    return torch.einsum("phe,he->hp", coefficient[0], per_head)
