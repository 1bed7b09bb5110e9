"""The published rulesets as their papers state them: models written out in plain torch, in which a rule is a line of its own.

Nothing here is shared with the package: no hooks, no HookPoints, no rules, no table of rulesets. An operation that a paper gives another
backward is written as a function with the operation's value and that gradient (`with_gradient_of`), as the papers' own code does by
detaching, and the relevance of an activation is the activation times what autograd delivers there. One prompt [pos] at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import Tensor

Named = dict[str, Tensor]


def with_gradient_of(surrogate: Tensor, value: Tensor) -> Tensor:
    return value.detach() + surrogate - surrogate.detach()


def as_it_is(x: Tensor) -> Tensor:
    return x


def constant(x: Tensor) -> Tensor:
    return x.detach()


def half(x: Tensor) -> Tensor:
    """The uniform rule: of a product of two factors, each gets half of its gradient (AttnLRP eq. 7)."""
    return with_gradient_of(x / 2, x)


def identity(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f(x) / x is a constant (AttnLRP eq. 9)."""
    return x * (f(x) / x).detach()


def gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return f(x)


def plain_product(a: Tensor, b: Tensor) -> Tensor:
    return a * b


def half_product(a: Tensor, b: Tensor) -> Tensor:
    return half(a * b)


def constant_factor(a: Tensor, b: Tensor) -> Tensor:
    return a.detach() * b


def softmax(scores: Tensor) -> Tensor:
    exponentials = torch.exp(scores - scores.detach().amax(-1, keepdim=True))
    return exponentials / exponentials.sum(-1, keepdim=True)


def constant_softmax(scores: Tensor) -> Tensor:
    """The AH-rule: attention weights are constants (Ali et al. 2022)."""
    return softmax(scores).detach()


def softmax_at_temperature_two(scores: Tensor) -> Tensor:
    """GIM: the gradient of softmax(x / 2) without the factor 1/2."""
    return with_gradient_of(2 * softmax(scores / 2), softmax(scores))


def kept_in_place(x: Tensor, y: Tensor) -> Tensor:
    """Relevance of y goes to x entry by entry (Chefer et al. 2021)."""
    return with_gradient_of(x * (y / x).detach(), y)


def softmax_kept_in_place(scores: Tensor) -> Tensor:
    finite = scores.masked_fill(scores.isinf(), 1.0)
    return kept_in_place(finite, softmax(scores))


@dataclass(frozen=True)
class Published:
    """What a paper does at each operation; by default nothing, which is gradient x input.

    gamma: of the two layers of an MLP and of the unembedding. zplus: z+ in all matrices, and norms keep relevance in its place.
    """

    deviation: Callable[[Tensor], Tensor] = as_it_is  # of a norm: its standard deviation or root mean square
    deviation_of_queries_and_keys: Callable[[Tensor], Tensor] = as_it_is
    activation: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor] = gradient
    gate: Callable[[Tensor, Tensor], Tensor] = plain_product  # and router weight times expert
    scores: Callable[[Tensor], Tensor] = as_it_is
    pattern: Callable[[Tensor], Tensor] = softmax
    z: Callable[[Tensor], Tensor] = as_it_is
    gamma: float = 0.0
    zplus: bool = False


_LN = Published(deviation=constant, deviation_of_queries_and_keys=constant)
_RELP = replace(_LN, activation=identity, gate=half_product)
_ATTNLRP = replace(_RELP, scores=half, z=half)
_CP_LRP = replace(_RELP, gate=constant_factor, pattern=constant_softmax)
PUBLISHED = {
    "gradient": Published(),
    "relp": _RELP,
    "relp_ah": replace(_RELP, pattern=constant_softmax),
    "attnlrp": _ATTNLRP,
    "attnlrp_plain_qk": replace(_ATTNLRP, deviation_of_queries_and_keys=as_it_is),
    "cp_lrp": _CP_LRP,
    "cp_lrp_gamma": replace(_CP_LRP, gamma=0.05),
    "lrp_zplus": replace(_ATTNLRP, pattern=softmax_kept_in_place, zplus=True),
    "gim": replace(_LN, gate=half_product, scores=half, z=half, pattern=softmax_at_temperature_two),
}


