"""What a model is called with: prompts as tokens and a mask, or keyword arguments of the model's own (an encoder-decoder, an image)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from lens_relevance.errors import RelevanceError
from lens_relevance.hooked_model import HookedModel, has_tokenizer, is_bridge, root
from lens_relevance.sites.token_sets import DECODER, ENCODER, TOKENS

Inputs = str | Sequence[str] | Shaped[Tensor, "*_input"] | Mapping[str, Any]
"""Text, token ids [batch, pos] or [pos], images [batch, channel, height, width], or keyword arguments of the model's own."""
_MASKS = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}
_STACKS = {ENCODER: "input_ids", DECODER: "decoder_input_ids"}
_FIRST = ("input_ids", "input", "pixel_values")  # what TransformerBridge takes as its first argument


@dataclass(frozen=True)
class Prompt:
    """One call of a model.

    tokens: ids whose logits are explained (the decoder's, where there are two stacks), mask: 1 where they are real. A model that takes no
    ids (an image classifier) has one position with id 0. arguments: everything the model is called with by keyword, masks among it; empty
    where it is called with tokens alone.
    """

    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    arguments: dict[str, Tensor] = field(default_factory=dict)

    @property
    def explained(self) -> str:
        """The argument that holds `tokens`."""
        return _explained(self.arguments)

    @property
    def ids(self) -> dict[str, Int[Tensor, "batch pos"]]:
        """Token ids by stack."""
        if not self.arguments:
            return {TOKENS: self.tokens}
        listed = _STACKS if "decoder_input_ids" in self.arguments else {TOKENS: "input_ids"}
        return {stack: self.arguments[name] for stack, name in listed.items() if name in self.arguments}

    @property
    def masks(self) -> dict[str, Int[Tensor, "batch pos"]]:
        """1 where a position is real, by stack, where that is known."""
        if not self.arguments:
            return {TOKENS: self.mask}
        masks = {stack: self.arguments.get(_MASKS[_STACKS.get(stack, "input_ids")]) for stack in self.ids}
        return {stack: torch.ones_like(self.ids[stack]) if mask is None else mask.long() for stack, mask in masks.items()}

    def with_ids(self, ids: Mapping[str, Tensor]) -> Prompt:
        """The same call with other ids, by stack."""
        if not self.arguments:
            return replace(self, tokens=ids[TOKENS])
        given = self.arguments | {_STACKS.get(stack, "input_ids"): value for stack, value in ids.items()}
        return Prompt(given[self.explained] if self.explained else self.tokens, self.mask, given)

    def with_tokens(self, tokens: Tensor, mask: Tensor) -> Prompt:
        """The same call with other ids, of any length, in place of those that are explained."""
        if not self.arguments:
            return Prompt(tokens, mask)
        given = self.arguments | {self.explained: tokens}
        if _MASKS[self.explained] in given or not bool((mask == 1).all()):
            given[_MASKS[self.explained]] = mask
        return Prompt(tokens, mask, given)

    def repeat(self, n: int) -> Prompt:
        """Each row n times, one after the other."""
        if n == 1:
            return self
        arguments = {name: value.repeat_interleave(n, 0) for name, value in self.arguments.items()}
        return Prompt(self.tokens.repeat_interleave(n, 0), self.mask.repeat_interleave(n, 0), arguments)

    def call(self, model: HookedModel) -> Tensor:
        """Logits, by the same call a user would make; a mask of tokens is passed only where it hides something."""
        asked = {"return_type": "logits"} if is_bridge(model) else {}
        if not self.arguments:
            hidden = {} if bool((self.mask == 1).all()) else {"attention_mask": self.mask}
            logits = model(self.tokens, **asked, **hidden)
        else:
            arguments = dict(self.arguments)
            first = next((name for name in _FIRST if name in arguments), None) if is_bridge(model) else None
            logits = model(**arguments, **asked) if first is None else model(arguments.pop(first), **asked, **arguments)
        if not isinstance(logits, Tensor):
            raise RelevanceError(f"the model returned {type(logits).__name__} instead of logits")
        return logits


