"""Components that compute something else than their site says: one entry of `FAULTS` each.

A fault is made by hooks of PyTorch on modules, by methods and forwards put in place of others, or by functions put in place of those of a
library: everything but hooks of HookPoints, which are the user's own and are followed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

Change = Callable[[Tensor], Tensor]
Make = Callable[[Any, pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: What is wrong, in words.
        family: of the table of tiny models.
        make: Puts the fault into a model.
        is_linear: whether it is linear between HookPoints, so that the backward passes it as it is and the numbers are right.
        is_kink: whether it is linear for each run by itself, and not between two (a ReLU on the stream).
        late: whether it is made after a first call, when the model has been compared already.
    """

    name: str
    family: str
    make: Make
    is_linear: bool = False
    is_kink: bool = False
    late: bool = False

    def __str__(self) -> str:
        return f"{self.family}: {self.name}"


def at(model: Any, path: str) -> Any:
    """A component of a bridge, or a module below it."""
    found = model
    for part in path.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    return found


def _changed(output: Any, change: Change) -> Any:
    """What a module returned, with its first tensor changed."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    name = "logits" if "logits" in output else "last_hidden_state"
    output[name] = change(output[name])
    return output


def after(path: str, change: Change) -> Make:
    """What a module returns is changed."""
    return lambda model, patch: at(model, path).register_forward_hook(lambda _, args, output: _changed(output, change)) and None


def before(path: str, change: Change) -> Make:
    """What a module is called with first is changed."""

    def make(model: Any, patch: pytest.MonkeyPatch) -> None:
        at(model, path).register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))

    return make


def method(path: str, name: str, from_old: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Make:
    """A method is another one, made from what it was."""

    def make(model: Any, patch: pytest.MonkeyPatch) -> None:
        component = at(model, path)
        object.__setattr__(component, name, from_old(getattr(component, name)))  # a plain assignment would go to the wrapped module

    return make


def forward(path: str, computes: Callable[..., Any]) -> Make:
    """A module's forward is another function of the module and its arguments."""

    def make(model: Any, patch: pytest.MonkeyPatch) -> None:
        module = at(model, path)
        object.__setattr__(module, "forward", MethodType(computes, module))

    return make


