"""What is explained: a scalar per example, from the logits or from a latent.

Tokens are strings (each must be one token) or ids, one for all examples or one per example. Positions count each row's real tokens, so
that -1 is the last real token whatever the padding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_relevance.errors import RelevanceError
from lens_relevance.rules.attention import logarithmic_mean

Logits = Float[Tensor, "batch pos vocab"]
Tokens = Any  # str | int | sequence of them | Int[Tensor, "batch"]; checked by token_ids with messages of its own


class Metric:
    """A function from logits [batch, pos, vocab] to [batch] (or a scalar), for the tokens it was made for."""

    linear = False

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, logits: Tensor) -> Tensor:
        return self.function(logits)

    def pair_coefficients(self, logits: Logits, reference: Logits) -> Logits:
        """Coefficients at the logits that make (logits - reference) * coefficients sum to the difference of the metric.

        Here the gradient averaged over the straight path between the two logits (8-point Gauss-Legendre): exact for polynomials up to
        degree 15 and as near as quadrature comes for others; the audit shows what is left as the sink `target`.
        """
        nodes, weights = np.polynomial.legendre.leggauss(8)
        total = torch.zeros_like(logits)
        for t, w in zip((nodes + 1) / 2, weights / 2, strict=True):
            total += float(w) * gradient_at(self, reference + float(t) * (logits - reference))
        return total


class LogitCombination(Metric):
    """mean of logits[at, answer] - mean of logits[at, wrong]."""

    linear = True

    def __init__(self, at: Int[Tensor, " batch"], answer: Int[Tensor, "batch n"], wrong: Int[Tensor, "batch m"] | None) -> None:
        self.at, self.answer, self.wrong = at, answer, wrong

    def __call__(self, logits: Tensor) -> Tensor:
        at = self.at.to(logits.device)
        last = _upcast(logits[torch.arange(at.shape[0], device=at.device), at])
        value = last.gather(1, self.answer.to(at.device)).mean(1)
        return value if self.wrong is None else value - last.gather(1, self.wrong.to(at.device)).mean(1)

    def pair_coefficients(self, logits: Logits, reference: Logits) -> Logits:
        return gradient_at(self, logits)


class LogProbs(Metric):
    """Sum over n of log softmax(logits[at])[token]."""

    def __init__(self, at: Int[Tensor, "batch n"], tokens: Int[Tensor, "batch n"]) -> None:
        self.at, self.tokens = at, tokens

    def _at(self, logits: Tensor) -> Tensor:
        rows = torch.arange(self.at.shape[0], device=logits.device).unsqueeze(1)
        return _upcast(logits[rows, self.at.to(logits.device)])

    def __call__(self, logits: Tensor) -> Tensor:
        return self._at(logits).log_softmax(-1).gather(2, self.tokens.to(logits.device).unsqueeze(2)).sum((1, 2))

    def pair_coefficients(self, logits: Logits, reference: Logits) -> Logits:
        """The softmax pair form, exact: d log p_t = ds_t - sum_j l_j ds_j / sum_k l_k (derived here)."""
        weights = logarithmic_mean(self._at(logits), self._at(reference))
        onehot = torch.nn.functional.one_hot(self.tokens.to(logits.device), logits.shape[-1])
        coefficients = (onehot - weights / weights.sum(-1, keepdim=True)).to(logits.dtype)
        index = self.at.to(logits.device).unsqueeze(2).expand_as(coefficients)
        return torch.zeros_like(logits).scatter_add(1, index, coefficients)


def _upcast(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


class Target(ABC):
    """A scalar per example that relevance is propagated from."""

    @abstractmethod
    def metric(self, model: Any, tokens: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"] | None = None) -> Metric:
        """The target as a function of the logits of these tokens."""

    def select(self, rows: Any) -> Target:
        """The target of some rows (slice, list or index tensor) of the batch."""
        return self


def gradient_at(metric: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """d(sum of the metric over the batch) / d(logits)."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_(True)
        value = metric(leaf)
        if not value.requires_grad:
            raise RelevanceError("the target does not depend on the logits, so there is nothing to propagate")
        return torch.autograd.grad(value.sum(), leaf)[0]


