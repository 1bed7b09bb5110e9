"""A Hugging Face model for which TransformerLens has no adapter, with HookPoints at everything that it calls.

    model = HookedModule(hf_model, {"input_ids": tokens})
    blocks = [f"encoder.layer.{i}" for i in range(12)]
    stream = [*(f"{block}.hook_in" for block in blocks), f"{blocks[-1]}.hook_out"]
    declare_sites(model, model.sites({"encoder.layer": "blocks"}), embeddings=stream[:1], residual=stream,
                  z=[f"{block}.attention.hook_z" for block in blocks])
    propagate(model, tokens, logit(3), rules="attnlrp")

| HookPoint | tensor |
|---|---|
| `PATH.hook_in`, `PATH.hook_out` | what the submodule at PATH takes (its first tensor of numbers) and gives |
| `ATTENTION.hook_q`, `hook_k`, `hook_v` | [batch, head, pos, d_head] as they are multiplied: normed, rotated and scaled |
| `ATTENTION.hook_attn_scores`, `hook_pattern` | [batch, head, query, key] |
| `ATTENTION.hook_z` | [batch, pos, head * d_head] |

Attention is reached through transformers' attention interface, which nearly all of its models use. A product or a function that is
written into a module's forward, and is no module, has no HookPoints: declare it at those around it (the gate of a gated MLP lies between
`act_fn.hook_out`, `up_proj.hook_out` and `down_proj.hook_in`). What has no site shows as `unexplained` in the conservation account.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedRootModule import HookedRootModule
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2CLS
from transformers.masking_utils import eager_mask

from lens_relevance.errors import CoverageError, RelevanceError
from lens_relevance.rules import AttentionGeometry, Mix, Norm, Scores, Softmax
from lens_relevance.sites.declared import DeclaredSite, activation, linear, norm

_NAME = "lens_relevance"  # of our attention in transformers' registry
_ATTENTION_POINTS = ("hook_q", "hook_k", "hook_v", "hook_attn_scores", "hook_pattern", "hook_z")
_ACTIVATIONS: tuple[Any, ...] = tuple({entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()})
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


class HookedModule(HookedRootModule):
    """A model of Hugging Face's with HookPoints. What it returns are the logits, or its first output where it has no logits.

    The model is changed in place, as by any bridge: its attention goes through HookPoints, and it makes no KV cache.

    Args:
        model: a model in eval mode.
        example: keyword arguments of one forward, which shows what the model calls and with what.

    Raises:
        RelevanceError: the model is in train mode.
        CoverageError: its attention is not reached, or computes something else than softmax(scale * q k^T + mask) v.
    """

    def __init__(self, model: PreTrainedModel, example: Mapping[str, Shaped[Tensor, "*_input"]]) -> None:
        super().__init__()
        if model.training:
            raise RelevanceError("the model is in train mode, where dropout makes relevance random; call model.eval()")
        self.wrapped, self.config = model, model.config
        AttentionInterface.register(_NAME, _attend)
        AttentionMaskInterface.register(_NAME, eager_mask)
        with _undone_on_error(model):
            if hasattr(model.config, "use_cache"):
                model.config.use_cache = False
            before = self(**example)
            model.set_attn_implementation(_NAME)
            self.calls = _count_calls(model, lambda: self(**example))
            _check(before, self(**example))
            if not any(hasattr(module, "attention_geometry") for module in model.modules()):
                raise CoverageError(
                    f"{type(model).__name__} does not go through transformers' attention interface, so nothing is known of its attention; "
                    "derive a model with HookPoints of your own from HookedRootModule"
                )
        for path in self.calls:
            _add_hook_points(model.get_submodule(path))
        self.eval().setup()

    def setup(self) -> None:
        """HookPoints are named by their paths in the model itself."""
        self.mod_dict = dict([*self.wrapped.named_modules()][1:])
        self.hook_dict = {path: module for path, module in self.mod_dict.items() if isinstance(module, HookPoint)}
        for path, point in self.hook_dict.items():
            point.name = path

    def forward(self, *args: Any, **kwargs: Any) -> Float[Tensor, "*_output"]:
        output = self.wrapped(*args, **kwargs)
        return output.logits if hasattr(output, "logits") else output[0]

    def sites(self, names: Mapping[str, str] | None = None) -> list[DeclaredSite]:
        """A site for each linear layer, norm, activation function and attention that the example passed, for `declare_sites`.

        Args:
            names: beginnings of paths and what takes their place in the sites' names, as in {"encoder.layer": "blocks"}, so that a site
                stands in the account's row of its layer.

        Raises:
            RelevanceError: one of them is called more than once in a forward; see `sharing_copies`.
        """
        found = []
        for path, n in self.calls.items():
            sites = _sites(path, self.wrapped.get_submodule(path))
            if sites and n > 1:
                raise RelevanceError(
                    f"{path} is called {n} times in one forward, so a HookPoint in it would stand for {n} tensors; give each call a module "
                    "of its own with sharing_copies before the model is hooked"
                )
            found += [DeclaredSite(_renamed(s.name, names or {}), s.operation, s.inputs, s.output) for s in sites]
        return found


def sharing_copies(module: nn.Module, n: int) -> nn.ModuleList:
    """n modules with one module's parameters: a layer that a model calls n times (ALBERT), unrolled so that each call has HookPoints of
    its own."""
    configs = [one.config for one in module.modules() if isinstance(getattr(one, "config", None), PreTrainedConfig)]
    shared = {id(one): one for one in (*module.parameters(), *module.buffers(), *configs)}
    return nn.ModuleList(copy.deepcopy(module, dict(shared)) for _ in range(n))


@contextmanager
def _undone_on_error(model: PreTrainedModel) -> Iterator[None]:
    """A model that cannot be hooked keeps the attention that it had."""
    attention, cached = model.config._attn_implementation, getattr(model.config, "use_cache", None)
    try:
        with torch.no_grad():
            yield
    except BaseException:
        model.set_attn_implementation(attention)
        if cached is not None:
            model.config.use_cache = cached
        for module in model.modules():
            if hasattr(module, "attention_geometry"):
                del module.attention_geometry
                for name in _ATTENTION_POINTS:
                    delattr(module, name)
        raise


def _count_calls(model: nn.Module, run: Callable[[], object]) -> Counter[str]:
    """How often each submodule is called, in the order of the first calls."""
    calls: Counter[str] = Counter()
    handles = [
        module.register_forward_pre_hook(lambda *_, path=path: calls.update([path])) for path, module in [*model.named_modules()][1:]
    ]
    run()
    for handle in handles:
        handle.remove()
    return Counter({path: n for path, n in calls.items() if not isinstance(model.get_submodule(path), HookPoint)})


def _add_hook_points(module: Any) -> None:
    """hook_in and hook_out around a module's forward."""
    module.hook_in, module.hook_out = HookPoint(), HookPoint()

    def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for i, x in enumerate(args):
            if _is_activation(x):
                return (*args[:i], module.hook_in(x), *args[i + 1 :]), kwargs
        for name, x in kwargs.items():
            if _is_activation(x):
                return args, {**kwargs, name: module.hook_in(x)}
        return args, kwargs

    def leave(_: Any, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple) and output and _is_activation(output[0]):
            return (module.hook_out(output[0]), *output[1:])
        return module.hook_out(output) if _is_activation(output) else output

    module.register_forward_pre_hook(enter, with_kwargs=True)
    module.register_forward_hook(leave)