def function(module: str, name: str, from_old: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Make:
    """A function of a library is another one, made from what it was."""

    def make(model: Any, patch: pytest.MonkeyPatch) -> None:
        holder = importlib.import_module(module)
        patch.setattr(holder, name, from_old(getattr(holder, name)))

    return make


def _scaled_output(factor: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return lambda old: lambda *args, **kwargs: _changed(old(*args, **kwargs), lambda x: x * factor)


def _of_first(change: Change) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A function whose first argument is changed."""
    return lambda old: lambda first, *args, **kwargs: old(change(first), *args, **kwargs)


def _of_heads(
    q: Change | None = None, k: Change | None = None, v: Change | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Queries, keys and values are changed as they are split into heads."""

    def make(old: Callable[..., Any]) -> Callable[..., Any]:
        def reshape(*args: Any, **kwargs: Any) -> Any:
            split = old(*args, **kwargs)
            changed = [x if change is None else change(x) for x, change in zip(split, (q, k, v), strict=False)]
            return (*changed, *split[3:])

        return reshape

    return make


def _gelu(x: Tensor) -> Tensor:
    return functional.gelu(x)


def _half_detached(x: Tensor) -> Tensor:
    kept, cut = x.tensor_split(2, -1)
    return torch.cat([kept, cut.detach()], -1)


def _half_of_heads_detached(x: Tensor) -> Tensor:  # [batch, head, pos, d_head]
    kept, cut = x.tensor_split(2, 1)
    return torch.cat([kept, cut.detach()], 1)


def _norm_of_constant_scale(module: Any, x: Tensor) -> Tensor:
    scale = (x.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()
    return module.weight * (x * scale.detach())


def _adapter(x: Tensor) -> Tensor:
    """A low-rank update, as of a fine-tuned layer whose weights were not merged."""
    down = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)
    return x + 0.3 * (x @ down).unsqueeze(-1) * down.flip(0)


def _soft_cap(cap: float) -> Change:
    return lambda x: cap * torch.tanh(x / cap)


_MLP, _ATTN, _BLOCK = "blocks.1.mlp.original_component", "blocks.1.attn", "blocks.0.original_component"

_GPT2: list[Fault] = [
    # MLPs
    Fault("an MLP that doubles its neurons", "gpt2", forward(_MLP, lambda m, x: m.c_proj(2 * m.act(m.c_fc(x))))),
    Fault("an MLP with ReLU where `act` says GELU", "gpt2", forward(_MLP, lambda m, x: m.c_proj(functional.relu(m.c_fc(x))))),
    Fault("an MLP that adds a constant to its neurons", "gpt2", forward(_MLP, lambda m, x: m.c_proj(m.act(m.c_fc(x)) + 0.1))),
    Fault("an MLP that clamps its neurons", "gpt2", forward(_MLP, lambda m, x: m.c_proj(m.act(m.c_fc(x)).clamp(max=0.2)))),
    Fault(
        "an MLP that leaves half of its neurons out",
        "gpt2",
        forward(_MLP, lambda m, x: m.c_proj(m.act(m.c_fc(x)) * (torch.arange(64) % 2))),
    ),
    Fault("an MLP that doubles what it writes", "gpt2", after(_MLP, lambda x: 2 * x), is_linear=True),
    Fault("an MLP that writes through a GELU", "gpt2", after(_MLP, _gelu)),
    Fault("an MLP that adds a constant to what it writes", "gpt2", after(_MLP, lambda x: x + 0.5)),
    Fault("an MLP whose input goes through a tanh", "gpt2", before(_MLP, torch.tanh)),
    Fault("an MLP that multiplies what it writes by itself", "gpt2", after(_MLP, lambda x: x * x.sigmoid())),
    Fault("an MLP off the graph", "gpt2", after(_MLP, Tensor.detach)),
    Fault("a first layer with another bias", "gpt2", after("blocks.1.mlp.in.original_component", lambda x: x + 0.1)),
    Fault("a second layer twice as large", "gpt2", after("blocks.1.mlp.out.original_component", lambda x: 2 * x)),
    Fault("a second layer with an adapter", "gpt2", before("blocks.1.mlp.out.original_component", _adapter)),
    # attention
    Fault("scores times 1.7", "gpt2", method(_ATTN, "_reshape_qkv_to_heads", _of_heads(q=lambda q: 1.7 * q))),
    Fault("keys with a constant", "gpt2", method(_ATTN, "_reshape_qkv_to_heads", _of_heads(k=lambda k: k + torch.arange(4.0) / 8))),
    Fault("queries through a tanh", "gpt2", method(_ATTN, "_reshape_qkv_to_heads", _of_heads(q=torch.tanh))),
    Fault("queries of another head", "gpt2", method(_ATTN, "_reshape_qkv_to_heads", _of_heads(q=lambda q: q.roll(1, 1)))),
    Fault("a softmax at another temperature", "gpt2", method(_ATTN, "_masked_softmax", _of_first(lambda s: 1.7 * s))),
    Fault(
        "scores soft-capped after their HookPoint",
        "gpt2",
        method(_ATTN, "_masked_softmax", _of_first(lambda s: _soft_cap(1.0)(s.clamp(min=-50)))),
    ),
    Fault("a pattern scaled after hook_pattern", "gpt2", method(_ATTN, "_softmax_dropout_pattern", _scaled_output(1.5))),
    Fault(
        "a pattern sharpened after hook_pattern",
        "gpt2",
        method(_ATTN, "_softmax_dropout_pattern", lambda old: lambda *a, **k: (p := old(*a, **k) ** 2) / p.sum(-1, keepdim=True)),
    ),
    Fault("values halved", "gpt2", method(_ATTN, "_reshape_qkv_to_heads", _of_heads(v=lambda v: v / 2))),
    Fault("values of another head", "gpt2", method(_ATTN, "_reshape_qkv_to_heads", _of_heads(v=lambda v: v.roll(1, 1)))),
    Fault("values through a ReLU", "gpt2", method(_ATTN, "_reshape_qkv_to_heads", _of_heads(v=torch.relu))),
    Fault("values off the graph", "gpt2", method(_ATTN, "_reshape_qkv_to_heads", _of_heads(v=Tensor.detach))),
    Fault("z scaled before the output projection", "gpt2", method(_ATTN, "_apply_output_projection", _of_first(lambda z: 1.3 * z))),
    Fault(
        "z clamped before the output projection", "gpt2", method(_ATTN, "_apply_output_projection", _of_first(lambda z: z.clamp(-0.1, 0.1)))
    ),
    Fault("an output projection with an adapter", "gpt2", before("blocks.1.attn.o.original_component", _adapter)),
    Fault("queries from an adapter", "gpt2", after("blocks.1.attn.q.original_component", _adapter)),
    Fault("an attention that doubles what it writes", "gpt2", after(_ATTN, lambda x: 2 * x), is_linear=True),
    Fault("an attention gated by what it writes", "gpt2", after(_ATTN, lambda x: x * x.sigmoid())),
    Fault("an attention off the graph", "gpt2", after(_ATTN, Tensor.detach)),
    # norms
    Fault("a norm of another size", "gpt2", method("blocks.1.ln2", "_apply_weight_and_bias", _scaled_output(1.1))),
    Fault("a norm half a percent larger", "gpt2", method("blocks.1.ln2", "_apply_weight_and_bias", _scaled_output(1.005))),
    Fault("a norm with a tanh before its weight", "gpt2", method("blocks.1.ln2", "_apply_weight_and_bias", _of_first(torch.tanh))),
    Fault(
        "a norm that leaves the mean in", "gpt2", before("blocks.1.ln2", lambda x: x + x.mean(-1, keepdim=True).tanh() * torch.arange(16.0))
    ),
    Fault("a norm that is none", "gpt2", forward("blocks.1.ln1", lambda m, x: m.hook_out(m.original_component.weight * m.hook_in(x)))),
    # the residual stream
    Fault("a block that ends in a GELU", "gpt2", after(_BLOCK, _gelu)),
    Fault("a block that ends in a ReLU", "gpt2", after(_BLOCK, torch.relu), is_kink=True),
    Fault("a block that ends in a tanh", "gpt2", after(_BLOCK, torch.tanh)),
    Fault("a block that ends in a norm", "gpt2", after(_BLOCK, lambda x: functional.layer_norm(x, x.shape[-1:]))),
    Fault("a block that adds a constant", "gpt2", after(_BLOCK, lambda x: x + 0.5)),
    Fault("a block that multiplies by a gate", "gpt2", after(_BLOCK, lambda x: x * x.mean(-1, keepdim=True).sigmoid())),
    Fault("a block that clamps", "gpt2", after(_BLOCK, lambda x: x.clamp(-0.3, 0.3))),
    Fault("a block that scales", "gpt2", after(_BLOCK, lambda x: 1.5 * x), is_linear=True),
    Fault("a block that mixes features", "gpt2", after(_BLOCK, _adapter), is_linear=True),
    Fault("a block that mixes positions", "gpt2", after(_BLOCK, lambda x: x + 0.3 * x.cumsum(1)), is_linear=True),
    Fault("a stream off the graph", "gpt2", after(_BLOCK, Tensor.detach)),
    Fault("a stream half off the graph", "gpt2", after(_BLOCK, lambda x: (x + x.detach()) / 2)),
    # embeddings
    Fault("embeddings through a tanh", "gpt2", after("original_model.transformer.drop", torch.tanh)),
    Fault("embeddings with a constant", "gpt2", after("original_model.transformer.drop", lambda x: x + 0.3)),
    Fault("embeddings times positions", "gpt2", after("pos_embed", lambda x: x * x)),
    Fault("embeddings doubled", "gpt2", after("original_model.transformer.drop", lambda x: 2 * x), is_linear=True),
    # the head
    Fault("an unembedding with a soft-cap", "gpt2", after("unembed.original_component", _soft_cap(1.0))),
    Fault("an unembedding with a bias", "gpt2", after("unembed.original_component", lambda x: x + torch.arange(50.0) / 50)),
    Fault("an unembedding of another temperature", "gpt2", after("unembed.original_component", lambda x: x / 0.7)),
    Fault("an unembedding with an adapter", "gpt2", before("unembed.original_component", _adapter)),
    Fault("logits with a soft-cap that no config names", "gpt2", after("original_model", _soft_cap(1.0))),
    Fault("logits as log-probabilities", "gpt2", after("original_model", lambda x: x.log_softmax(-1))),
    Fault("logits with a bias of their own", "gpt2", after("original_model", lambda x: x + torch.arange(50.0) / 50)),
    Fault("logits of another temperature", "gpt2", after("original_model", lambda x: x / 0.7), is_linear=True),
    Fault("a final norm appfaultd twice", "gpt2", after("ln_final", lambda x: functional.layer_norm(x, x.shape[-1:]))),
    # after the first call
    Fault("a norm changed after the first call", "gpt2", method("blocks.1.ln2", "_apply_weight_and_bias", _scaled_output(1.1)), late=True),
    Fault("an MLP changed after the first call", "gpt2", forward(_MLP, lambda m, x: m.c_proj(2 * m.act(m.c_fc(x)))), late=True),
    Fault("a hook on a module after the first call", "gpt2", after(_BLOCK, _gelu), late=True),
    Fault("an attention changed after the first call", "gpt2", method(_ATTN, "_masked_softmax", _of_first(lambda s: 1.7 * s)), late=True),
    Fault("an unembedding hooked after the first call", "gpt2", after("unembed.original_component", _soft_cap(1.0)), late=True),
]


def _repeated_otherwise(old: Callable[..., Any]) -> Callable[..., Any]:
    """Key-value heads repeated head by head in turns instead of in groups."""
    return lambda x, n: x if n == 1 else torch.cat([x] * n, 1)


def _scores_scaled(old: Callable[..., Any]) -> Callable[..., Any]:
    """Hugging Face's own attention, with another scale."""
    return lambda module, q, *args, **kwargs: old(module, 1.3 * q, *args, **kwargs)


def _values_scaled(old: Callable[..., Any]) -> Callable[..., Any]:
    return lambda module, q, k, v, *args, **kwargs: old(module, q, k, v.relu(), *args, **kwargs)


def _experts(change: Change) -> Make:
    return after("blocks.1.mlp.original_component.experts", change)


_GATED = "blocks.1.mlp.original_component"
_LLAMA: list[Fault] = [
    Fault(
        "ReLU where `act_fn` says SiLU", "llama", forward(_GATED, lambda m, x: m.down_proj(functional.relu(m.gate_proj(x)) * m.up_proj(x)))
    ),
    Fault("gate and up exchanged", "llama", forward(_GATED, lambda m, x: m.down_proj(m.gate_proj(x) * m.act_fn(m.up_proj(x))))),
    Fault("a gated product doubled", "llama", forward(_GATED, lambda m, x: m.down_proj(2 * m.act_fn(m.gate_proj(x)) * m.up_proj(x)))),
    Fault("a gate without its activation", "llama", forward(_GATED, lambda m, x: m.down_proj(m.gate_proj(x) * m.up_proj(x)))),
    Fault("up clamped", "llama", forward(_GATED, lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x).clamp(-0.3, 0.3)))),
    Fault(
        "a norm with another eps",
        "llama",
        forward("blocks.1.ln2.original_component", lambda m, x: m.weight * x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt()),
    ),
    Fault("a norm one percent larger", "llama", after("blocks.1.ln2.original_component", lambda x: 1.01 * x)),
    Fault("a norm that centres", "llama", before("blocks.1.ln2.original_component", lambda x: x - x.mean(-1, keepdim=True))),
    Fault("z clamped before the output projection", "llama", before("blocks.1.attn.o", lambda z: z.clamp(-0.1, 0.1))),
    Fault("z of another head", "llama", before("blocks.1.attn.o", lambda z: z.roll(4, -1))),
    Fault("a softmax at another temperature", "llama", method(_ATTN, "_masked_softmax", _of_first(lambda s: 1.7 * s))),
    Fault(
        "scores scaled before their HookPoint",
        "llama",
        method(_ATTN, "_apply_reconstruct_attention_mask", lambda old: lambda **k: old(**(k | {"attn_scores": 1.7 * k["attn_scores"]}))),
    ),
    Fault("queries through a tanh before the rotation", "llama", after("blocks.1.attn.q", torch.tanh)),
    Fault("queries longer before the rotation", "llama", after("blocks.1.attn.q", lambda q: 1.5 * q), is_linear=True),
    Fault("a stream through a GELU", "llama", after(_BLOCK, _gelu)),
    Fault("embeddings scaled", "llama", after("embed", lambda x: 4 * x), is_linear=True),
    Fault("embeddings through a norm", "llama", after("embed", lambda x: functional.layer_norm(x, x.shape[-1:]))),
    Fault("logits with a soft-cap that no config names", "llama", after("original_model", _soft_cap(1.0))),
    Fault("a norm of queries one percent larger", "qwen3", after("blocks.1.attn.q_norm.original_component", lambda x: 1.01 * x)),
    Fault("a norm of keys with a tanh", "qwen3", after("blocks.1.attn.k_norm.original_component", torch.tanh)),
    Fault("a post-norm through a tanh", "gemma2", after("blocks.1.ln2_post", torch.tanh)),
    Fault("logits capped twice", "gemma2", after("original_model", _soft_cap(1.0))),
    Fault(
        "scores without their soft-cap",
        "gemma2",
        method(
            _ATTN,
            "_apply_reconstruct_attention_mask",
            lambda old: lambda **k: old(**(k | {"attn_scores": 2 * torch.atanh((k["attn_scores"] / 2).clamp(-0.99, 0.99))})),
        ),
    ),
    Fault("an MLP between its norms doubled", "olmo2", after("blocks.1.mlp", lambda x: 2 * x), is_linear=True),
    Fault("attention doubled, in a parallel block", "neox_parallel", after(_ATTN, lambda x: 2 * x), is_linear=True),
    Fault("a parallel block that ends in a GELU", "neox_parallel", after(_BLOCK, _gelu)),
    Fault(
        "queries of another head, rotated inside",
        "neox_parallel",
        method(_ATTN, "_apply_rotary_pos_emb", lambda old: lambda q, *a, **k: old(q.roll(1, 1), *a, **k)),
    ),
]

