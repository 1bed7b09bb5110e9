"""How far the effect of patching a node of a flow graph can be from what its relevance says: an interval for heads, MLPs and embeddings.

Edges have none: what patching an edge alone does was measured nowhere here, so that no width could be chosen for them.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import COMPONENTS, Node
from analyses.evaluation.reliability import reliability
from analyses.graph.tables import EVERYWHERE
from analyses.methods.base import points
from analyses.methods.combined_method import centre, estimates_at
from analyses.tasks import PromptPairs

KINDS = {"embed": "resid", "heads": "heads", "mlp": "mlp"}
"""Nodes that have an interval, and the kind of component whose width it has: what the embeddings write is the first residual stream."""


def node_intervals(model: TransformerBridge, pairs: PromptPairs, *, by_position: bool) -> pd.DataFrame:
    """Where the effect of patching a node alone, in the mean of both directions, is expected.

    As `rank_heads` gives it (see `evaluation.reliability`): around the estimate of `combined`, which for heads is not the relevance itself.
    So the score of a head may lie outside its interval: it is a share of all that changed together. Costs 4 forward and 3 backward passes.

    Args:
        pairs: a single pair.
        by_position: an interval for each position, or one for all of them together.

    Returns:
        Columns node, position, low, high (in the units of the target) and reliable.
    """
    names = {"embed": [COMPONENTS["resid"].read_at(0)], **{kind: points(model, [kind]) for kind in ("heads", "mlp")}}
    wanted = [name for of_kind in names.values() for name in of_kind]
    estimates = estimates_at(model, pairs, wanted, wanted)
    frames = []
    for node, kind in KINDS.items():
        scores = {
            estimate: torch.stack([_by_position(at(name)) for name in names[node]]) for estimate, at in estimates.items()
        }  # [layer, pos, unit]
        if not by_position:
            scores = {estimate: values.sum(1, keepdim=True) for estimate, values in scores.items()}
        middle = centre({estimate: {kind: values} for estimate, values in scores.items()})[kind].double().numpy()
        around = np.stack([values.double().numpy().ravel() for values in scores.values()])
        found = reliability(kind, middle.ravel(), around)
        layer, position, unit = (index.ravel() for index in np.indices(middle.shape))
        frames.append(
            pd.DataFrame(
                {
                    "node": [_name(node, *place) for place in zip(layer.tolist(), unit.tolist(), strict=True)],
                    "position": position if by_position else EVERYWHERE,
                    "low": found.low,
                    "high": found.high,
                    "reliable": found.reliable,
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def _by_position(estimate: Tensor) -> Tensor:
    """[pos, unit] of the only row: of z a unit is a head, of what is written there is one."""
    summed = estimate[0].sum(-1)
    return summed if summed.ndim == 2 else summed.unsqueeze(1)


def _name(node: str, layer: int, unit: int) -> str:
    return node if node == "embed" else str(Node(node, layer, head=unit if node == "heads" else None))