def token_ids(model: Any, tokens: Tokens, batch: int, what: str) -> Int[Tensor, "batch n"]:
    """Token ids, one row per example; each string must be a single token."""
    if isinstance(tokens, str | int) or (isinstance(tokens, Tensor) and tokens.ndim == 0):
        tokens = [tokens] * batch
    if isinstance(tokens, Tensor):
        tokens = tokens.tolist()
    if len(tokens) == 1 and batch > 1:
        tokens = list(tokens) * batch
    if len(tokens) != batch:
        raise RelevanceError(f"{what}: {len(tokens)} given for {batch} example(s); give one per example, or one for all")
    rows = [[single_token(model, t, what) for t in (row if isinstance(row, list | tuple) else [row])] for row in tokens]
    if len({len(row) for row in rows}) > 1:
        raise RelevanceError(f"{what}: every example needs the same number of tokens, got {[len(row) for row in rows]}")
    return torch.tensor(rows, dtype=torch.long, device=_device(model))


def single_token(model: Any, token: str | int | Tensor, what: str = "token") -> int:
    """The id of one token; a string of several pieces is refused with the pieces shown."""
    vocabulary = int(model.cfg.d_vocab)
    if isinstance(token, str):
        if getattr(model, "tokenizer", None) is None:
            raise RelevanceError(f"{what} {token!r}: the model has no tokenizer; give token ids")
        ids = model.to_tokens(token, prepend_bos=False)[0].tolist()
        if len(ids) != 1:
            pieces = [model.tokenizer.decode([i]) for i in ids]
            raise RelevanceError(
                f"{what} {token!r} is {len(ids)} tokens {pieces}; give one of them (often with a leading space), "
                "or continuation(...) for an answer of several tokens"
            )
        if model.tokenizer.unk_token_id is not None and ids[0] == model.tokenizer.unk_token_id:
            raise RelevanceError(f"{what} {token!r} is not in the vocabulary of this tokenizer")
        return int(ids[0])
    index = int(token)
    if not 0 <= index < vocabulary:
        raise RelevanceError(f"{what} id {index} is outside the vocabulary of {vocabulary}")
    return index


def positions(position: int, tokens: Tensor, attention_mask: Tensor | None) -> Int[Tensor, " batch"]:
    """Index of the position-th real token of each row; negative positions count from the end."""
    mask = torch.ones_like(tokens) if attention_mask is None else attention_mask.to(tokens.device).long()
    real = mask.sum(1)
    wanted = position if position >= 0 else real + position
    if bool(((torch.as_tensor(wanted) < 0) | (torch.as_tensor(wanted) >= real)).any()):
        raise RelevanceError(f"position {position} is outside the prompt: rows have {sorted(set(real.tolist()))} real tokens")
    return ((mask.cumsum(1) == (torch.as_tensor(wanted, device=tokens.device) + 1).reshape(-1, 1)) & (mask == 1)).long().argmax(1)


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device


def _rows(tokens: Tokens, rows: Any) -> Tokens:
    if isinstance(tokens, str | int) or (isinstance(tokens, Tensor) and tokens.ndim == 0) or len(tokens) == 1:
        return tokens
    if isinstance(tokens, Tensor) or isinstance(rows, slice):
        return tokens[rows]
    picked = torch.as_tensor(rows)
    return [tokens[int(i)] for i in (picked.nonzero().flatten() if picked.dtype == torch.bool else picked)]


