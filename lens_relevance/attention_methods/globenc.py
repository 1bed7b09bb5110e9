"""GlobEnc (Modarressi et al. 2022, arXiv 2205.03286): norms of what each token brings to each other, residual and norm included."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lens_relevance.attention_methods.accumulation import Accumulation, Chain, Step
from lens_relevance.attention_methods.run import AttentionRun
from lens_relevance.rules import Linear, Norm
from lens_relevance.sites import Anatomy


def accumulate(run: AttentionRun) -> Accumulation:
    """N_ij = || (z_ij - mean) / std_i * weight ||, z_ij = sum_h a_ij f_h(x_j) + [i = j] x_i; R is the product of N over layers.

    f_h(x_j) is the value of head h at j times its part of the output projection. std is the true one, that of everything that a norm
    reads. GlobEnc was made for BERT, whose stream passes two norms in each layer, after attention and after the MLP: the vectors pass
    both, and of what the MLP adds nothing but its share in the second norm's std. Where norms stand before attention and MLP, our reading
    takes the norm that reads the stream next (the MLP's; in parallel blocks the next block's ln1 or ln_final); where there is none the
    vectors are as they are. A norm on the attention output (Gemma 2, OLMo 2) is part of f.
    A norm is not additive over heads: a head's part is the projection of its vector on z_ij / ||z_ij||, and these parts add up to it.
    """
    return Chain([_step(run, layer) for layer in range(run.n_layers)], run.start, run.mask)


def points(body: Anatomy, importance: str) -> list[str]:
    """HookPoints that GlobEnc needs: residual, values, and what the norms read whose standard deviations divide."""
    layers = range(body.n_layers)
    norms = [name for layer in layers for name in (_post_norm(body, layer), *_norms_after(body, layer))]
    in_blocks = [f"blocks.{layer}.{point}" for layer in layers for point in ("hook_in", "attn.v.hook_out")]
    return in_blocks + [f"{name}.hook_in" for name in norms if name is not None]


def _step(run: AttentionRun, layer: int) -> Step:
    """Squared norms from Gram matrices over heads, so that no [token, source, d_model] tensor is ever built."""
    pattern, brought, x = run.pattern(layer), _head_outputs(run, layer), run.activation(f"blocks.{layer}.hook_in")
    post = _post_norm(run.body, layer)
    if post is not None:
        brought = _centred(run, post, brought)
        pattern = pattern / _std(run, post)[:, None, :, None]
    std = torch.ones_like(run.start)
    for after in _norms_after(run.body, layer):
        brought, x, std = _centred(run, after, brought), _centred(run, after, x), std * _std(run, after)
    gram = torch.einsum("bjhd,bjgd->bjhg", brought, brought)
    towards = torch.einsum("bgij,bjhg->bhij", pattern, gram)  # u_h . sum_g u_g, less one factor a_h
    own = torch.diag_embed(torch.einsum("bjhd,bjd->bhj", brought, x))  # u_h . x_i on the diagonal
    along = pattern * (towards + own)
    x_along = x.pow(2).sum(-1) + torch.einsum("bhii,bhii->bi", pattern, own)
    norm = (along.sum(1) + torch.diag_embed(x_along)).clamp(min=0).sqrt()
    inverse = torch.where(norm == 0, torch.zeros_like(norm), 1 / torch.where(norm == 0, torch.ones_like(norm), norm))
    inverse = inverse / std.unsqueeze(-1)
    return Step(x_along * inverse.diagonal(dim1=-2, dim2=-1), along * inverse.unsqueeze(1))


def _head_outputs(run: AttentionRun, layer: int) -> Float[Tensor, "batch source head d_model"]:
    """f_h(x_j): the head's value at j through its slice of W_O (the output bias belongs to no source)."""
    values, heads = run.activation(f"blocks.{layer}.attn.v.hook_out"), run.pattern(layer).shape[1]
    output = next(site.operation for site in run.body.sites if site.name == f"blocks.{layer}.attn.o")
    assert isinstance(output, Linear)
    weight = output.weight.to(values.dtype).unflatten(1, (heads, -1))
    return torch.einsum("bjhe,dhe->bjhd", values.repeat_interleave(heads // values.shape[2], 2), weight)


def _centred(run: AttentionRun, name: str, vectors: Tensor) -> Tensor:
    """The linear part of a norm: centring and weight, without the division."""
    norm = _norm(run.body, name)
    assert norm is not None
    return norm.weighted(norm.centre(vectors))


def _std(run: AttentionRun, name: str) -> Float[Tensor, "batch token"]:
    norm = _norm(run.body, name)
    assert norm is not None
    std = norm.scale(run.cache.activations[f"{name}.hook_in"].to(run.start.dtype)).squeeze(-1)
    return torch.where(run.mask, std, torch.ones_like(std))


def _norm(body: Anatomy, name: str) -> Norm | None:
    return next((site.operation for site in body.sites if site.name == name and isinstance(site.operation, Norm)), None)


def _post_norm(body: Anatomy, layer: int) -> str | None:
    """The norm between the attention output and the residual."""
    name = f"blocks.{layer}.ln1_post"
    return name if _norm(body, name) is not None else None


def _norms_after(body: Anatomy, layer: int) -> list[str]:
    """The norms that the stream passes after attention (BERT), or the one that reads it next; parallel blocks have no resid_mid."""
    if body.blocks[layer].norms_follow:
        names = [f"blocks.{layer}.ln1", f"blocks.{layer}.ln2"]
    else:
        middle = body.aliases.get(f"blocks.{layer}.hook_resid_mid")
        below = f"blocks.{layer + 1}.ln1" if layer + 1 < body.n_layers else "ln_final"
        names = [below if middle is None else middle.removesuffix(".hook_in")]
    return [name for name in names if _norm(body, name) is not None]
