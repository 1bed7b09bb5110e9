"""LRP of a GPT-2, a Llama and a Mixtral from the papers' formulas, layer by layer, with plain tensors.

Nothing here is shared with the package: no hooks, no autograd, no coefficients. Relevance itself is handed down, R_j = sum_k (share of j in
k) R_k. A tensor of relevance has the shape of the activation it belongs to. One prompt [pos] at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

Named = dict[str, Tensor]


def share(weights: Tensor, x: Tensor, y: Tensor, relevance: Tensor) -> Tensor:
    """The 0-rule: R_j = sum_k w_kj x_j / y_k R_k, for y = W x (+ b), on the last axis; weights [out, in]."""
    contributions = weights * x.unsqueeze(-2) / y.unsqueeze(-1)  # [.., out, in]
    return (contributions * relevance.unsqueeze(-1)).sum(-2)


def split_sum(parts: list[Tensor], relevance: Tensor) -> list[Tensor]:
    """A sum of several terms: each term gets its share of it."""
    total = torch.stack(parts).sum(0)
    return [part / total * relevance for part in parts]


@dataclass
class Attention:
    """Forward of causal attention of one prompt, kept for its relevance. q, k, v: [head, pos, d_head], already rotated and repeated."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float

    def __post_init__(self) -> None:
        pos = self.q.shape[1]
        self.seen = torch.ones(pos, pos, dtype=torch.bool).tril()
        self.scores = self.scale * torch.einsum("htd,hsd->hts", self.q, self.k)
        exponentials = torch.exp(self.scores - self.scores.amax(-1, keepdim=True)) * self.seen
        self.pattern = exponentials / exponentials.sum(-1, keepdim=True)
        self.z = torch.einsum("hts,hsd->htd", self.pattern, self.v)

    def attnlrp(self, relevance: Tensor) -> Named:
        """Half of z's relevance to pattern and values; softmax rule; half of the scores' relevance to queries and keys."""
        terms = torch.einsum("hts,hsd,htd->htsd", self.pattern, self.v, relevance / (2 * self.z))
        at_pattern, at_v = terms.sum(-1), terms.sum(1)
        at_scores = self.scores * (at_pattern - self.pattern * at_pattern.sum(-1, keepdim=True)) * self.seen
        terms = self.scale * torch.einsum("htd,hsd,hts->htsd", self.q, self.k, at_scores / (2 * self.scores))
        return {"pattern": at_pattern, "v": at_v, "scores": at_scores, "q": terms.sum(2), "k": terms.sum(1)}

    def cp_lrp(self, relevance: Tensor) -> Named:
        """The pattern is a constant: a linear layer in the values."""
        at_v = torch.einsum("hts,hsd,htd->hsd", self.pattern, self.v, relevance / self.z)
        return {"v": at_v, "q": torch.zeros_like(self.q), "k": torch.zeros_like(self.k)}

    def relevance(self, rules: str, relevance: Tensor) -> Named:
        return self.attnlrp(relevance) if rules == "attnlrp" else self.cp_lrp(relevance)


@dataclass
class Explained:
    """Logits of one prompt and relevance by HookPoint name."""

    logits: Tensor
    relevance: Named = field(default_factory=dict)


def start(logits: Tensor, answer: int, wrong: int) -> Tensor:
    """Relevance of logit(answer) - logit(wrong) at the last position."""
    relevance = torch.zeros_like(logits)
    relevance[-1, answer], relevance[-1, wrong] = logits[-1, answer], -logits[-1, wrong]
    return relevance


def to_heads(x: Tensor, n: int) -> Tensor:
    """[pos, head * d] -> [head, pos, d]."""
    return x.reshape(x.shape[0], n, -1).transpose(0, 1)


def from_heads(x: Tensor) -> Tensor:
    return x.transpose(0, 1).reshape(x.shape[1], -1)


# GPT-2


