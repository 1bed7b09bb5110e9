"""Every attention method on a GPT-2, a BERT, a ViT and a T5 against loops over the model's own tensors, written from the papers.

Attention is computed anew from the queries, keys and values that pass the HookPoints, and takes the place of the model's own z, so that the
patterns are tensors of the test's own graph. T5's come from Hugging Face's own model. chefer_2021a by its own rules is in
test_chefer_2021a.py; of T5 chefer_2021b, weighted accumulation and rollout are in test_two_sets.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import networkx as nx
import pytest
import torch
from torch import Tensor

from analyses.benchmarks.tiny_models import build
from lens_relevance import logit, propagate, token_relevance
from tests import models
from tests.attention_methods import test_two_sets as two_sets
from tests.classifiers import build_classifier, inputs_for
from tests.precision import no_upcasts

FAMILIES = ("gpt2", "bert_classifier", "vit")
BY_PATTERNS = ["chefer_2021b", "rollout", "attention_flow", "legrad", "gradient_attention", "raw_attention"]
N_LAYERS = 2


@dataclass
class Run:
    """One forward: A and dA by layer, [batch, head, query, key], the stream, what attention added and its gradient, and other tensors."""

    model: object
    inputs: Tensor
    row: int
    label: int
    patterns: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    before: list[Tensor] = field(default_factory=list)
    written: list[Tensor] = field(default_factory=list)
    gradients_written: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    seen: dict[str, Tensor] = field(default_factory=dict)


@cache
def run(family: str) -> Run:
    model = {"gpt2": lambda: build("gpt2"), "roberta": lambda: build("roberta")}.get(family, lambda: build_classifier(family))()
    inputs = inputs_for("vit")[0] if family == "vit" else models.random_tokens()
    result = Run(model, inputs, -1 if family in ("gpt2", "roberta") else 0, 7 if family in ("gpt2", "roberta") else 1)
    heads, kept = model.cfg.n_heads, {}

    def split(x: Tensor) -> Tensor:
        return x.flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2)

    def keep(x, hook):
        kept[hook.name] = x

    def attend(x, hook):
        q, k, v = (split(kept[hook.name.replace("o.hook_in", f"{part}.hook_out")]) for part in "qkv")
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if family == "gpt2":
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
        result.patterns.append(scores.softmax(-1))
        result.values.append(v)
        return (result.patterns[-1] @ v).transpose(1, 2).reshape(x.shape)

    written = "attn.o.hook_out" if family in ("bert_classifier", "roberta") else "attn.hook_out"
    points = ("hook_in", written, "ln1.hook_in", "ln2.hook_in", "attn.q.hook_out", "attn.k.hook_out", "attn.v.hook_out")
    hooks = [(f"blocks.{i}.{point}", keep) for i in range(N_LAYERS) for point in points]
    with no_upcasts(), model.hooks(fwd_hooks=[*hooks, *((f"blocks.{i}.attn.o.hook_in", attend) for i in range(N_LAYERS))]):
        logits = model(inputs, return_type="logits")
    target = (logits[:, -1] if result.row else logits.flatten(0, -2))[:, result.label].sum()
    result.before = [kept[f"blocks.{i}.hook_in"].detach() for i in range(N_LAYERS)]
    result.written = [kept[f"blocks.{i}.{written}"] for i in range(N_LAYERS)]
    gradients = torch.autograd.grad(target, [*result.patterns, *result.written])
    result.gradients, result.gradients_written = list(gradients[:N_LAYERS]), list(gradients[N_LAYERS:])
    result.patterns, result.written, result.values = ([x.detach() for x in xs] for xs in (result.patterns, result.written, result.values))
    result.seen = {name: x.detach() for name, x in kept.items()}
    return result


def most_flow(steps: list[Tensor], token: int) -> Tensor:
    """Of one example: how much can flow from a token above the last layer to each input, through capacities [token, source]."""
    graph, n = nx.DiGraph(), len(steps[0])
    for layer, capacities in enumerate(steps):
        for upper in range(n):
            for lower in range(n):
                if capacities[upper, lower] > 0:
                    graph.add_edge((layer + 1, upper), (layer, lower), capacity=float(capacities[upper, lower]))
    top = (len(steps), token % n)
    return torch.tensor([nx.maximum_flow_value(graph, top, (0, i)) if (0, i) in graph else 0.0 for i in range(n)], dtype=torch.float64)


def by_loop(method: str, patterns: list[Tensor], gradients: list[Tensor], row: int) -> Tensor:
    """Scores of one example; patterns and their gradients [head, query, key]."""
    n, n_heads = patterns[0].shape[-1], len(patterns[0])
    eye = torch.eye(n, dtype=torch.float64)
    if method == "raw_attention":
        return sum(head[row] for head in patterns[-1]) / n_heads
    if method == "gradient_attention":
        return sum((a[h] * g[h]).sum(0) / n_heads for a, g in zip(patterns, gradients, strict=True) for h in range(n_heads))
    if method == "legrad":
        per_head = [torch.where(a[h] > 0, g[h].clamp(min=0), 0.0) for a, g in zip(patterns, gradients, strict=True) for h in range(n_heads)]
        return sum(one.mean(0) for one in per_head) / n_heads
    if method == "chefer_2021b":
        r = eye
        for a, g in zip(patterns, gradients, strict=True):
            r = r + sum((a[h] * g[h]).clamp(min=0) for h in range(n_heads)) / n_heads @ r
        return r[row]
    steps = [(sum(a) / n_heads + eye) / (sum(a) / n_heads + eye).sum(-1, keepdim=True) for a in patterns]
    if method == "attention_flow":
        return most_flow(steps, row)
    r = eye
    for step in steps:
        r = step @ r
    return r[row]


@pytest.mark.parametrize("method", BY_PATTERNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_methods_of_patterns_and_gradients(family: str, method: str) -> None:
    own = run(family)
    with no_upcasts():
        found = token_relevance(own.model, own.inputs, logit(own.label), method=method)
    for i in range(2):
        expected = by_loop(method, [a[i] for a in own.patterns], [g[i] for g in own.gradients], own.row)
        torch.testing.assert_close(found.scores[i], expected, rtol=1e-9, atol=1e-9)
        assert expected.abs().max() > 1e-6


@pytest.mark.parametrize("importance", ["relevance", "norm", "grad_norm"])
@pytest.mark.parametrize("family", [*FAMILIES, "roberta"])
def test_weighted_accumulation(family: str, importance: str) -> None:
    """alpha : beta is what attention adds to the stream (in BERT its output projection, before the norm) to what was there."""
    own = run(family)
    with no_upcasts():
        found = token_relevance(own.model, own.inputs, logit(own.label), importance=importance)

    def size(x: Tensor, g: Tensor) -> float:
        return {"relevance": abs(float(x @ g)), "norm": float(x.norm()), "grad_norm": float((x * g).norm())}[importance]

    for i in range(2):
        r = torch.eye(own.patterns[0].shape[-1], dtype=torch.float64)
        for layer in range(N_LAYERS):
            bar = (own.patterns[layer][i] * own.gradients[layer][i]).clamp(min=0).mean(0)
            rows = []
            for token in range(len(r)):
                g = own.gradients_written[layer][i, token]
                added, there = size(own.written[layer][i, token], g), size(own.before[layer][i, token], g)
                alpha = 2 * added / (added + there) if added + there > 0 else 1.0
                rows.append((2 - alpha) * r[token] + alpha * (bar[token] @ r))
            r = torch.stack(rows)
        torch.testing.assert_close(found.scores[i], r[own.row], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["vit", "roberta"])
def test_globenc(family: str) -> None:
    """One source's vector after the other through the norms that follow (both in RoBERTa, the MLP's in a ViT); GPT-2, NeoX, BERT, Gemma 2
    and OLMo 2 are in test_token_relevance.py."""
    own = run(family)
    with no_upcasts():
        found = token_relevance(own.model, own.inputs, logit(own.label), method="globenc").layers
    for layer in range(N_LAYERS):
        if family == "vit":
            original = own.model.original_model.vit.layers[layer]
            projection, eps, norms = original.attention.o_proj.weight, 1e-12, [(original.layernorm_after, "ln2")]
        else:
            original = own.model.original_model.roberta.encoder.layer[layer]
            projection, eps = original.attention.output.dense.weight, original.output.LayerNorm.eps
            norms = [(original.attention.output.LayerNorm, "ln1"), (original.output.LayerNorm, "ln2")]
        n = own.patterns[0].shape[-1]
        for i in range(n):
            for j in range(n):
                brought = (own.patterns[layer][0, :, i, j, None] * own.values[layer][0, :, j]).flatten()
                z = projection @ brought + (own.before[layer][0, i] if i == j else 0)
                for norm, name in norms:
                    read = own.seen[f"blocks.{layer}.{name}.hook_in"][0, i]
                    z = (z - z.mean()) / (read.var(unbiased=False) + eps).sqrt() * norm.weight
                torch.testing.assert_close(found[0, layer, i, j], z.norm().detach(), rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def t5():
    with no_upcasts():
        return two_sets.build("t5"), two_sets.attentions_of("t5", two_sets.INPUTS)


@pytest.mark.parametrize("method", ["chefer_2021a", "attention_flow", "legrad", "gradient_attention", "raw_attention"])
def test_a_t5(t5, method: str) -> None:
    """The encoder's five tokens, then the decoder's three; the decoder's last token is explained."""
    (model, attentions), span = t5, {"encoder": slice(0, 5), "decoder": slice(5, 8)}
    with no_upcasts():
        found = token_relevance(
            model, two_sets.INPUTS, logit(two_sets.ANSWER), method=method, rules="attnlrp" if "2021a" in method else None
        )
        names = list(found.attentions)
        lrp = propagate(model, two_sets.INPUTS, logit(two_sets.ANSWER), rules="attnlrp", names_filter=names)
    for i in range(2):
        joint, scores, steps = torch.eye(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64), []
        for name, (queries, sources, pattern, gradient) in zip(names, attentions, strict=True):
            a, g, step = pattern[i], gradient[i], torch.zeros(8, 8, dtype=torch.float64)
            step[span[queries], span[sources]] = a.mean(0)
            steps.append((step + torch.eye(8)) / (step + torch.eye(8)).sum(-1, keepdim=True))
            if method == "legrad":
                scores[span[sources]] += torch.where(a > 0, g.clamp(min=0), 0.0).mean((0, 1))
            elif method == "gradient_attention":
                scores[span[sources]] += (a * g).mean(0).sum(0)
            elif method == "raw_attention" and queries == "decoder":
                scores[span[sources]] = a.mean(0)[-1]  # the last attention to each set stays
            elif method == "chefer_2021a":
                bar = torch.zeros(8, 8, dtype=torch.float64)
                bar[span[queries], span[sources]] = (g * lrp[name][i]).clamp(min=0).mean(0)
                joint = joint + bar @ joint
        scores = {"attention_flow": lambda: most_flow(steps, -1), "chefer_2021a": lambda: joint[-1]}.get(method, lambda: scores)()  # noqa: B023
        for name in two_sets.SETS:
            torch.testing.assert_close(found.scores[name][i], scores[span[name]], rtol=1e-9, atol=1e-9)
        assert scores.abs().max() > 1e-6