def gamma_linear(x: Tensor, weight: Tensor, bias: Tensor, gamma: float) -> Tensor:
    """y = W x + b, weight [out, in]: a contribution of the sign of y counts 1 + gamma times, and so does the bias."""
    y = x @ weight.T + bias
    parts = torch.cat([x.unsqueeze(-2) * weight, bias.expand_as(y).unsqueeze(-1)], -1).detach()
    counts = 1 + gamma * (parts.sign() == y.detach().sign().unsqueeze(-1)).to(x)
    share = counts / (parts * counts).sum(-1, keepdim=True)  # of y, per unit of contribution
    slopes = weight * share[..., :-1] * y.detach().unsqueeze(-1)
    return with_gradient_of((slopes.detach() * x.unsqueeze(-2)).sum(-1), y)


def zplus_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Positive contributions in proportion, R_i = sum_j (x_i w_ji)^+ / sum_k (x_k w_jk)^+ R_j."""
    y = x @ weight.T + bias
    parts = (x.unsqueeze(-2) * weight).clamp(min=0)
    slopes = parts / parts.sum(-1, keepdim=True) * y.unsqueeze(-1) / x.unsqueeze(-2)
    return with_gradient_of((slopes.detach() * x.unsqueeze(-2)).sum(-1), y)


def plain_or_zplus(x: Tensor, weight: Tensor, rules: Published) -> Tensor:
    return zplus_linear(x, weight, torch.zeros_like(weight[:, 0])) if rules.zplus else x @ weight.T


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, rules: Published) -> Tensor:
    """q, k, v and z: [pos, head, d_head]."""
    unseen = torch.ones(len(q), len(q)).triu(1).bool()
    scores = rules.scores(scale * torch.einsum("thd,shd->hts", q, k)).masked_fill(unseen, -math.inf)
    return rules.z(torch.einsum("hts,shd->thd", rules.pattern(scores), v))


@dataclass
class Explained:
    """Logits of one prompt, and relevance by HookPoint name."""

    logits: Tensor
    relevance: Named


def explained(logits: Tensor, points: Named, answer: int, wrong: int) -> Explained:
    """Relevance of logit(answer) - logit(wrong) at the last position: activation x gradient, 0 where nothing arrives."""
    target = logits[-1, answer] - logits[-1, wrong]
    gradients = torch.autograd.grad(target, list(points.values()), allow_unused=True)
    relevance = {name: torch.zeros_like(x) if g is None else x.detach() * g for (name, x), g in zip(points.items(), gradients, strict=True)}
    return Explained(logits.detach(), relevance)


def _layers(w: Named, prefix: str) -> range:
    return range(next(i for i in count() if not any(name.startswith(f"{prefix}.{i}.") for name in w)))


def gelu_new(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gpt2(w: Named, tokens: Tensor, n_heads: int, eps: float, rules: Published, answer: int, wrong: int) -> Explained:
    """w: the state of a GPT2LMHeadModel."""

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        std = rules.deviation((centred.square().mean(-1, keepdim=True) + eps).sqrt())
        y = centred / std * w[f"{name}.weight"] + w[f"{name}.bias"]
        return kept_in_place(x, y) if rules.zplus else y

    def linear(name: str, x: Tensor) -> Tensor:
        weight, bias = w[f"{name}.weight"].T, w[f"{name}.bias"]
        if rules.zplus:
            return zplus_linear(x, weight, bias)
        return gamma_linear(x, weight, bias, rules.gamma) if ".mlp." in name else x @ weight.T + bias

    points: Named = {
        "embed.hook_out": w["transformer.wte.weight"][tokens],
        "pos_embed.hook_out": w["transformer.wpe.weight"][: len(tokens)],
    }
    for name in points:
        points[name] = points[name].clone().requires_grad_(True)
    x = points["embed.hook_out"] + points["pos_embed.hook_out"]
    for i in _layers(w, "transformer.h"):
        at, here = f"transformer.h.{i}", f"blocks.{i}"
        points[f"{here}.hook_in"] = x
        joint = linear(f"{at}.attn.c_attn", norm(f"{at}.ln_1", x)).unflatten(-1, (3, n_heads, -1))
        q, k, v = (points.setdefault(f"{here}.attn.{p}.hook_out", joint[:, j].clone()) for j, p in enumerate("qkv"))
        z = points[f"{here}.attn.o.hook_in"] = attention(q, k, v, 1 / math.sqrt(q.shape[-1]), rules)
        x = x + linear(f"{at}.attn.c_proj", z.flatten(1))
        before = points[f"{here}.mlp.in.hook_out"] = linear(f"{at}.mlp.c_fc", norm(f"{at}.ln_2", x))
        after = points[f"{here}.mlp.out.hook_in"] = rules.activation(gelu_new, before)
        x = x + linear(f"{at}.mlp.c_proj", after)
    unembedding = w["transformer.wte.weight"]
    final, no_bias = norm("transformer.ln_f", x), torch.zeros_like(unembedding[:, 0])
    logits = zplus_linear(final, unembedding, no_bias) if rules.zplus else gamma_linear(final, unembedding, no_bias, rules.gamma)
    return explained(logits, points, answer, wrong)


def llama(
    w: Named, tokens: Tensor, d_head: int, eps: float, frequencies: Tensor, rules: Published, answer: int, wrong: int, top_k: int = 0
) -> Explained:
    """w: the state of a LlamaForCausalLM, of a Qwen3ForCausalLM (norms on queries and keys) or of a MixtralForCausalLM with top_k experts.

    frequencies: RoPE's angles per position [d_head / 2], as the model has rounded them.
    """
    angles = torch.arange(len(tokens)).unsqueeze(1) * frequencies
    turn = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)  # [pos, 1, d_head / 2], complex

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        turned = torch.complex(first, second) * turn
        return torch.cat([turned.real, turned.imag], -1)

    def norm(name: str, x: Tensor, deviation: Callable[[Tensor], Tensor] = rules.deviation) -> Tensor:
        y = x / deviation((x.square().mean(-1, keepdim=True) + eps).sqrt()) * w[f"{name}.weight"]
        return kept_in_place(x, y) if rules.zplus else y

    def unbiased(x: Tensor, weight: Tensor) -> Tensor:
        return plain_or_zplus(x, weight, rules) if rules.zplus else gamma_linear(x, weight, torch.zeros_like(weight[:, 0]), rules.gamma)

    def mixture(at: str, x: Tensor) -> Tensor:
        scores = x @ w[f"{at}.gate.weight"].T
        left_out = torch.ones_like(scores).scatter(-1, scores.topk(top_k).indices, 0).bool()
        weights, y = softmax(scores.masked_fill(left_out, -math.inf)), torch.zeros_like(x)
        for e, (gate_up, down) in enumerate(zip(w[f"{at}.experts.gate_up_proj"], w[f"{at}.experts.down_proj"], strict=True)):
            gate, up = (x @ gate_up.T).chunk(2, -1)
            y = y + rules.gate(weights[:, e : e + 1], rules.gate(rules.activation(silu, gate), up) @ down.T)
        return y

    points: Named = {"embed.hook_out": w["model.embed_tokens.weight"][tokens].clone().requires_grad_(True)}
    x = points["embed.hook_out"]
    for i in _layers(w, "model.layers"):
        at, here = f"model.layers.{i}", f"blocks.{i}"
        points[f"{here}.hook_in"] = x
        normed = norm(f"{at}.input_layernorm", x)
        q, k, v = (
            points.setdefault(
                f"{here}.attn.{p}.hook_out", plain_or_zplus(normed, w[f"{at}.self_attn.{p}_proj.weight"], rules).unflatten(-1, (-1, d_head))
            )
            for p in "qkv"
        )
        if f"{at}.self_attn.q_norm.weight" in w:
            q, k = (norm(f"{at}.self_attn.{p}_norm", y, rules.deviation_of_queries_and_keys) for p, y in (("q", q), ("k", k)))
        q, k = rotate(q), rotate(k)
        k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], 1) for y in (k, v))
        z = points[f"{here}.attn.o.hook_in"] = attention(q, k, v, 1 / math.sqrt(d_head), rules)
        x = x + plain_or_zplus(z.flatten(1), w[f"{at}.self_attn.o_proj.weight"], rules)
        normed = points[f"{here}.mlp.hook_in"] = norm(f"{at}.post_attention_layernorm", x)
        if top_k:
            x = x + mixture(f"{at}.mlp", normed)
            continue
        gate = points[f"{here}.mlp.gate.hook_out"] = plain_or_zplus(normed, w[f"{at}.mlp.gate_proj.weight"], rules)
        up = points[f"{here}.mlp.in.hook_out"] = unbiased(normed, w[f"{at}.mlp.up_proj.weight"])
        neurons = points[f"{here}.mlp.out.hook_in"] = rules.gate(rules.activation(silu, gate), up)
        x = x + unbiased(neurons, w[f"{at}.mlp.down_proj.weight"])
    return explained(unbiased(norm("model.norm", x), w["lm_head.weight"]), points, answer, wrong)