def gpt2(w: Named, tokens: Tensor, n_layers: int, n_heads: int, eps: float, rules: str, answer: int, wrong: int) -> Explained:
    """w: the state of a GPT2LMHeadModel. The standard deviation of a LayerNorm is a constant, its centring and weight a linear layer."""

    def norm(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        n = x.shape[-1]
        centred = x - x.mean(-1, keepdim=True)
        std = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        weights = w[f"{name}.weight"].unsqueeze(-1) * (torch.eye(n, dtype=x.dtype) - 1 / n) / std.unsqueeze(-1)
        return centred / std * w[f"{name}.weight"] + w[f"{name}.bias"], weights

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    embedded, positions = w["transformer.wte.weight"][tokens], w["transformer.wpe.weight"][: len(tokens)]
    x, kept = embedded + positions, []
    for i in range(n_layers):
        layer: Named = {"pre": x}
        layer["n1"], layer["w1"] = norm(f"transformer.h.{i}.ln_1", x)
        layer["qkv"] = linear(f"transformer.h.{i}.attn.c_attn", layer["n1"])
        q, k, v = (to_heads(part, n_heads) for part in layer["qkv"].chunk(3, -1))
        attention = Attention(q, k, v, 1 / math.sqrt(q.shape[-1]))
        layer["z"] = from_heads(attention.z)
        layer["attn"] = linear(f"transformer.h.{i}.attn.c_proj", layer["z"])
        layer["mid"] = x + layer["attn"]
        layer["n2"], layer["w2"] = norm(f"transformer.h.{i}.ln_2", layer["mid"])
        layer["in"] = linear(f"transformer.h.{i}.mlp.c_fc", layer["n2"])
        u = layer["in"]
        layer["post"] = u / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        layer["mlp"] = linear(f"transformer.h.{i}.mlp.c_proj", layer["post"])
        kept.append((layer, attention))
        x = layer["mid"] + layer["mlp"]
    final, weights = norm("transformer.ln_f", x)
    logits = final @ w["transformer.wte.weight"].T
    result = Explained(logits)

    relevance = start(logits, answer, wrong)
    relevance = share(w["transformer.wte.weight"], final, logits, relevance)
    relevance = share(weights, x, final, relevance)
    result.relevance[f"blocks.{n_layers - 1}.hook_out"] = relevance
    for i in reversed(range(n_layers)):
        layer, attention = kept[i]
        past, mlp = split_sum([layer["mid"], layer["mlp"]], relevance)
        post = share(w[f"transformer.h.{i}.mlp.c_proj.weight"].T, layer["post"], layer["mlp"], mlp)
        result.relevance[f"blocks.{i}.mlp.out.hook_in"] = post  # and, by the identity rule, all of it at the layer's input
        normed = share(w[f"transformer.h.{i}.mlp.c_fc.weight"].T, layer["n2"], layer["in"], post)
        relevance = past + share(layer["w2"], layer["mid"], layer["n2"], normed)
        past, written = split_sum([layer["pre"], layer["attn"]], relevance)
        at_z = share(w[f"transformer.h.{i}.attn.c_proj.weight"].T, layer["z"], layer["attn"], written)
        parts = attention.relevance(rules, to_heads(at_z, n_heads))
        joint = torch.cat([from_heads(parts[name]) for name in ("q", "k", "v")], -1)
        normed = share(w[f"transformer.h.{i}.attn.c_attn.weight"].T, layer["n1"], layer["qkv"], joint)
        relevance = past + share(layer["w1"], layer["pre"], layer["n1"], normed)
        result.relevance |= {f"blocks.{i}.attn.o.hook_in": to_heads(at_z, n_heads).transpose(0, 1), f"blocks.{i}.hook_in": relevance}
        result.relevance |= {f"blocks.{i}.attn.{name}.hook_out": parts[name].transpose(0, 1) for name in ("q", "k", "v")}
        if rules == "attnlrp":
            result.relevance |= {f"blocks.{i}.attn.hook_pattern": parts["pattern"], f"blocks.{i}.attn.hook_attn_scores": parts["scores"]}
    result.relevance["embed.hook_out"], result.relevance["pos_embed.hook_out"] = split_sum([embedded, positions], relevance)
    return result


# Llama


def rotation(pos: int, frequencies: list[float]) -> Tensor:
    """RoPE as one matrix per position [pos, d_head, d_head] (the two halves of a head are turned against each other)."""
    half, d_head = len(frequencies), 2 * len(frequencies)
    turned = torch.zeros(pos, d_head, d_head, dtype=torch.float64)
    for p in range(pos):
        for i in range(half):
            angle = p * frequencies[i]
            turned[p, i, i] = turned[p, i + half, i + half] = math.cos(angle)
            turned[p, i, i + half], turned[p, i + half, i] = -math.sin(angle), math.sin(angle)
    return turned


def by_zero_rule(weights: Tensor, x: Tensor, relevance: Tensor) -> Tensor:
    """Relevance of y = W x at x, weights [out, in]."""
    return share(weights, x, x @ weights.T, relevance)


@dataclass
class GatedMLP:
    """SwiGLU of one prompt: y = down (silu(gate x) * up x)."""

    gate: Tensor
    up: Tensor
    down: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        self.x, self.at_gate, self.at_up = x, x @ self.gate.T, x @ self.up.T
        self.post = self.at_gate / (1 + torch.exp(-self.at_gate)) * self.at_up
        return self.post @ self.down.T

    def relevance(self, rules: str, relevance: Tensor) -> Named:
        """attnlrp: half of a neuron's relevance to its gate, which the identity rule hands on whole; cp_lrp: all of it to `up`."""
        post = by_zero_rule(self.down, self.post, relevance)
        to_gate, to_up = (post / 2, post / 2) if rules == "attnlrp" else (torch.zeros_like(post), post)
        x = by_zero_rule(self.gate, self.x, to_gate) + by_zero_rule(self.up, self.x, to_up)
        return {"out.hook_in": post, "gate.hook_out": to_gate, "in.hook_out": to_up, "hook_in": x}


@dataclass
class Mixture:
    """Mixtral's experts: y = sum of w_e expert_e(x) over the top k of the router's scores, w their softmax over the chosen alone."""

    router: Tensor
    experts: list[GatedMLP]
    top_k: int

    def __call__(self, x: Tensor) -> Tensor:
        self.x, self.scores = x, x @ self.router.T
        self.chosen = torch.zeros_like(self.scores)
        for row, scores in zip(self.chosen, self.scores, strict=True):
            row[scores.argsort(descending=True)[: self.top_k]] = 1
        exponentials = torch.exp(self.scores) * self.chosen
        self.weights = exponentials / exponentials.sum(-1, keepdim=True)
        self.outs = torch.stack([expert(x) for expert in self.experts], 1)  # [pos, expert, d], every expert at every position
        self.y = (self.weights.unsqueeze(-1) * self.outs).sum(1)
        return self.y

    def relevance(self, rules: str, relevance: Tensor) -> Named:
        """Each expert has its share of the sum. attnlrp: half of that to the expert's router weight (softmax rule, then 0-rule), half to
        the expert; cp_lrp: all of it to the expert."""
        shares = self.weights.unsqueeze(-1) * self.outs / self.y.unsqueeze(1) * relevance.unsqueeze(1)
        if rules == "attnlrp":
            shares = shares / 2
            at_weights = shares.sum(-1)
            at_scores = self.scores * (at_weights - self.weights * at_weights.sum(-1, keepdim=True)) * self.chosen
        else:
            at_scores = torch.zeros_like(self.scores)
        x = by_zero_rule(self.router, self.x, at_scores)
        for e, expert in enumerate(self.experts):
            x = x + expert.relevance(rules, shares[:, e])["hook_in"]
        return {"hook_in": x, "hook_out": relevance}


def llama(
    w: Named,
    tokens: Tensor,
    n_layers: int,
    n_heads: int,
    n_kv: int,
    eps: float,
    frequencies: list[float],
    rules: str,
    answer: int,
    wrong: int,
    top_k: int = 0,
) -> Explained:
    """w: the state of a LlamaForCausalLM, or of a MixtralForCausalLM with top_k experts. The root mean square of an RMSNorm is a constant.

    frequencies: RoPE's angles per position, base^(-2i/d) as the model has rounded them.
    """

    def feed_forward(at: str) -> GatedMLP | Mixture:
        if not top_k:
            return GatedMLP(*(w[f"{at}.{part}_proj.weight"] for part in ("gate", "up", "down")))
        gates_ups, downs = w[f"{at}.experts.gate_up_proj"], w[f"{at}.experts.down_proj"]
        experts = [GatedMLP(*joint.chunk(2), down) for joint, down in zip(gates_ups, downs, strict=True)]
        return Mixture(w[f"{at}.gate.weight"], experts, top_k)

    def norm(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        rms = (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return x / rms * w[f"{name}.weight"], torch.diag_embed(w[f"{name}.weight"] / rms)

    embedded = w["model.embed_tokens.weight"][tokens]
    x, kept = embedded, []
    for i in range(n_layers):
        at = f"model.layers.{i}"
        layer: Named = {"pre": x}
        layer["n1"], layer["w1"] = norm(f"{at}.input_layernorm", x)
        q, k, v = (to_heads(layer["n1"] @ w[f"{at}.self_attn.{p}_proj.weight"].T, n) for p, n in (("q", n_heads), ("k", n_kv), ("v", n_kv)))
        turned = rotation(len(tokens), frequencies)
        layer["q"], layer["k"] = q, k
        layer["rot_q"], layer["rot_k"] = (torch.einsum("pij,hpj->hpi", turned, part) for part in (q, k))
        group = n_heads // n_kv
        repeated = (part.repeat_interleave(group, 0) for part in (layer["rot_k"], v))
        attention = Attention(layer["rot_q"], *repeated, 1 / math.sqrt(q.shape[-1]))  # type: ignore[call-arg]
        layer["z"] = from_heads(attention.z)
        layer["attn"] = layer["z"] @ w[f"{at}.self_attn.o_proj.weight"].T
        layer["mid"] = x + layer["attn"]
        layer["n2"], layer["w2"] = norm(f"{at}.post_attention_layernorm", layer["mid"])
        mlp = feed_forward(f"{at}.mlp")
        layer["mlp"] = mlp(layer["n2"])
        kept.append((layer, attention, mlp))
        x = layer["mid"] + layer["mlp"]
    final, weights = norm("model.norm", x)
    logits = final @ w["lm_head.weight"].T
    result = Explained(logits)

    relevance = by_zero_rule(w["lm_head.weight"], final, start(logits, answer, wrong))
    relevance = share(weights, x, final, relevance)
    result.relevance[f"blocks.{n_layers - 1}.hook_out"] = relevance
    for i in reversed(range(n_layers)):
        at, (layer, attention, mlp) = f"model.layers.{i}", kept[i]
        past, written = split_sum([layer["mid"], layer["mlp"]], relevance)
        in_mlp = mlp.relevance(rules, written)
        relevance = past + share(layer["w2"], layer["mid"], layer["n2"], in_mlp["hook_in"])
        past, written = split_sum([layer["pre"], layer["attn"]], relevance)
        at_z = by_zero_rule(w[f"{at}.self_attn.o_proj.weight"], layer["z"], written)
        parts = attention.relevance(rules, to_heads(at_z, n_heads))
        at_v, at_rot_k = (parts[name].unflatten(0, (n_kv, -1)).sum(1) for name in ("v", "k"))  # a group shares its key-value head
        turned = rotation(len(tokens), frequencies)
        at_q, at_k = share(turned, layer["q"], layer["rot_q"], parts["q"]), share(turned, layer["k"], layer["rot_k"], at_rot_k)
        normed = sum(
            by_zero_rule(w[f"{at}.self_attn.{p}_proj.weight"], layer["n1"], from_heads(r))
            for p, r in (("q", at_q), ("k", at_k), ("v", at_v))
        )  # type: ignore[assignment]
        relevance = past + share(layer["w1"], layer["pre"], layer["n1"], normed)
        named = {"q.hook_out": at_q, "k.hook_out": at_k, "v.hook_out": at_v}
        result.relevance |= {f"blocks.{i}.attn.{name}": part.transpose(0, 1) for name, part in named.items()}
        result.relevance |= {f"blocks.{i}.mlp.{name}": part for name, part in in_mlp.items()}
        result.relevance |= {
            f"blocks.{i}.attn.o.hook_in": to_heads(at_z, n_heads).transpose(0, 1),
            f"blocks.{i}.hook_in": relevance,
        }
        if rules == "attnlrp":
            result.relevance |= {f"blocks.{i}.attn.hook_pattern": parts["pattern"], f"blocks.{i}.attn.hook_attn_scores": parts["scores"]}
    result.relevance["embed.hook_out"] = relevance
    return result
