"""What the embedded model can do and where it does it, in figures."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from analyses.embedded.corpus import held_out_pairs, training_pairs
from analyses.tasks import PromptPairs, induction, ioi
from lens_relevance.inputs.targets import TokenTarget


def figures(model: TransformerBridge, n: int = 400, seed: int = 1) -> dict[str, Any]:
    """Accuracies, the share of the noising effect that each head carries alone, and accuracy without the head that carries most.

    Two accuracies: `argmax` over the vocabulary, and `answer_over_wrong`, the answer's logit above the wrong name's.
    """
    held_out = ioi(model, n, seed, name_pairs=held_out_pairs())
    effects = head_effects(model, held_out)
    layer, head = divmod(int(effects.argmax()), effects.shape[1])
    result: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.original_model.parameters()),
        "ioi_held_out_pairs": accuracies(model, held_out),
        "ioi_training_pairs": accuracies(model, ioi(model, n, seed, name_pairs=training_pairs())),
        "induction": accuracies(model, induction(model, n, seed)),
        "head_noising_effects": [[round(float(share), 3) for share in row] for row in effects],
        "best_head": f"{layer}.{head}",
    }
    for kind in ("corrupt", "mean"):
        result[f"without_best_head_{kind}"] = accuracies(model, held_out, without=(layer, head), kind=kind)
    return result


@torch.no_grad()
def accuracies(
    model: TransformerBridge, pairs: PromptPairs, without: tuple[int, int] | None = None, *, kind: str = "mean"
) -> dict[str, float]:
    """Accuracy on the clean prompts, or with one head (layer, head) set to its values on the corrupt prompts or to their mean."""
    if without is None:
        logits = model(pairs.clean)
    else:
        values = _head_outputs(model, pairs)
        logits = _with_head_replaced(model, pairs, *without, {"corrupt": values, "mean": values.mean(1, keepdim=True)}[kind])
    correct = logits[:, -1].argmax(-1) == cast(TokenTarget, pairs.target).answer
    difference = pairs.metric(model)(logits)
    return {"argmax": round(float(correct.float().mean()), 4), "answer_over_wrong": round(float((difference > 0).float().mean()), 4)}


@torch.no_grad()
def head_effects(model: TransformerBridge, pairs: PromptPairs) -> Float[Tensor, "layer head"]:
    """(m(clean) - m(clean, head set to its corrupt value)) / (m(clean) - m(corrupt)), m averaged over pairs; all positions of the head."""
    metric = pairs.metric(model)
    clean, corrupt = metric(model(pairs.clean)).mean(), metric(model(pairs.corrupt)).mean()
    values = _head_outputs(model, pairs)
    effects = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)
    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            noised = metric(_with_head_replaced(model, pairs, layer, head, values)).mean()
            effects[layer, head] = (clean - noised) / (clean - corrupt)
    return effects


def _head_outputs(model: TransformerBridge, pairs: PromptPairs) -> Float[Tensor, "layer n pos head d_head"]:
    _, cache = model.run_with_cache(pairs.corrupt, names_filter=lambda name: name.endswith("attn.hook_z"))
    return torch.stack([cache[f"blocks.{layer}.attn.hook_z"] for layer in range(model.cfg.n_layers)])


def _with_head_replaced(
    model: TransformerBridge, pairs: PromptPairs, layer: int, head: int, values: Float[Tensor, "layer b pos head d_head"]
) -> Float[Tensor, "n pos d_vocab"]:
    """Logits of the clean prompts with one head's output set to `values`."""

    def replace_head(z: Tensor, hook: HookPoint) -> Tensor:
        z = z.clone()
        z[:, :, head] = values[layer, :, :, head]
        return z

    logits = model.run_with_hooks(pairs.clean, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", replace_head)])
    return cast(Tensor, logits)