@dataclass(frozen=True)
class TokenTarget(Target):
    """Logits or log-probabilities of given tokens at one position; built by `logit`, `logit_diff` and `log_prob`."""

    kind: Literal["logit", "logit_diff", "log_prob"]
    answer: Tokens
    wrong: Tokens = None
    position: int = -1

    def metric(self, model: Any, tokens: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"] | None = None) -> Metric:
        batch = tokens.shape[0]
        at = positions(self.position, tokens, attention_mask)
        answer = token_ids(model, self.answer, batch, "answer")
        if self.kind == "log_prob":
            if answer.shape[1] > 1:
                raise RelevanceError("log_prob takes one token per example; continuation(...) sums over several")
            return LogProbs(at.unsqueeze(1), answer)
        return LogitCombination(at, answer, None if self.wrong is None else token_ids(model, self.wrong, batch, "wrong answer"))

    def select(self, rows: Any) -> TokenTarget:
        return replace(self, answer=_rows(self.answer, rows), wrong=None if self.wrong is None else _rows(self.wrong, rows))


def logit(token: Tokens, position: int = -1) -> TokenTarget:
    """The logit of a token (the mean, where an example gives a tuple of several) at a position.

    Units: logits. Raises RelevanceError for a string that is not one token.
    """
    return TokenTarget("logit", token, position=position)


def logit_diff(answer: Tokens, wrong: Tokens, position: int = -1) -> TokenTarget:
    """logit(answer) - logit(wrong) at a position, the field's usual metric. Units: logits."""
    return TokenTarget("logit_diff", answer, wrong, position)


def log_prob(token: Tokens, position: int = -1) -> TokenTarget:
    """log softmax(logits)[token] at a position. Units: nats. Not linear in the logits: see `pair_coefficients`."""
    return TokenTarget("log_prob", token, position=position)


@dataclass(frozen=True)
class CallableTarget(Target):
    """Any function from logits [batch, pos, vocab] to a scalar or [batch]."""

    function: Callable[[Tensor], Tensor]

    def metric(self, model: Any, tokens: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"] | None = None) -> Metric:
        def checked(logits: Tensor) -> Tensor:
            value = self.function(logits)
            if not isinstance(value, Tensor) or value.ndim > 1 or (value.ndim == 1 and value.shape[0] != logits.shape[0]):
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise RelevanceError(f"a target must give a scalar or one value per example [{logits.shape[0]}], got {shape}")
            return value

        return Metric(checked)


def top_prediction(logits: Logits, tokens: Tensor, mask: Tensor | None) -> TokenTarget:
    """Each row's most likely next token against its runner-up."""
    rows = torch.arange(tokens.shape[0], device=logits.device)
    top = logits.detach()[rows, positions(-1, tokens, mask).to(logits.device)].topk(2, -1).indices
    return logit_diff(top[:, 0], top[:, 1])


def as_target(target: Target | Callable[[Tensor], Tensor]) -> Target:
    """A Target from what the user gave."""
    if isinstance(target, Target):
        return target
    if callable(target):
        return CallableTarget(target)
    raise RelevanceError(
        f"target must be a Target (logit, logit_diff, log_prob, ...), a function of the logits or None, got {type(target).__name__}"
    )


def describe(target: Target | Callable[[Tensor], Tensor] | None, model: Any | None = None) -> str:
    """A target in words, for tables and pages."""
    if not isinstance(target, TokenTarget):
        return type(target).__name__ if isinstance(target, Target) else getattr(target, "__name__", "top prediction")

    def words(tokens: Tokens) -> str:
        listed: Sequence[Any] = [tokens] if isinstance(tokens, str | int) else list(tokens)
        texts = [
            t if isinstance(t, str) or model is None or model.tokenizer is None else model.tokenizer.decode([int(t)]) for t in listed[:1]
        ]
        return repr(texts[0]) + (" ..." if len(listed) > 1 else "")

    if target.wrong is not None:
        return f"logit({words(target.answer)}) - logit({words(target.wrong)})"
    return f"{target.kind}({words(target.answer)})"