def read_inputs(model: HookedModel, inputs: Inputs, attention_mask: Shaped[Tensor, "batch pos"] | None = None) -> Prompt:
    """A Prompt from text, token ids, an image or keyword arguments.

    An encoder-decoder given text or ids alone reads them in its encoder, and its decoder starts with the start token. Raises
    RelevanceError for arguments that the model does not take or whose first dimensions differ, and as `tokenize` does.
    """
    if isinstance(inputs, Mapping):
        return _read_arguments(model, inputs, attention_mask)
    config = getattr(root(model), "config", None)
    if _sees(model):
        return _read_arguments(model, {"pixel_values": inputs}, attention_mask)
    tokens, mask = tokenize(model, inputs, attention_mask)
    if not (is_bridge(model) and getattr(config, "is_encoder_decoder", False)):
        return Prompt(tokens, mask)
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise RelevanceError("this encoder-decoder names no start token: give inputs={'input_ids': ..., 'decoder_input_ids': ...}")
    begun = torch.full_like(tokens[:, :1], int(start))
    hidden = {} if bool((mask == 1).all()) else {"attention_mask": mask}
    return Prompt(begun, torch.ones_like(begun), {"input_ids": tokens, "decoder_input_ids": begun, **hidden})


def _read_arguments(model: HookedModel, inputs: Mapping[str, Any], attention_mask: Shaped[Tensor, "batch pos"] | None) -> Prompt:
    device = next(model.parameters()).device
    known = inspect.signature(root(model).forward).parameters
    arguments: dict[str, Tensor] = {}
    for name, value in inputs.items():
        if name not in known and (is_bridge(model) or not any(p.kind is p.VAR_KEYWORD for p in known.values())):
            raise RelevanceError(f"the model takes no argument {name!r}; it takes {', '.join(known)}")
        if name in _MASKS and not isinstance(value, Tensor):
            value, hidden = tokenize(model, value)
            if not bool((hidden == 1).all()):
                arguments.setdefault(_MASKS[name], hidden)
        if name == "pixel_values" and _sees(model):
            value = _images(value)
        if not isinstance(value, Tensor):
            raise RelevanceError(f"inputs[{name!r}] must be a tensor, got {type(value).__name__}")
        arguments[name] = tokenize(model, value)[0] if name in _MASKS else value.to(device)
    if attention_mask is not None:
        arguments["attention_mask"] = read_mask(attention_mask, "attention_mask").to(device)
    batches = {name: len(value) for name, value in arguments.items() if value.ndim}
    if not batches or len(set(batches.values())) > 1:
        raise RelevanceError(f"inputs need one row per example in every argument, got {batches or 'none'}")
    for ids, name in _MASKS.items():
        if name in arguments and ids in arguments and arguments[name].shape != arguments[ids].shape:
            raise RelevanceError(f"{name} has shape {tuple(arguments[name].shape)}, {ids} {tuple(arguments[ids].shape)}")
        if name in arguments:
            check_hides_no_row(read_mask(arguments[name], name), name)
    if "input_ids" in arguments and "decoder_input_ids" not in arguments and getattr(root(model), "config", None) is not None:
        if getattr(root(model).config, "is_encoder_decoder", False):
            raise RelevanceError("an encoder-decoder needs decoder_input_ids too: the target is read off the decoder's positions")
    name = _explained(arguments)
    if not name:
        nothing = torch.zeros(next(iter(batches.values())), 1, dtype=torch.long, device=device)
        return Prompt(nothing, torch.ones_like(nothing), arguments)
    return Prompt(arguments[name], arguments.get(_MASKS[name], torch.ones_like(arguments[name])).long(), arguments)


def _sees(model: HookedModel) -> bool:
    """Whether this is a bridge over a model of images alone."""
    return bool(getattr(getattr(model, "cfg", None), "is_visual_model", False))


def _images(given: Any) -> Tensor:
    """Images [batch, channel, height, width]; a single one [channel, height, width] is taken as one row."""
    if not isinstance(given, Tensor) or not given.is_floating_point() or given.ndim not in (3, 4):
        what = f"{given.dtype} of shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise RelevanceError(f"this model takes images [batch, channel, height, width] as floating-point pixel values, got {what}")
    return given.unsqueeze(0) if given.ndim == 3 else given


def _explained(arguments: Mapping[str, Any]) -> str:
    """The argument that holds the ids whose logits are explained, if there is one."""
    return next((name for name in ("decoder_input_ids", "input_ids") if name in arguments), "")


