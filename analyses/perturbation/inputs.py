"""What a model makes of several inputs (a picture and a question, an encoder's tokens) of which parts were removed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from scipy.ndimage import gaussian_filter
from torch import Tensor

from analyses.perturbation.removal_runs import Removal, target_and_answer
from lens_relevance import RelevanceError, Target
from lens_relevance.hooked_model import HookedModel
from lens_relevance.inputs.prompt import Prompt, read_inputs
from lens_relevance.inputs.targets import as_target
from lens_relevance.sites import anatomy

PATCH_BASELINES = ("zero", "mean_patch", "blur")
EMBEDDING_BASELINES = ("mean_embedding", "zero_embedding", "other_example")


class _InputRemoval(Removal):
    """Holds the call whose parts are removed."""

    def __init__(
        self,
        model: HookedModel,
        inputs: Mapping[str, Shaped[Tensor, "*_input"]],
        target: Target,
        baseline: str,
        known: tuple[str, ...],
        batch: int,
    ) -> None:
        if baseline not in known:
            raise RelevanceError(f"unknown baseline {baseline!r}; choose one of {', '.join(known)}")
        super().__init__(baseline, batch)
        self.model: Any = model  # bridges and HookedRootModules have hooks(), which HookedModel does not name
        self.prompt = read_inputs(model, inputs)
        self.target = as_target(target).made_for(len(self.prompt.tokens))

    def rows(self, rows: Int[Tensor, " n"], **changed: Shaped[Tensor, " n *_input"]) -> Prompt:
        """The call for some examples, with other values for some arguments."""
        arguments = {name: value[rows] for name, value in self.prompt.arguments.items()} | changed
        return replace(self.prompt, tokens=self.prompt.tokens[rows], mask=self.prompt.mask[rows], arguments=arguments)

    def answers(self, prompt: Prompt, rows: Int[Tensor, " n"]) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
        """(target [n], most likely answer [n])."""
        return target_and_answer(self.model, self.target.select(rows), prompt)


class PatchRemoval(_InputRemoval):
    """Evaluates pictures without some of their square patches, row by row.

    Source: ours; which of these baselines a paper has used differs from paper to paper.

    Args:
        inputs: keyword arguments of the model.
        baseline: `zero`, `mean_patch` (the mean over the picture's own patches) or `blur` (a Gaussian as wide as a patch).
        image: the argument that holds the pictures [batch, channel, height, width].
        patch: the side of a patch in pixels.
    """

    def __init__(
        self,
        model: HookedModel,
        inputs: Mapping[str, Shaped[Tensor, "*_input"]],
        target: Target,
        *,
        baseline: str,
        image: str = "pixel_values",
        patch: int = 16,
        batch_size: int = 512,
    ) -> None:
        super().__init__(model, inputs, target, baseline, PATCH_BASELINES, batch_size)
        self.image, self.patch = image, patch
        pictures = self.prompt.arguments.get(image)
        if pictures is None or pictures.ndim != 4 or pictures.shape[2] % patch or pictures.shape[3] % patch:
            raise RelevanceError(
                f"inputs[{image!r}] must be pictures [batch, channel, height, width] whose sides are multiples of the patch ({patch}), "
                f"got {None if pictures is None else tuple(pictures.shape)}"
            )
        self.pictures = pictures
        self.n_patches = (pictures.shape[2] // patch) * (pictures.shape[3] // patch)
        self._filler = fillers(pictures, baseline, patch)

    def run(self, rows: Int[Tensor, " n"], removed: Bool[Tensor, "n patch"]) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
        """The target [n] and the most likely answer [n] of these pictures without these patches.

        Raises:
            RelevanceError: not one entry per patch.
        """
        if removed.shape[1] != self.n_patches:
            raise RelevanceError(f"{removed.shape[1]} patches were named, the pictures have {self.n_patches}")
        grid = rearrange(removed, "n (y x) -> n 1 y x", x=self.pictures.shape[3] // self.patch).to(self.pictures.device)
        gone = grid.repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3)
        changed = torch.where(gone, self._filler[rows], self.pictures[rows])
        return self.answers(self.rows(rows, **{self.image: changed}), rows)


def fillers(pictures: Float[Tensor, "batch c h w"], baseline: str, patch: int) -> Float[Tensor, "batch c h w"]:
    """What stands where patches were removed, a picture for each."""
    if baseline == "zero":
        return torch.zeros_like(pictures)
    if baseline == "blur":
        blurred = gaussian_filter(pictures.cpu().numpy(), sigma=(0, 0, patch, patch))
        return torch.from_numpy(blurred).to(pictures)
    sides = {"y": pictures.shape[2] // patch, "x": pictures.shape[3] // patch}
    cut = rearrange(pictures, "b c (y p) (x q) -> b c (y x) p q", p=patch, q=patch, x=sides["x"])
    return rearrange(cut.mean(2, keepdim=True).expand_as(cut), "b c (y x) p q -> b c (y p) (x q)", **sides)


class EmbeddingRemoval(_InputRemoval):
    """Evaluates inputs without some tokens of one stack: their embeddings are replaced, their positions stay.

    Source: ours; which of these baselines a paper has used differs from paper to paper.

    Args:
        baseline: `mean_embedding` (over the tokens of all examples), `zero_embedding`, or `other_example` (the same position of the example
            before).
        stack: whose embeddings (a token set of a declared model, `encoder` or `decoder`).
    """

    def __init__(
        self,
        model: HookedModel,
        inputs: Mapping[str, Shaped[Tensor, "*_input"]],
        target: Target,
        *,
        baseline: str,
        stack: str,
        batch_size: int = 512,
    ) -> None:
        super().__init__(model, inputs, target, baseline, EMBEDDING_BASELINES, batch_size)
        stacks = anatomy(model).stacks.roles
        if stack not in stacks:
            raise RelevanceError(f"this model has no stack {stack!r}; it has {', '.join(stacks)}")
        self._point = stacks[stack]["embeddings"][0]
        kept: dict[str, Tensor] = {}
        with torch.no_grad(), self.model.hooks(fwd_hooks=[(self._point, lambda x, hook: kept.update(x=x.detach()))]):
            self.prompt.call(model)
        embeddings = kept["x"]
        self.n_tokens = embeddings.shape[1]
        self._filler = {
            "mean_embedding": embeddings.mean((0, 1)).expand_as(embeddings),
            "zero_embedding": torch.zeros_like(embeddings),
            "other_example": embeddings.roll(1, 0),
        }[baseline]

    def run(self, rows: Int[Tensor, " n"], removed: Bool[Tensor, "n token"]) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
        """The target [n] and the most likely answer [n] of these inputs without these tokens.

        Raises:
            RelevanceError: not one entry per token.
        """
        if removed.shape[1] != self.n_tokens:
            raise RelevanceError(f"{removed.shape[1]} tokens were named, the inputs have {self.n_tokens}")
        filler = self._filler[rows]

        def swap(x: Tensor, hook: Any) -> Tensor:
            return torch.where(removed.to(x.device).unsqueeze(-1), filler, x)

        with self.model.hooks(fwd_hooks=[(self._point, swap)]):
            return self.answers(self.rows(rows), rows)