_REBUILT: list[Fault] = [
    Fault("attention of another scale", "opt", function("transformers.models.opt.modeling_opt", "eager_attention_forward", _scores_scaled)),
    Fault("values through a ReLU", "opt", function("transformers.models.opt.modeling_opt", "eager_attention_forward", _values_scaled)),
    Fault(
        "attention of another scale", "bert", function("transformers.models.bert.modeling_bert", "eager_attention_forward", _scores_scaled)
    ),
    Fault("values through a ReLU", "bert", function("transformers.models.bert.modeling_bert", "eager_attention_forward", _values_scaled)),
    Fault("a head's transform doubled", "bert", after("original_model.cls.predictions.transform", lambda x: 2 * x), is_linear=True),
    Fault("a head's transform through a tanh", "bert", after("original_model.cls.predictions.transform", torch.tanh)),
    Fault(
        "a pooler with another activation", "bert_classifier", forward("pooler.original_component", lambda m, x: m.dense(x[:, 0]).relu())
    ),
    Fault("a classifier with a soft-cap", "bert_classifier", after("original_model", _soft_cap(0.2))),
    Fault(
        "attention of another scale",
        "gptj",
        method("blocks.1.attn.original_component", "_attn", lambda old: lambda q, *a, **k: old(1.3 * q, *a, **k)),
    ),
    Fault(
        "an MLP with another activation",
        "opt",
        forward("blocks.1.mlp.in", lambda m, x: m.hook_out(m.original_component(m.hook_in(x))).tanh()),
    ),
    Fault("attention of another scale", "vit", function("transformers.models.vit.modeling_vit", "eager_attention_forward", _scores_scaled)),
    Fault("a classifier's logits through a tanh", "vit", after("original_model", torch.tanh)),
    Fault("patches through a tanh", "vit", before("blocks.0", torch.tanh)),
    Fault("a native block that ends in a GELU", "native", after("blocks.0.original_component", _gelu)),
    Fault("a native MLP through a tanh", "native", after("blocks.1.mlp", torch.tanh)),
    Fault("values of a native attention through a ReLU", "native", after("blocks.1.attn.v", torch.relu)),
]

