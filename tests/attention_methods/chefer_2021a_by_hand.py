"""Relevance by the formulas of Chefer et al. 2021 (arXiv 2012.09838) on a ViT, a BERT and a GPT-2 written out in plain torch.

Each step is a function of autograd whose backward passes relevance instead of a gradient, so that autograd adds up the relevance of what is
read twice. Nothing of the package is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, grad


class Linear(Function):
    """Positive contributions in proportion (z+); the bias gets nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T + bias

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        z = (x.unsqueeze(-2) * weight).clamp(min=0)
        return (z / z.sum(-1, keepdim=True) * relevance.unsqueeze(-1)).sum(-2), None, None


class Same(Function):
    """Norms, activations, softmax, a constant factor: relevance stays where it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor, None]:
        return relevance, None


class Product(Function):
    """A matrix product of two: half of the relevance goes to each, in proportion to the terms of each sum."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        s = relevance / (a @ b)
        return a * (s @ b.mT) / 2, b * (a.mT @ s) / 2


class Add(Function):
    """Equations 8 to 10: the shares of both, scaled to the parts that their sums have."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(u, v)
        return u + v

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor, Tensor]:
        u, v = ctx.saved_tensors
        of_u, of_v = torch.zeros_like(u), torch.zeros_like(v)
        for i, r in enumerate(relevance):
            a, b = u[i] * r / (u[i] + v[i]), v[i] * r / (u[i] + v[i])
            whole = a.sum().abs() + b.sum().abs()
            of_u[i] = a * (a.sum().abs() / whole) * r.sum() / a.sum()
            of_v[i] = b * (b.sum().abs() / whole) * r.sum() / b.sum()
        return of_u, of_v


class Plain:
    """The same steps with their gradients."""

    linear = staticmethod(lambda x, weight, bias: x @ weight.T + bias)
    same = staticmethod(lambda x, y: y)
    product = staticmethod(torch.matmul)
    add = staticmethod(torch.add)


class Ruled:
    linear, same, product, add = Linear.apply, Same.apply, Product.apply, Add.apply


class Encoder:
    """w: weights by their names in Hugging Face's model; patterns: what attention used, layer by layer."""

    def __init__(self, model: Any, steps: Any) -> None:
        self.w = {name.replace("._original_component", ""): value for name, value in model.original_model.state_dict().items()}
        self.steps, self.heads, self.patterns = steps, model.cfg.n_heads, []

    def linear(self, name: str, x: Tensor) -> Tensor:
        return self.steps.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def norm(self, name: str, x: Tensor, eps: float = 1e-12) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]
        return self.steps.same(x, y)

    def gelu(self, x: Tensor, approximate: str = "none") -> Tensor:
        return self.steps.same(x, torch.nn.functional.gelu(x, approximate=approximate))

    def attention(self, x: Tensor, names: tuple[str, str, str]) -> Tensor:
        return self.mixed(*(self.linear(name, x) for name in names))

    def mixed(self, *projected: Tensor, causal: bool = False) -> Tensor:
        """z [batch, pos, head * d_head] of queries, keys and values."""
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in projected)
        dots = self.steps.product(q, k.mT)
        scores = self.steps.same(dots, dots / q.shape[-1] ** 0.5)
        unseen = torch.ones(scores.shape[-2:]).triu(1).bool() if causal else torch.zeros(scores.shape[-2:]).bool()
        self.patterns.append(self.steps.same(scores, scores.masked_fill(unseen, float("-inf")).softmax(-1)))
        return self.steps.product(self.patterns[-1], v).transpose(1, 2).flatten(2)

    def gpt2(self, embedded: Tensor) -> Tensor:
        x = embedded
        for i in range(2):
            at = f"transformer.h.{i}"
            weights, biases = self.w[f"{at}.attn.c_attn.weight"].T.chunk(3), self.w[f"{at}.attn.c_attn.bias"].chunk(3)
            normed = self.norm(f"{at}.ln_1", x, 1e-5)
            z = self.mixed(*(self.steps.linear(normed, w, b) for w, b in zip(weights, biases, strict=True)), causal=True)
            x = self.steps.add(x, self.steps.linear(z, self.w[f"{at}.attn.c_proj.weight"].T, self.w[f"{at}.attn.c_proj.bias"]))
            normed = self.norm(f"{at}.ln_2", x, 1e-5)
            hidden = self.gelu(self.steps.linear(normed, self.w[f"{at}.mlp.c_fc.weight"].T, self.w[f"{at}.mlp.c_fc.bias"]), "tanh")
            x = self.steps.add(x, self.steps.linear(hidden, self.w[f"{at}.mlp.c_proj.weight"].T, self.w[f"{at}.mlp.c_proj.bias"]))
        unembedding = self.w["transformer.wte.weight"]
        return self.steps.linear(self.norm("transformer.ln_f", x, 1e-5)[:, -1], unembedding, torch.zeros_like(unembedding[:, 0]))

    def vit(self, embedded: Tensor) -> Tensor:
        x = embedded
        for i in range(2):
            at = f"vit.layers.{i}"
            normed = self.norm(f"{at}.layernorm_before", x)
            z = self.attention(normed, tuple(f"{at}.attention.{p}_proj" for p in "qkv"))
            x = self.steps.add(x, self.linear(f"{at}.attention.o_proj", z))
            hidden = self.gelu(self.linear(f"{at}.mlp.fc1", self.norm(f"{at}.layernorm_after", x)))
            x = self.steps.add(x, self.linear(f"{at}.mlp.fc2", hidden))
        return self.linear("classifier", self.norm("vit.layernorm", x)[:, 0])

    def bert(self, embedded: Tensor) -> Tensor:
        x = embedded
        for i in range(2):
            at = f"bert.encoder.layer.{i}"
            z = self.attention(x, tuple(f"{at}.attention.self.{p}" for p in ("query", "key", "value")))
            x = self.norm(f"{at}.attention.output.LayerNorm", self.steps.add(self.linear(f"{at}.attention.output.dense", z), x))
            hidden = self.gelu(self.linear(f"{at}.intermediate.dense", x))
            x = self.norm(f"{at}.output.LayerNorm", self.steps.add(self.linear(f"{at}.output.dense", hidden), x))
        pooled = self.linear("bert.pooler.dense", x[:, 0])
        return self.linear("classifier", self.steps.same(pooled, pooled.tanh()))


def chefer_2021a(model: Any, family: str, embedded: Tensor, label: int) -> tuple[Tensor, Tensor]:
    """R [batch, token, source] and the logits, from what enters the first block."""
    results = []
    for steps in (Plain(), Ruled()):
        encoder, leaf = Encoder(model, steps), embedded.clone().requires_grad_()
        logits = getattr(encoder, family)(leaf)
        results.append(grad(logits[:, label].sum(), encoder.patterns))  # relevance 1 at the logit
    r = torch.eye(embedded.shape[1], dtype=embedded.dtype).expand(len(embedded), -1, -1)
    for gradient, relevance in zip(*results, strict=True):
        r = r + (gradient * relevance).clamp(min=0).mean(1) @ r
    return r, logits.detach()
