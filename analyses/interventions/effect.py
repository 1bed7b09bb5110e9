"""intervene: what setting units does to a target, and to the text that the model goes on with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.datasets.batches import text_of
from analyses.interventions.units import From, set_units
from lens_relevance.dictionaries import Dictionary
from lens_relevance.errors import RelevanceError
from lens_relevance.hooks.model_state import left_as_found
from lens_relevance.inputs.prompt import Inputs, tokenize
from lens_relevance.inputs.targets import AnyTarget, as_target, describe, top_prediction


@dataclass(frozen=True, eq=False)
class Intervention:
    """A target with and without settings.

    Attributes:
        target: in words.
        before, after: the target [batch], in its own units, without and with the settings.
        text_before, text_after: what the model goes on with, greedily, one text per prompt; empty where no tokens were asked for.
    """

    target: str
    before: Float[Tensor, " batch"]
    after: Float[Tensor, " batch"]
    text_before: tuple[str, ...] = ()
    text_after: tuple[str, ...] = ()

    @property
    def change(self) -> Float[Tensor, " batch"]:
        """after - before."""
        return self.after - self.before

    def __repr__(self) -> str:
        """One line: the means."""
        return (
            f"Intervention({self.target}: {self.before.mean():.4g} -> {self.after.mean():.4g}, mean of {len(self.before)}"
            + (f"; {self.text_before[0]!r} -> {self.text_after[0]!r}" if self.text_before else "")
            + ")"
        )


@left_as_found
def intervene(
    model: TransformerBridge,
    inputs: Inputs,
    settings: Mapping[str, Any],
    *,
    target: AnyTarget | None = None,
    prompts: Inputs | None = None,
    dictionaries: Sequence[Dictionary] = (),
    new_tokens: int = 0,
) -> Intervention:
    """The change of a target, and of the text generated, when units are set to other values (see `set_units`).

    Args:
        inputs: prompts, as for `propagate`.
        target: as for `propagate`; None for each prompt's most likely next token against its runner-up, both of the model as it is.
        prompts: those that means are taken over.
        dictionaries: those that features belong to.
        new_tokens: how many tokens to generate, greedily, each by a forward of the whole text, so that positions stay what they are.

    Raises:
        RelevanceError: settings that do not fit (see `set_units`), or new_tokens after a swap `From` another prompt, which has none.
    """
    if new_tokens and any(isinstance(setting, From) for setting in settings.values()):
        raise RelevanceError("From takes values position by position, and generated tokens have none in the other prompt: new_tokens=0")
    tokens, mask = tokenize(model, inputs)
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask)
        chosen = top_prediction(logits, tokens, mask) if target is None else as_target(target)
        metric = chosen.metric(model, tokens, mask)
        before, text_before = metric(logits), _texts(model, tokens, mask, new_tokens)
        with set_units(model, settings, prompts=prompts, dictionaries=dictionaries):
            after, text_after = metric(model(tokens, attention_mask=mask)), _texts(model, tokens, mask, new_tokens)
    shape = (len(tokens),)
    return Intervention(describe(chosen, model), before.expand(shape), after.expand(shape), text_before, text_after)


def _texts(model: TransformerBridge, tokens: Tensor, mask: Tensor, n: int) -> tuple[str, ...]:
    """What the model goes on with, greedily; each prompt without its padding."""
    texts = []
    for row, real in zip(tokens, mask.bool(), strict=True) if n else ():
        ids = row[real]
        for _ in range(n):
            ids = torch.cat([ids, model(ids[None])[0, -1].argmax().reshape(1)])
        texts.append(text_of(model, ids[int(real.sum()) :].tolist()))
    return tuple(texts)