_MIXTURES: list[Fault] = [
    Fault("experts doubled", "mixtral", _experts(lambda x: 2 * x)),
    Fault("experts through a tanh", "mixtral", _experts(torch.tanh)),
    Fault("experts with a bias", "mixtral", _experts(lambda x: x + 0.2)),
    Fault("experts doubled", "qwen3_moe", _experts(lambda x: 2 * x)),
    Fault("experts with other clamps", "gpt_oss", _experts(lambda x: x.clamp(-0.2, 0.2))),
    Fault("experts doubled, shared ones not", "deepseek_v3", _experts(lambda x: 2 * x)),
    Fault("shared experts through a tanh", "deepseek_v3", after("blocks.1.mlp.original_component.shared_experts", torch.tanh)),
    Fault("a mixture that doubles what it writes", "mixtral", after("blocks.1.mlp", lambda x: 2 * x), is_linear=True),
    Fault("keys of a latent attention through a tanh", "deepseek_v3", after("blocks.1.attn.kv_b_proj", torch.tanh)),
    Fault(
        "a norm of a latent one percent larger", "deepseek_v3", after("blocks.1.attn.kv_a_layernorm.original_component", lambda x: 1.01 * x)
    ),
    Fault(
        "a dense layer with another activation",
        "deepseek_v3",
        forward("blocks.0.mlp.original_component", lambda m, x: m.down_proj(functional.relu(m.gate_proj(x)) * m.up_proj(x))),
    ),
]

