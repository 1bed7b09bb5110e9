"""Why an encoder finds two texts similar: the cosine between a text's mean-pooled output and an embedding that is held fixed.

    texts = ["A cat sat on the mat.", "A kitten was lying on the rug."]
    embeddings = sentence_embeddings(model, texts)
    cache = propagate(model, texts, similarity(embeddings.flip(0)))     # each text against the other

The last step of such a model is a norm and a product: cos = sum_i e_i a_i / |a|, with a the mean over a text's tokens and e the other
text's embedding, of length 1. The norm is that of an RMSNorm without weight (|a| = sqrt(d) rms(a)) and gets its rules: with one run its
length is a constant (LN-rule, Ali et al. 2022), so that the relevance of the text's tokens adds up to the cosine; between two runs the pair
form, so that it adds up to the difference of the cosines, exactly. (The plain gradient of a cosine adds up to zero on every text, because
scaling `a` does not change it. A target of your own, as a function of the output, is differentiated as it stands.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from lens_relevance.errors import RelevanceError
from lens_relevance.hooked_model import HookedModel
from lens_relevance.inputs.metrics import Metric
from lens_relevance.inputs.prompt import Inputs, read_inputs
from lens_relevance.inputs.targets import Target
from lens_relevance.rules import Norm, PairNorm, Reference

Embeddings = Float[Tensor, "*batch d_model"]


@torch.no_grad()
def sentence_embeddings(
    model: HookedModel, inputs: Inputs, attention_mask: Shaped[Tensor, "batch pos"] | None = None
) -> Float[Tensor, "batch d_model"]:
    """The mean of an encoder's last hidden state over each text's real tokens, [CLS] and [SEP] included.

    Args:
        model: A bridge whose output is the last hidden state, as from `analyses.bridge_encoder`.
        inputs: As for `propagate`.
        attention_mask: 1 where a token is real, for padded ids.
    """
    prompt = read_inputs(model, inputs, attention_mask)
    return _mean(prompt.call(model), prompt.mask)


def similarity(embeddings: Embeddings) -> Similarity:
    """The cosine between each text's embedding and a given one; needs an encoder without a head (see `sentence_embeddings`).

    embeddings: [d_model], or one per text [batch, d_model], of any length. Units: cosine, from -1 to 1.

    Source: ours.
    """
    return Similarity(embeddings)


@dataclass(frozen=True, eq=False)
class Similarity(Target):
    """The cosine with fixed embeddings; built by `similarity`."""

    embeddings: Embeddings

    def metric(
        self, model: HookedModel, tokens: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"] | None = None
    ) -> Metric:
        if self.embeddings.ndim > 2 or (self.embeddings.ndim == 2 and len(self.embeddings) != len(tokens)):
            raise RelevanceError(
                f"similarity: embeddings of shape {list(self.embeddings.shape)} for {len(tokens)} text(s); give one for each"
            )
        return Cosine(self.embeddings, torch.ones_like(tokens) if attention_mask is None else attention_mask)

    def select(self, rows: Any) -> Similarity:
        return self if self.embeddings.ndim == 1 else replace(self, embeddings=self.embeddings[rows])


class Cosine(Metric):
    """cos(mean over real tokens, embedding), from the last hidden state [batch, pos, d_model] to [batch]; the length of the mean is a
    constant in its gradient."""

    def __init__(self, embeddings: Embeddings, mask: Int[Tensor, "batch pos"]) -> None:
        self.embeddings, self.mask = embeddings, mask

    def __call__(self, hidden: Tensor) -> Tensor:
        mean = _mean(hidden, self.mask)
        return (mean * self._unit(mean)).sum(-1) / mean.detach().norm(dim=-1)

    def pair_coefficients(self, logits: Float[Tensor, "batch pos d_model"], reference: Tensor) -> Float[Tensor, "batch pos d_model"]:
        """The norm's pair form, spread over the tokens of the mean: exact."""
        one, other = _mean(logits, self.mask), _mean(reference, self.mask)
        norm, rule = Norm(None, None, eps=0.0, centred=False), PairNorm()
        kept = rule.keep(norm, (one,), norm(one), Reference((other,), norm(other)))
        (coefficient,) = rule.backward(norm, kept, self._unit(one) / one.shape[-1] ** 0.5)
        assert coefficient is not None
        weights = self.mask.to(logits) / self.mask.sum(1, keepdim=True).to(logits)
        return weights.unsqueeze(-1) * coefficient.to(logits.dtype).unsqueeze(1)

    def _unit(self, mean: Tensor) -> Tensor:
        if self.embeddings.shape[-1] != mean.shape[-1]:
            raise RelevanceError(
                f"similarity: the embeddings have {self.embeddings.shape[-1]} features, the model's output {mean.shape[-1]}; it takes "
                "a model whose output is its last hidden state (analyses.bridge_encoder), and embeddings of the same model"
            )
        return torch.nn.functional.normalize(self.embeddings.to(mean), dim=-1)


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Over real positions, [batch, d_model]."""
    if hidden.shape[:2] != mask.shape or hidden.ndim != 3:
        raise RelevanceError(f"an embedding is the mean of an output [batch, pos, d_model], and this model's is {list(hidden.shape)}")
    mask = mask.to(hidden)
    return (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
