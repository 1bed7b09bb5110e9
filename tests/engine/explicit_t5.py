"""LRP of a T5 from the papers' formulas, as in explicit_lrp.py: encoder, decoder, and the cross-attention between them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.engine.explicit_lrp import Attention, Explained, Named, from_heads, share, split_sum, start, to_heads


@dataclass
class BiasedAttention(Attention):
    """Attention whose scores are q k + bias (T5 does not scale); seen: [query, key]. The bias keeps its share of a score's relevance."""

    bias: Tensor
    seen: Tensor

    def __post_init__(self) -> None:
        self.scores = self.scale * torch.einsum("htd,hsd->hts", self.q, self.k) + self.bias
        exponentials = torch.exp(self.scores - self.scores.amax(-1, keepdim=True)) * self.seen
        self.pattern = exponentials / exponentials.sum(-1, keepdim=True)
        self.z = torch.einsum("hts,hsd->htd", self.pattern, self.v)


def bucket(distance: int, both_sides: bool, n: int, furthest: int) -> int:
    """Which bias a key at `distance` from its query gets: exact when near, logarithmic when far (Raffel et al. 2020, section 2.1)."""
    first = 0
    if both_sides:
        n //= 2
        first, distance = n * (distance > 0), abs(distance)
    else:
        distance = max(-distance, 0)
    near = n // 2
    if distance < near:
        return first + distance
    return first + min(n - 1, near + int(math.log(distance / near) / math.log(furthest / near) * (n - near)))


class _Stack:
    """One stack's forward, kept for its relevance, and the relevance itself."""

    def __init__(self, w: Named, stack: str, n_heads: int, eps: float, rules: str, into: Named) -> None:
        self.w, self.stack, self.n_heads, self.eps, self.rules, self.into = w, stack, n_heads, eps, rules, into
        self.kept: list[Named] = []
        self.attentions: list[dict[str, BiasedAttention]] = []

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.w[f"{name}.weight"]

    def attend(self, name: str, x: Tensor, y: Tensor, bias: Tensor, seen: Tensor) -> tuple[BiasedAttention, Named]:
        """x asks, y is looked at."""
        layer = {part: given @ self.w[f"{name}.{part}.weight"].T for part, given in (("q", x), ("k", y), ("v", y))}
        attention = BiasedAttention(*(to_heads(layer[part], self.n_heads) for part in "qkv"), 1.0, bias, seen)
        layer |= {"x": x, "y": y, "z": from_heads(attention.z)}
        return attention, layer | {"o": layer["z"] @ self.w[f"{name}.o.weight"].T}

    def back(self, name: str, hooks: str, attention: BiasedAttention, layer: Named, relevance: Tensor) -> tuple[Tensor, Tensor]:
        """Relevance at what asks and at what is looked at, from that at what attention wrote."""
        at_z = share(self.w[f"{name}.o.weight"], layer["z"], layer["o"], relevance)
        parts = attention.relevance(self.rules, to_heads(at_z, self.n_heads))
        flat = {part: from_heads(parts[part]) for part in "qkv"}
        into = {part: share(self.w[f"{name}.{part}.weight"], layer["x" if part == "q" else "y"], layer[part], flat[part]) for part in "qkv"}
        self.into[f"{hooks}.o.hook_in"] = at_z.unflatten(-1, (self.n_heads, -1))
        for part in "qkv":
            self.into[f"{hooks}.{part}.hook_out"] = flat[part].unflatten(-1, (self.n_heads, -1))
            self.into[f"{hooks}.{part}.hook_in"] = into[part]
        for name_, key in (("hook_pattern", "pattern"), ("hook_attn_scores", "scores")):
            if key in parts:
                self.into[f"{hooks}.{name_}"] = parts[key]
        return into["q"], into["k"] + into["v"]