_ENCODER_DECODERS: list[Fault] = [
    Fault("an encoder that ends in a tanh", "t5", after("original_model.encoder", torch.tanh)),
    Fault("an encoder that doubles what it hands on", "t5", after("original_model.encoder", lambda x: 2 * x), is_linear=True),
    Fault("a decoder that ends in a GELU", "t5", after("original_model.decoder", _gelu)),
    Fault("a cross-attention that writes through a tanh", "t5", after("decoder_blocks.1.cross_attn", torch.tanh)),
    Fault("values of a cross-attention through a ReLU", "t5", after("decoder_blocks.1.cross_attn.v", torch.relu)),
    Fault("a norm two percent larger", "t5", after("encoder_blocks.1.ln2.original_component", lambda x: 1.02 * x)),
    Fault("an encoder that ends in a tanh", "bart", after("original_model.model.encoder", torch.tanh)),
    Fault(
        "attention of another scale", "bart", function("transformers.models.bart.modeling_bart", "eager_attention_forward", _scores_scaled)
    ),
    Fault("logits with a soft-cap", "bart", after("original_model", _soft_cap(1.0))),
    Fault("a decoder's stream through a GELU", "bart", after("decoder_blocks.0.original_component", _gelu)),
]

# Values are right, and a part of the gradient is lost.
_CUT_IN_PART: list[Fault] = [
    Fault("a first layer with half of its neurons off the graph", "gpt2", after("blocks.1.mlp.in.original_component", _half_detached)),
    Fault("a second layer that reads half off the graph", "gpt2", before("blocks.1.mlp.out.original_component", _half_detached)),
    Fault("half of the activations off the graph", "gpt2", forward(_MLP, lambda m, x: m.c_proj(_half_detached(m.act(m.c_fc(x)))))),
    Fault(
        "values of half of the heads off the graph", "gpt2", method(_ATTN, "_reshape_qkv_to_heads", _of_heads(v=_half_of_heads_detached))
    ),
    Fault(
        "queries of half of the heads off the graph", "gpt2", method(_ATTN, "_reshape_qkv_to_heads", _of_heads(q=_half_of_heads_detached))
    ),
    Fault("an output projection that reads half of z off the graph", "gpt2", before("blocks.1.attn.o.original_component", _half_detached)),
    Fault("half of the keys off the graph", "gpt2", after("blocks.1.attn.k.original_component", _half_detached)),
    Fault("half of a stream off the graph", "gpt2", after(_BLOCK, _half_detached)),
    Fault("an unembedding that reads half off the graph", "gpt2", before("unembed.original_component", _half_detached)),
    Fault("half of a gate off the graph", "llama", after("blocks.1.mlp.gate.original_component", _half_detached)),
    Fault("half of a norm off the graph", "llama", after("blocks.1.ln2.original_component", _half_detached)),
    Fault("half of the values off the graph", "llama", after("blocks.1.attn.v.original_component", _half_detached)),
    Fault("a norm with its scale off the graph", "llama", forward("blocks.1.ln2.original_component", _norm_of_constant_scale)),
    Fault(
        "a gate's activation with its slope off the graph",
        "llama",
        forward(_GATED, lambda m, x: m.down_proj((g := m.gate_proj(x)) * g.sigmoid().detach() * m.up_proj(x))),
    ),
    Fault("half of the experts' output off the graph", "mixtral", _experts(_half_detached)),
    Fault("half of the values off the graph", "opt", after("blocks.1.attn.v.original_component", _half_detached)),
]

FAULTS = [*_GPT2, *_LLAMA, *_REBUILT, *_MIXTURES, *_ENCODER_DECODERS, *_CUT_IN_PART]
