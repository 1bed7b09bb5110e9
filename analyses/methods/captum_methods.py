"""Integrated gradients, SmoothGrad and Grad-CAM by captum (the extra `baselines`): tokens of prompts, and patches of pictures."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from analyses.methods.base import Estimator
from analyses.methods.single_inputs import ROWS, SingleInput
from analyses.methods.tokens_only import tokens_only
from lens_relevance import RelevanceError
from lens_relevance.hooked_model import HookedModel
from lens_relevance.sites import anatomy


def integrated_gradients(steps: int = 50) -> Estimator:
    """Integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365) of token embeddings or pixels, by Gauss-Legendre quadrature.

    The scores of a prompt add up to the difference of the target between it and its reference, but for the error of the quadrature; captum
    rounds the weights of the steps to float32.

    Args:
        steps: points between reference and input, one forward and one backward each.
    """

    def scores(model: HookedModel, one: SingleInput) -> Tensor:
        method = _captum().IntegratedGradients(one)
        return one.sums(method.attribute(one.values, baselines=one.baseline, n_steps=steps, internal_batch_size=max(ROWS, steps)))

    return tokens_only("integrated_gradients", scores, forwards=steps, backwards=steps)


def smoothgrad(samples: int = 25, noise: float = 0.15, seed: int = 0) -> Estimator:
    """SmoothGrad (Smilkov et al. 2017, arXiv 1706.03825): the gradient averaged over noisy copies of the input, times the input.

    The paper shows the gradients of pixels; that a token or a patch gets the sum of gradient times value over its entries is our reading.

    Args:
        samples: noisy copies, one forward and one backward each.
        noise: standard deviation, in parts of the range of the example's values (the paper has .1 to .2).
        seed: of the noise.
    """

    def scores(model: HookedModel, one: SingleInput) -> Tensor:
        method = _captum().NoiseTunnel(_captum().Saliency(one))
        given = one.values[one.real[one.items].expand_as(one.values)]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            gradient = method.attribute(
                one.values, nt_type="smoothgrad", nt_samples=samples, stdevs=noise * float(given.max() - given.min()), abs=False
            )
        return one.sums(gradient * one.values)

    return tokens_only("smoothgrad", scores, forwards=samples, backwards=samples)


def grad_cam() -> Estimator:
    """Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391) of the patches of pictures, at what enters the last block's attention.

    Features are weighted by their gradient, averaged over patches, and what is left of their sum below zero is 0. The paper explains the
    last convolution; in a vision transformer whose class is read at one token the norm before the last attention is the last place where
    patches still act (our reading).

    Raises:
        RelevanceError: the model reads no picture.
    """

    def scores(model: HookedModel, one: SingleInput) -> Float[Tensor, " patch"]:
        body, layer = anatomy(model), nn.Identity()  # a module whose output has the layout that captum expects
        grid, point = body.stacks.grid, body.aliases.get(f"blocks.{body.n_layers - 1}.ln1.hook_out")
        if grid is None or one.n_items != grid[0] * grid[1] or point is None:
            raise RelevanceError("grad_cam explains the patches of a picture, and this model reads none: choose 'integrated_gradients'")

        def pass_through(x: Tensor, hook: Any) -> Tensor:
            patches = rearrange(x[:, -one.n_items :], "b (y x) d -> b d y x", x=grid[1])
            return torch.cat([x[:, : -one.n_items], rearrange(layer(patches), "b d y x -> b (y x) d")], 1)

        def run(pixels: Tensor) -> Tensor:
            return one.target(pixels, [(point, pass_through)])

        return _captum().LayerGradCam(run, layer).attribute(one.values.clone().requires_grad_(), relu_attributions=True).flatten()

    return tokens_only("grad_cam", scores, forwards=1, backwards=1)


def _captum() -> Any:
    """captum.attr.

    Raises:
        RelevanceError: captum is not installed.
    """
    try:
        import captum.attr
    except ImportError as error:
        raise RelevanceError("this method needs captum: pip install 'lens-relevance[baselines]'") from error
    return captum.attr