def t5(
    w: Named,
    source: Tensor,
    target: Tensor,
    n_layers: int,
    n_heads: int,
    eps: float,
    far: tuple[int, int],
    rules: str,
    answer: int,
    wrong: int,
) -> Explained:
    """w: the state of a T5ForConditionalGeneration (relu, tied embeddings); source, target: ids of one row; far: buckets, max distance."""
    result = Explained(torch.empty(0))
    encoder, decoder = (_Stack(w, stack, n_heads, eps, rules, result.relevance) for stack in ("encoder", "decoder"))

    def bias(stack: str, n: int) -> Tensor:
        table = w[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        rows = [[table[bucket(s - t, stack == "encoder", *far)] for s in range(n)] for t in range(n)]
        return torch.stack([torch.stack(row) for row in rows]).movedim(-1, 0)

    def feed_forward(stack: _Stack, name: str, x: Tensor) -> tuple[Tensor, Named]:
        n = stack.norm(f"{name}.layer_norm", x)
        up = n @ w[f"{name}.DenseReluDense.wi.weight"].T
        out = up.clamp(min=0) @ w[f"{name}.DenseReluDense.wo.weight"].T
        return x + out, {"pre": x, "n": n, "up": up, "post": up.clamp(min=0), "out": out}

    def feed_back(name: str, hooks: str, layer: Named, relevance: Tensor) -> Tensor:
        past, written = split_sum([layer["pre"], layer["out"]], relevance)
        post = share(w[f"{name}.DenseReluDense.wo.weight"], layer["post"], layer["out"], written)
        result.relevance[f"{hooks}.mlp.out.hook_in"] = post  # and, by the identity rule, all of it before the relu
        return past + share(w[f"{name}.DenseReluDense.wi.weight"], layer["n"], layer["up"], post)  # the RMS norm hands it on whole

    def self_attend(stack: _Stack, i: int, x: Tensor, added: Tensor, seen: Tensor) -> Tensor:
        n = stack.norm(f"{stack.stack}.block.{i}.layer.0.layer_norm", x)
        attention, layer = stack.attend(f"{stack.stack}.block.{i}.layer.0.SelfAttention", n, n, added, seen)
        stack.attentions.append({"self": attention})
        stack.kept.append({f"self.{key}": value for key, value in layer.items()} | {"pre": x})
        return x + layer["o"]

    x, m = w["shared.weight"][source], len(source)
    for i in range(n_layers):
        x = self_attend(encoder, i, x, bias("encoder", m), torch.ones(m, m, dtype=torch.bool))
        x, layer = feed_forward(encoder, f"encoder.block.{i}.layer.1", x)
        encoder.kept[i] |= {f"mlp.{key}": value for key, value in layer.items()}
    memory = encoder.norm("encoder.final_layer_norm", x)
    x, n = w["shared.weight"][target], len(target)
    for i in range(n_layers):
        x = self_attend(decoder, i, x, bias("decoder", n), torch.ones(n, n, dtype=torch.bool).tril())
        name = f"decoder.block.{i}.layer.1"
        attention, layer = decoder.attend(
            f"{name}.EncDecAttention",
            decoder.norm(f"{name}.layer_norm", x),
            memory,
            torch.zeros(n, m, dtype=x.dtype),
            torch.ones(n, m).bool(),
        )
        decoder.attentions[i]["cross"] = attention
        decoder.kept[i] |= {f"cross.{key}": value for key, value in layer.items()} | {"mid": x}
        x, layer = feed_forward(decoder, f"decoder.block.{i}.layer.2", x + layer["o"])
        decoder.kept[i] |= {f"mlp.{key}": value for key, value in layer.items()}
    final = decoder.norm("decoder.final_layer_norm", x) * x.shape[-1] ** -0.5
    result.logits = final @ w["shared.weight"].T

    def of(layer: Named, part: str) -> Named:
        return {key.split(".", 1)[1]: value for key, value in layer.items() if key.startswith(f"{part}.")}

    relevance = share(w["shared.weight"], final, result.logits, start(result.logits, answer, wrong))
    at_memory = torch.zeros_like(memory)
    result.relevance[f"decoder_blocks.{n_layers - 1}.hook_out"] = relevance
    for i in reversed(range(n_layers)):
        layer, hooks = decoder.kept[i], f"decoder_blocks.{i}"
        relevance = feed_back(f"decoder.block.{i}.layer.2", hooks, of(layer, "mlp"), relevance)
        past, written = split_sum([layer["mid"], layer["cross.o"]], relevance)
        name = f"decoder.block.{i}.layer.1.EncDecAttention"
        asks, looked_at = decoder.back(name, f"{hooks}.cross_attn", decoder.attentions[i]["cross"], of(layer, "cross"), written)
        at_memory = at_memory + looked_at
        past, written = split_sum([layer["pre"], layer["self.o"]], past + asks)
        name = f"decoder.block.{i}.layer.0.SelfAttention"
        asks, looked_at = decoder.back(name, f"{hooks}.self_attn", decoder.attentions[i]["self"], of(layer, "self"), written)
        relevance = past + asks + looked_at
        result.relevance[f"{hooks}.hook_in"] = relevance
    result.relevance["encoder_ln_final.hook_out"] = relevance = at_memory
    for i in reversed(range(n_layers)):
        layer, hooks = encoder.kept[i], f"encoder_blocks.{i}"
        relevance = feed_back(f"encoder.block.{i}.layer.1", hooks, of(layer, "mlp"), relevance)
        past, written = split_sum([layer["pre"], layer["self.o"]], relevance)
        name = f"encoder.block.{i}.layer.0.SelfAttention"
        asks, looked_at = encoder.back(name, f"{hooks}.attn", encoder.attentions[i]["self"], of(layer, "self"), written)
        relevance = past + asks + looked_at
        result.relevance[f"{hooks}.hook_in"] = relevance
    return result