def tokenize(
    model: HookedModel, inputs: Inputs, attention_mask: Shaped[Tensor, "batch pos"] | None = None
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Token ids and mask (1 = real) of a prompt, several prompts, or ids [batch, pos] ([pos] is taken as one row).

    Strings get a BOS token as TransformerLens does by default and are padded on the right, where padding cannot reach a causal model's
    real tokens. Raises RelevanceError for an empty prompt, ids outside the vocabulary, or a mask of another shape.
    """
    device = next(model.parameters()).device
    if isinstance(inputs, str):
        inputs = [inputs]
    if isinstance(inputs, Tensor):
        tokens = inputs.to(device)
        tokens = tokens.unsqueeze(0) if tokens.ndim == 1 else tokens
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise RelevanceError(f"token ids must be integers [batch, pos], got {tokens.dtype} of shape {tuple(inputs.shape)}")
        if tokens.numel() == 0:
            raise RelevanceError("the prompt is empty: give at least one token")
        vocabulary = int(getattr(getattr(model, "cfg", None), "d_vocab", 2**62))
        if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
            raise RelevanceError(f"token ids must lie in 0..{vocabulary - 1}, got {int(tokens.min())}..{int(tokens.max())}")
        check_length(model, tokens.shape[1])
        mask = torch.ones_like(tokens) if attention_mask is None else read_mask(attention_mask, "attention_mask").to(device)
        if mask.shape != tokens.shape:
            raise RelevanceError(
                f"attention_mask has shape {tuple(mask.shape)}, the tokens {tuple(tokens.shape)}; give one entry per token"
            )
        check_hides_no_row(mask, "attention_mask")
        return tokens, mask
    if attention_mask is not None:
        raise RelevanceError("attention_mask goes with token ids; prompts given as strings are masked by us")
    if not isinstance(inputs, Sequence) or not inputs or not all(isinstance(text, str) for text in inputs):
        raise RelevanceError(f"inputs must be a string, strings, or token ids [batch, pos], got {type(inputs).__name__}")
    if not has_tokenizer(model):
        raise RelevanceError("the model has no tokenizer; give token ids [batch, pos] instead of text")
    if any(not text for text in inputs):
        raise RelevanceError("the prompt is empty: give at least one word")
    if any("\ud800" <= sign <= "\udfff" for text in inputs for sign in text):
        raise RelevanceError("the prompt is no text: it holds bytes that are not UTF-8, or half of a character")
    return pad([model.to_tokens(text, truncate=False)[0] for text in inputs], model)


def read_mask(mask: Any, name: str) -> Int[Tensor, "batch pos"]:
    """A mask as integers. Raises RelevanceError where it holds anything but 0 and 1."""
    if not isinstance(mask, Tensor):
        raise RelevanceError(f"{name} must be a tensor, got {type(mask).__name__}")
    if mask.is_meta:  # no values to look at
        return mask.long()
    odd = mask[(mask != 0) & (mask != 1)]
    if len(odd):
        raise RelevanceError(f"{name} holds {odd[0].item()}: a mask is 1 where a token is real and 0 where it is padding, and nothing else")
    return mask.long()


def check_hides_no_row(mask: Int[Tensor, "batch pos"], name: str) -> None:
    """Refuse a mask under which an example has no token at all."""
    if bool((mask.sum(-1) == 0).any()):
        raise RelevanceError(f"{name} hides every token of a row")


def check_length(model: HookedModel, length: int) -> None:
    """Refuse prompts beyond the model's context."""
    n_ctx = getattr(getattr(model, "cfg", None), "n_ctx", None)
    if n_ctx is not None and length > n_ctx:
        raise RelevanceError(f"the prompt has {length} tokens, the model's context is {n_ctx}; shorten it")


def pad(rows: Sequence[Tensor], model: HookedModel) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Rows of token ids as one tensor, padded on the right, and its mask."""
    length = max(len(row) for row in rows)
    check_length(model, length)
    filler = getattr(getattr(model, "tokenizer", None), "pad_token_id", None)
    tokens = torch.full((len(rows), length), filler or 0, dtype=torch.long, device=rows[0].device)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, 1
    return tokens, mask
