"""CD-T against a GPT-2 and a BERT split by hand, where beta and gamma are both carried along and add up to the model's own activations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from analyses.benchmarks.tiny_models import build
from analyses.methods import cd_t, estimator
from analyses.perturbation import areas, passes, perturbation_curves
from lens_relevance import CoverageError, RelevanceError, log_prob, logit, logit_diff
from tests import models
from tests.classifiers import build_classifier
from tests.encoder_decoders import build_encoder_decoder, sources_and_targets
from tests.precision import no_upcasts

Split = tuple[Tensor, Tensor]


def biased(beta: Tensor, gamma: Tensor, bias: Tensor, of: Split) -> Split:
    """The bias in proportion to the sizes of two tensors."""
    part = of[0].abs() / (of[0].abs() + of[1].abs())
    part = part.nan_to_num(0.0)
    return beta + bias * part, gamma + bias * (1 - part)


def linear(x: Split, weight: Tensor, bias: Tensor) -> Split:
    mapped = (x[0] @ weight.T, x[1] @ weight.T)
    return biased(*mapped, bias, mapped)


def norm(x: Split, weight: Tensor, bias: Tensor, eps: float) -> Split:
    std = ((x[0] + x[1]).var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    return biased(*((one - one.mean(-1, keepdim=True)) / std * weight for one in x), bias, x)


def activated(x: Split, function) -> Split:
    return function(x[0] + x[1]) - function(x[1]), function(x[1])


def attended(q: Split, k: Split, v: Split, heads: int, *, causal: bool) -> Split:
    q, k = (sum(x).unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    return tuple((scores.softmax(-1) @ x.unflatten(-1, (heads, -1)).transpose(0, 1)).transpose(0, 1).flatten(1) for x in v)


def added(x: Split, y: Split) -> Split:
    return x[0] + y[0], x[1] + y[1]


def gpt2(w: dict[str, Tensor], x: Split) -> Split:
    """Logits at the last position."""
    for i in range(2):
        at = f"transformer.h.{i}"
        normed = norm(x, w[f"{at}.ln_1.weight"], w[f"{at}.ln_1.bias"], 1e-5)
        joint = zip(w[f"{at}.attn.c_attn.weight"].T.chunk(3), w[f"{at}.attn.c_attn.bias"].chunk(3), strict=True)
        z = attended(*(linear(normed, *one) for one in joint), 4, causal=True)
        x = added(x, linear(z, w[f"{at}.attn.c_proj.weight"].T, w[f"{at}.attn.c_proj.bias"]))
        normed = norm(x, w[f"{at}.ln_2.weight"], w[f"{at}.ln_2.bias"], 1e-5)
        hidden = activated(linear(normed, w[f"{at}.mlp.c_fc.weight"].T, w[f"{at}.mlp.c_fc.bias"]), lambda y: gelu(y, approximate="tanh"))
        x = added(x, linear(hidden, w[f"{at}.mlp.c_proj.weight"].T, w[f"{at}.mlp.c_proj.bias"]))
    final = norm(x, w["transformer.ln_f.weight"], w["transformer.ln_f.bias"], 1e-5)
    return tuple(one[-1] @ w["transformer.wte.weight"].T for one in final)


def bert(w: dict[str, Tensor], x: Split) -> Split:
    """Logits of the classes."""
    for i in range(2):
        at = f"bert.encoder.layer.{i}"

        def dense(name: str, y: Split, at: str = at) -> Split:
            return linear(y, w[f"{at}.{name}.weight"], w[f"{at}.{name}.bias"])

        z = attended(*(dense(f"attention.self.{name}", x) for name in ("query", "key", "value")), 4, causal=False)
        names = [f"{at}.attention.output.LayerNorm.{part}" for part in ("weight", "bias")]
        x = norm(added(dense("attention.output.dense", z), x), *(w[name] for name in names), 1e-12)
        hidden = activated(dense("intermediate.dense", x), gelu)
        names = [f"{at}.output.LayerNorm.{part}" for part in ("weight", "bias")]
        x = norm(added(dense("output.dense", hidden), x), *(w[name] for name in names), 1e-12)
    first = (x[0][0], x[1][0])
    pooled = activated(linear(first, w["bert.pooler.dense.weight"], w["bert.pooler.dense.bias"]), torch.tanh)
    return linear(pooled, w["classifier.weight"], w["classifier.bias"])


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_it_is_the_split_by_hand(family: str) -> None:
    tokens = models.random_tokens()
    with no_upcasts():
        model, label = (build("gpt2"), 7) if family == "gpt2" else (build_classifier("bert_classifier"), 1)
        found = cd_t().tokens(model, tokens, logit(label))
        kept: dict[str, Tensor] = {}
        with torch.no_grad(), model.hooks(fwd_hooks=[("blocks.0.hook_in", lambda x, hook: kept.update(x=x))]):
            logits = model(tokens, return_type="logits")
    weights = {name.replace("._original_component", ""): value for name, value in model.original_model.state_dict().items()}
    for row in range(2):
        for token in range(6):
            own = torch.zeros(6, 1, dtype=torch.float64)
            own[token] = 1
            beta, gamma = {"gpt2": gpt2, "bert": bert}[family](weights, (kept["x"][row] * own, kept["x"][row] * (1 - own)))
            torch.testing.assert_close((beta + gamma)[label], logits[row, -1, label] if family == "gpt2" else logits[row].flatten()[label])
            torch.testing.assert_close(found[row, token], beta[label], rtol=0, atol=1e-9)
    assert found.abs().min() > 1e-4


def test_without_activations_and_biases_the_tokens_add_up() -> None:
    """Attention alone, its pattern as it is: linear in the tokens, so that all betas together are the logits."""
    model = models.build_native(attn_only=True, normalization_type=None)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    tokens = models.random_tokens()
    found = cd_t().tokens(model, tokens, logit_diff(7, 11))
    logits = model(tokens, return_type="logits")[:, -1]
    torch.testing.assert_close(found.sum(1), logits[:, 7] - logits[:, 11], rtol=0, atol=1e-4)
    assert found.abs().max() > 1e-3


def test_in_tables_and_what_is_refused(gpt2, tokens) -> None:
    curves = areas(perturbation_curves(gpt2, tokens, logit(7), methods=["cd_t"]))
    assert set(curves["method"]) == {"random", "cd_t"} and passes("cd_t", 6) == (7, 0)
    with pytest.raises(RelevanceError, match="cd_t splits logits"):
        estimator("cd_t").tokens(gpt2, tokens, log_prob(7))
    with pytest.raises(CoverageError, match=r"cd_t has no step for blocks.0.mlp \(gate\)"):
        estimator("cd_t").tokens(build("llama"), tokens, logit(7))
    with pytest.raises(CoverageError, match="one stack of blocks"):
        estimator("cd_t").tokens(build_encoder_decoder("t5"), sources_and_targets()[0], logit(7), stack="encoder")
    assert not any(point.fwd_hooks for point in gpt2.hook_dict.values())
