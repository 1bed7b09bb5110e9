"""What heads, MLPs and neurons write in one run, in words: the tokens that each raises most by the straight way to the logits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import Node, parse_node
from analyses.datasets.batches import text_of
from analyses.describe.direct_logits import DirectLogits, head_output_weight, neuron_output_weight
from analyses.edges.wiring import Layer, wiring
from lens_relevance.errors import CoverageError, RelevanceError
from lens_relevance.hooks.model_state import left_as_found
from lens_relevance.inputs.prompt import Inputs, tokenize
from lens_relevance.logit_reading import without_logits

WRITERS = ("heads", "mlp", "neurons")


@dataclass(frozen=True)
class Written:
    """What units write, and where heads look.

    Attributes:
        tokens: by unit and position (`L11H3@14`, `L9N1841@4`): the tokens it raises most, in the order of their direct logits, quoted.
        attention: columns node, position, source_position, attention: the strongest entries of the pattern of each head.
    """

    tokens: dict[str, str] = field(default_factory=dict)
    attention: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=["node", "position", "source_position", "attention"]))


@left_as_found
def written_tokens(model: TransformerBridge, inputs: Inputs, nodes: Iterable[str | Node], *, top: int = 3, sources: int = 5) -> Written:
    """Describe units at positions of one prompt by what they write there in this run.

    The vector is what the unit adds to the residual stream: z W_O of a head, a neuron's activation times its output weights, an MLP's whole
    output, biases included. Direct logits are as in `describe_head` (`DirectLogits`): later layers stay out.

    Args:
        inputs: a single prompt, as for `propagate`.
        nodes: heads, MLPs and neurons, each at a position: `L11H3@14`, `L3.mlp@7`, `L9N1841@4`.
        top: how many tokens each.
        sources: how many source positions of each head's attention.

    Raises:
        RelevanceError: several prompts, or a node of another kind, without a position, or out of range.
        CoverageError: a model whose output head is not linear, or without the weights of single units.
    """
    tokens, mask = tokenize(model, inputs)
    if len(tokens) != 1:
        raise RelevanceError(f"units are described on one prompt, got {len(tokens)}")
    of_layer: defaultdict[tuple[int, str], list[Node]] = defaultdict(list)
    layers = wiring(model).layers
    for given in nodes:
        node = given if isinstance(given, Node) else parse_node(given)
        _check(node, len(layers), tokens.shape[1])
        of_layer[node.layer, "attn" if node.component == "heads" else "mlp"].append(node)
    direct = {key: DirectLogits(model, *key) for key in of_layer}
    names = {name for one in direct.values() for name in one.norms}
    for layer, kind in of_layer:
        names |= {f"blocks.{layer}.attn.hook_{name}" for name in ("z", "pattern")} if kind == "attn" else set()
        names |= {layers[layer].mlp_output, f"blocks.{layer}.mlp.hook_post"} if kind == "mlp" else set()
    with torch.no_grad(), without_logits(model, tokens):
        _, cache = model.run_with_cache(tokens, names_filter=sorted(names), attention_mask=mask)
    said: dict[str, str] = {}
    for (layer, kind), units in of_layer.items():
        vectors = torch.stack([_vector(model, cache, node, layers[layer]) for node in units])
        at = torch.tensor([node.position for node in units])
        norms = {name: cache[name][0, at] for name in direct[layer, kind].norms}
        best = direct[layer, kind](vectors, norms).topk(top).indices.tolist()
        said |= {str(node): " ".join(repr(text_of(model, [token])) for token in row) for node, row in zip(units, best, strict=True)}
    heads = [node for units in of_layer.values() for node in units if node.component == "heads"]
    return Written(said, _attention(cache, heads, sources))


def _check(node: Node, n_layers: int, n_pos: int) -> None:
    if node.component not in WRITERS or node.position is None:
        raise RelevanceError(f"{node} is no head, MLP or neuron at a position, such as L11H3@14, L3.mlp@7 or L9N1841@4")
    if not 0 <= node.layer < n_layers or node.position >= n_pos:
        raise RelevanceError(f"{node} is out of range: the model has {n_layers} layers and the prompt {n_pos} positions")


def _vector(model: TransformerBridge, cache: ActivationCache, node: Node, layer: Layer) -> Float[Tensor, " d_model"]:
    """What a unit adds to the stream at its position."""
    if node.component == "mlp":
        return cache[layer.mlp_output][0, node.position]
    if node.component == "neurons":
        weight, activations = neuron_output_weight(model, node.layer), cache[f"blocks.{node.layer}.mlp.hook_post"][0, node.position]
        index, kind = node.neuron, "neurons"
    else:
        activations = cache[f"blocks.{node.layer}.attn.hook_z"][0, node.position]
        index, kind = node.head, "heads"
    assert index is not None
    if index >= len(activations):
        raise RelevanceError(f"{node} is out of range: the layer has {len(activations)} {kind}")
    if kind == "neurons":
        return activations[index] * weight[:, index].to(activations)
    return head_output_weight(model, node.layer, index, n_heads=len(activations)).to(activations) @ activations[index]


def _attention(cache: ActivationCache, heads: list[Node], sources: int) -> pd.DataFrame:
    rows = []
    for node in heads:
        name = f"blocks.{node.layer}.attn.hook_pattern"
        pattern = cache[name] if name in cache else None
        if pattern is None:
            raise CoverageError(f"blocks.{node.layer} shows no attention pattern on this model")
        row = pattern[0, node.head, node.position].float()
        for source in row.topk(min(sources, len(row))).indices.tolist():
            if row[source] > 0:
                head = str(Node("heads", node.layer, head=node.head))
                rows.append({"node": head, "position": node.position, "source_position": source, "attention": float(row[source])})
    return pd.DataFrame(rows, columns=["node", "position", "source_position", "attention"])
