"""What a run is compared with: other tokens, or the same positions with a baseline in place of the token embeddings.

A single prompt has no counterpart; `mean_embedding()` and `random_tokens()` stand in for one. BOS is kept as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lens_relevance.errors import RelevanceError
from lens_relevance.hooked_model import HookedModel, root
from lens_relevance.inputs.prompt import Prompt, read_inputs
from lens_relevance.rules.base import working
from lens_relevance.sites.embeddings import image_token, token_embedding
from lens_relevance.sites.token_sets import DECODER, TOKENS


@dataclass(frozen=True)
class ReferenceRun:
    """n reference runs per example, row by row: how the model is called, and token embeddings that are replaced during the call.

    Attributes:
        prompt: What the model is called with. Rows are ordered example by example: the n references of the first example come first.
        embeddings: By stack, where embeddings are replaced [rows, pos], and by what ([d_model] or [rows, pos, d_model]).
        n: References per example.
    """

    prompt: Prompt
    embeddings: dict[str, tuple[Bool[Tensor, "rows pos"], Float[Tensor, "... d_model"]]] = field(default_factory=dict)
    n: int = 1


@dataclass(frozen=True)
class Baseline:
    """A reference made for any prompt; see `mean_embedding`, `random_tokens`, `zero_embedding`.

    Attributes:
        kind: The name of the function that made it.
        n: References per example.
        seed: Of what is drawn at random.
    """

    kind: str
    n: int = 1
    seed: int = 0

    def run(self, model: HookedModel, prompt: Prompt, tail: int = 0) -> ReferenceRun:
        """The reference runs for these prompts.

        Args:
            model: What is explained.
            prompt: Its prompts.
            tail: The last tokens of each row that are part of the answer and stay.

        Raises:
            RelevanceError: The model is called with no tokens, or it is not known where its embeddings are.
        """
        if not prompt.ids:
            raise RelevanceError(f"{self} replaces tokens, and this model is called with none: give another image as the reference")
        replaced = _replaced(model, prompt, tail)
        if self.kind == "random_tokens":
            generator, many, drawn = torch.Generator().manual_seed(self.seed), prompt.repeat(self.n), {}
            allowed = _ordinary_tokens(model)
            for stack, ids in many.ids.items():
                other = allowed[torch.randint(len(allowed), ids.shape, generator=generator)].to(ids.device)
                drawn[stack] = torch.where(replaced[stack].repeat_interleave(self.n, 0), other, ids)
            return ReferenceRun(many.with_ids(drawn), n=self.n)
        baselines = {}
        for stack, where in replaced.items():
            mean = mean_token_embedding(model, stack)
            baselines[stack] = (where, mean if self.kind == "mean_embedding" else torch.zeros_like(mean))
        return ReferenceRun(prompt, baselines)

    def __str__(self) -> str:
        return f"random_tokens(n={self.n}, seed={self.seed})" if self.kind == "random_tokens" else f"{self.kind}()"


def mean_embedding() -> Baseline:
    """Every token embedding but BOS replaced by the mean over the vocabulary.

    Source: ours. DeepLIFT leaves the choice of a reference to its user; docs/measurements/single_prompts.md compares several.
    """
    return Baseline("mean_embedding")


def zero_embedding() -> Baseline:
    """Every token embedding but BOS replaced by zeros, which no text has; `mean_embedding` explains single prompts better.

    Source: the baseline of integrated gradients for text (Sundararajan et al. 2017, arXiv 1703.01365).
    """
    return Baseline("zero_embedding")


def random_tokens(n: int = 8, seed: int = 0) -> Baseline:
    """Every token but BOS replaced by a random one. Relevance is the average over n such references: n times the work, in one batch.

    Source: references drawn at random and averaged, as in expected gradients (Erion et al. 2021, arXiv 1906.10670), here for pair rules.

    Args:
        n: Number of references.
        seed: Of the tokens.

    Raises:
        RelevanceError: n is less than 1.
    """
    if n < 1:
        raise RelevanceError(f"random_tokens needs at least one reference, got n={n}")
    return Baseline("random_tokens", n, seed)


def is_inputs(reference: Any) -> bool:
    """Whether a reference was given as other inputs: text, token ids, an image or keyword arguments."""
    if isinstance(reference, Tensor):
        return not reference.is_floating_point() or reference.ndim > 3
    return isinstance(reference, str | list | tuple | Mapping)


def reference_inputs(model: HookedModel, reference: Any, prompt: Prompt) -> Prompt:
    """A reference given as other inputs for these prompts.

    Raises:
        RelevanceError: The two differ in shape, in arguments or in the length of a row.
    """
    given = read_inputs(model, reference)
    if prompt.ids and given.tokens.shape != prompt.tokens.shape:
        raise RelevanceError(
            f"the reference has shape {tuple(given.tokens.shape)}, the inputs {tuple(prompt.tokens.shape)}: pass a reference of the same "
            "number of rows and tokens, or mean_embedding() or random_tokens() where the prompt has no counterpart"
        )
    mine, its = ({name: tuple(value.shape) for name, value in p.arguments.items() if "mask" not in name} for p in (prompt, given))
    if mine != its:
        raise RelevanceError(f"the reference has the arguments {its}, the inputs {mine}: pass the same ones, of the same shapes")
    if not isinstance(reference, Tensor) and not torch.equal(given.mask, prompt.mask):
        raise RelevanceError("the prompts and their references differ in length row by row; pair prompts of equally many tokens")
    if not prompt.arguments:
        return Prompt(given.tokens, prompt.mask)
    return Prompt(given.tokens, prompt.mask, given.arguments | {name: value for name, value in prompt.arguments.items() if "mask" in name})


def reference_run(model: HookedModel, reference: Any, prompt: Prompt, *, tail: int = 0) -> ReferenceRun:
    """A ReferenceRun from other inputs, a Baseline, or embeddings of the tokens.

    Args:
        model: What is explained.
        reference: Inputs, a Baseline, or embeddings [d_model] or [batch, pos, d_model].
        prompt: What the references are for.
        tail: The last tokens of each row stay as they are under a baseline.

    Raises:
        RelevanceError: The reference and the prompt differ in shape, or the reference is none of these.
    """
    if is_inputs(reference):
        return ReferenceRun(reference_inputs(model, reference, prompt))
    if isinstance(reference, Baseline):
        return reference.run(model, prompt, tail)
    if not isinstance(reference, Tensor):
        kind = type(reference).__name__
        raise RelevanceError(f"a reference is text, token ids, embeddings or a baseline such as mean_embedding(), not {kind}")
    if set(prompt.ids) != {TOKENS}:
        raise RelevanceError("embeddings as a reference need a model with one stack of tokens; give other inputs, or a baseline")
    width = _embedding(model, TOKENS).embedding_dim
    if reference.shape[-1] != width:
        raise RelevanceError(f"reference embeddings have {reference.shape[-1]} features, the model {width}")
    if reference.ndim == 1:
        return ReferenceRun(prompt, {TOKENS: (_replaced(model, prompt, tail)[TOKENS], reference)})
    if reference.shape[:-1] != prompt.tokens.shape:
        raise RelevanceError(f"reference embeddings are {list(reference.shape)}; give [d_model] or {[*prompt.tokens.shape, width]}")
    return ReferenceRun(prompt, {TOKENS: (torch.ones_like(prompt.mask, dtype=torch.bool), reference)})


_ROWS = 4096
_MEANS: WeakKeyDictionary[nn.Embedding, tuple[object, Tensor]] = WeakKeyDictionary()


def mean_token_embedding(model: HookedModel, stack: str) -> Float[Tensor, " d_model"]:
    """The mean of what a stack's token embedding gives for every id, scaled where the model scales it.

    It is computed once for as long as the embedding stays as it is: a large vocabulary takes seconds.
    """
    original = _embedding(model, stack)
    state = _state(original)
    if state is None:
        return _mean_row(original)
    if original not in _MEANS or _MEANS[original][0] != state:
        _MEANS[original] = (state, _mean_row(original))
    return _MEANS[original][1].clone()


@torch.no_grad()
def _mean_row(embedding: nn.Embedding) -> Float[Tensor, " d_model"]:
    """The mean over the vocabulary, some rows at a time: a copy of a large table might not fit beside the model."""
    ids = torch.arange(embedding.num_embeddings, device=embedding.weight.device)
    sums = [working(embedding(some)).sum(0) for some in ids.split(_ROWS)]
    return (torch.stack(sums).sum(0) / len(ids)).to(embedding.weight.dtype)


def _state(module: nn.Embedding) -> object | None:
    """What changes when the module computes something else; None where that cannot be seen (hooks of its own, inference tensors)."""
    tensors = [*module.parameters(), *module.buffers()]
    if module._forward_hooks or module._forward_pre_hooks or any(t.is_inference() or t.is_meta for t in tensors):
        return None
    settings = tuple((name, value) for name, value in vars(module).items() if isinstance(value, int | float | bool))
    return settings, tuple((t.data_ptr(), t._version, t.dtype, t.device, tuple(t.shape)) for t in tensors)


def _embedding(model: HookedModel, stack: str) -> nn.Embedding:
    found = token_embedding(model, stack)
    if found is None:
        raise RelevanceError(f"{type(model).__name__} has no token embedding to take a baseline from: give other inputs as the reference")
    return found


def _replaced(model: HookedModel, prompt: Prompt, tail: int) -> dict[str, Tensor]:
    """True where a baseline replaces the token, by stack [batch, pos].

    Real tokens are replaced, but not the last `tail`, nor those that begin a text, frame it ([CLS] and [SEP]) or mark an image.
    """
    tokenizer = getattr(model, "tokenizer", None)
    begins = {getattr(tokenizer, "bos_token_id", None)}
    framing = (*(getattr(tokenizer, f"{name}_token_id", None) for name in ("cls", "sep")), image_token(model))
    frames = [i for i in framing if i is not None]
    if DECODER in prompt.ids:
        begins.add(getattr(getattr(root(model), "config", None), "decoder_start_token_id", None))
    found = {}
    for stack, ids in prompt.ids.items():
        mask = prompt.masks[stack]
        kept = (mask.cumsum(1) == 1) & (mask == 1) & torch.isin(ids, torch.tensor([b for b in begins if b is not None], device=ids.device))
        kept = kept | torch.isin(ids, torch.tensor(frames, device=ids.device))
        last = tail if stack in (TOKENS, DECODER) else 0
        found[stack] = (mask == 1) & (mask.cumsum(1) <= mask.sum(1, keepdim=True) - last) & ~kept
    return found


def _ordinary_tokens(model: HookedModel) -> Tensor:
    """Token ids that a random prompt may hold: the vocabulary without special tokens."""
    vocabulary = getattr(getattr(model, "cfg", None), "d_vocab", None)
    if vocabulary is None:
        raise RelevanceError(f"how many tokens {type(model).__name__} knows is not known (model.cfg.d_vocab): give other inputs instead")
    everything = torch.arange(int(vocabulary))
    special = [*(getattr(getattr(model, "tokenizer", None), "all_special_ids", []) or []), image_token(model)]
    keep = torch.ones_like(everything, dtype=torch.bool)
    keep[[i for i in special if i is not None and i < len(everything)]] = False
    return everything[keep]
