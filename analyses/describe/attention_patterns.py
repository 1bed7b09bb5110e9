"""How much of each head's attention goes where previous-token, duplicate-token and induction heads look."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import head_detector
from transformer_lens.model_bridge import TransformerBridge

from analyses.datasets.batches import batches
from analyses.tasks import PromptPairs
from lens_relevance.attention_methods.run import check_patterns
from lens_relevance.hooks.model_state import left_as_found
from lens_relevance.inputs.prompt import Inputs
from lens_relevance.logit_reading import without_logits
from lens_relevance.sites import anatomy

# The patterns are TransformerLens's. Its detect_head itself takes text alone, one prompt and one kind of head per forward; here token ids
# and padded batches work too, and one forward serves all kinds.
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "previous_token": head_detector.get_previous_token_head_detection_pattern,
    "duplicate_token": head_detector.get_duplicate_token_head_detection_pattern,
    "induction": head_detector.get_induction_head_detection_pattern,
}


@torch.no_grad()
@left_as_found
def pattern_scores(model: TransformerBridge, prompts: PromptPairs | Inputs) -> pd.DataFrame:
    """Scores of `transformer_lens.head_detector.detect_head` (error_measure "mul"), averaged over prompts (the clean ones of pairs).

    Columns: layer, head, and from 0 to 1 the share of the head's attention, over all queries, that falls on
        previous_token: the token before;
        duplicate_token: earlier occurrences of the query's own token;
        induction: tokens that came right after those. It needs prompts with repetitions: without any it is 0 for every head.

    Raises:
        CoverageError: a model without attention patterns at a HookPoint.
    """
    model_anatomy = anatomy(model)
    check_patterns(model_anatomy, model)
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model_anatomy.n_layers)]
    total, count = torch.zeros(()), 0
    for batch in batches(model, prompts):
        with without_logits(model, batch.tokens):
            _, cache = model.run_with_cache(batch.tokens, names_filter=names, attention_mask=batch.mask)
        for row, real in enumerate(batch.mask.bool()):
            patterns = torch.stack([cache[name][row][:, real][:, :, real] for name in names])
            total, count = total + _scores(patterns, batch.tokens[row, real]).cpu(), count + 1
    mean = total / count
    layers, heads = (axis.flatten().tolist() for axis in torch.meshgrid(*map(torch.arange, mean.shape[:2]), indexing="ij"))
    return pd.DataFrame({"layer": layers, "head": heads, **{kind: mean[..., i].flatten().tolist() for i, kind in enumerate(KINDS)}})


def _scores(patterns: Float[Tensor, "layer head query key"], tokens: Tensor) -> Float[Tensor, "layer head kind"]:
    """One prompt's scores for every head of the model."""
    looked_for = torch.stack([kind(tokens.unsqueeze(0).cpu()) for kind in KINDS.values()]).to(patterns)
    return torch.einsum("lhqk,nqk->lhn", patterns, looked_for) / patterns.sum((-1, -2)).unsqueeze(-1)