def _is_activation(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention as transformers asks for it: q, k, v [batch, head, pos, d_head] -> z [batch, pos, head, d_head] and the pattern."""
    if not hasattr(module, "hook_q"):
        _add_attention_points(module, query, key, value, scaling)
    geometry: AttentionGeometry = module.attention_geometry
    query, key, value = module.hook_q(query), module.hook_k(key), module.hook_v(value)
    scores = query @ geometry.expand(key).transpose(-1, -2) * geometry.scale
    if attention_mask is not None:
        scores = scores + attention_mask
    scores = module.hook_attn_scores(scores)
    precise = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    pattern = module.hook_pattern(precise.softmax(-1).to(value.dtype))
    z = module.hook_z((pattern @ geometry.expand(value)).transpose(1, 2).flatten(-2))
    return z.unflatten(-1, (geometry.n_heads, -1)), pattern


def _add_attention_points(module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> None:
    (_, n_heads, _, d_head), n_key_value_heads = query.shape, key.shape[1]
    scale = d_head**-0.5 if scaling is None else scaling
    module.attention_geometry = AttentionGeometry(
        n_heads, n_key_value_heads, d_head, scale=scale, queries_are_split=True, values_are_split=True, d_value=value.shape[-1]
    )
    for name in _ATTENTION_POINTS:
        module.add_module(name, HookPoint())
    for name in _ATTENTION_POINTS[:3]:
        getattr(module, name).pos_dim = 2


def _check(before: Tensor, after: Tensor) -> None:
    """Refuse a model that computes something else with our attention than with its own."""
    worst = float((before - after).abs().max())
    if not worst <= _TOLERANCE.get(before.dtype, 5e-2) * max(1e-6, float(before.abs().max())):
        raise CoverageError(
            f"with its attention as softmax(scale * q k^T + mask) v the model gives other outputs, off by {worst:.2g}: its attention has a "
            "step besides (a soft-cap, sinks, a position bias), which HookedModule does not know"
        )


def _sites(path: str, module: Any) -> list[DeclaredSite]:
    """The sites of one module."""
    before, after = f"{path}.hook_in", f"{path}.hook_out"
    if isinstance(module, nn.Linear):
        return linear(path, before, after, weight=module.weight.detach(), bias=None if module.bias is None else module.bias.detach())
    if isinstance(module, nn.LayerNorm):
        return norm(path, before, after, weight=module.weight, bias=module.bias, eps=module.eps)
    if type(module).__name__.endswith("RMSNorm"):
        return [DeclaredSite(path, _rms(path, module), (before,), after)]
    if isinstance(module, _ACTIVATIONS):
        return activation(path, before, after, function=module.forward)
    if hasattr(module, "attention_geometry"):
        q, k, v, scores, pattern, z = (f"{path}.{name}" for name in _ATTENTION_POINTS)
        geometry = module.attention_geometry
        return [
            DeclaredSite(f"{path}:scores", Scores(geometry), (q, k), scores),
            DeclaredSite(f"{path}:pattern", Softmax(), (scores,), pattern),
            DeclaredSite(f"{path}:z", Mix(geometry), (pattern, v), z),
        ]
    return []


@torch.no_grad()
def _rms(path: str, module: Any) -> Norm:
    """An RMSNorm whose weight is multiplied as it is, or plus one (Gemma): whichever gives what the module gives."""
    weight, eps = module.weight.detach(), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    x = torch.linspace(-1.0, 2.0, weight.numel(), dtype=weight.dtype, device=weight.device).reshape(1, 1, -1)
    for offset in (0.0, 1.0):
        found = Norm(weight, None, float(eps or 0.0), centred=False, offset=offset)
        if torch.allclose(module.forward(x).float(), found(x).float(), rtol=2e-2, atol=2e-2):
            return found
    raise CoverageError(f"{path}: {type(module).__name__} does not compute an RMSNorm")


def _renamed(name: str, names: Mapping[str, str]) -> str:
    beginning = next((old for old in names if name == old or name.startswith((f"{old}.", f"{old}:"))), None)
    return name if beginning is None else names[beginning] + name.removeprefix(beginning)
