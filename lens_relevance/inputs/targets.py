"""What is explained: a scalar per example, from the logits or from a latent.

Tokens are strings (each must be one token) or ids, one for all examples or one per example; of a classifier they are the names or numbers
of its classes. Positions count each row's real tokens, so that -1 is the last real token whatever the padding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_relevance.errors import RelevanceError
from lens_relevance.hooked_model import HookedModel
from lens_relevance.inputs.class_labels import class_names, is_headless
from lens_relevance.inputs.functions import FunctionMetric
from lens_relevance.inputs.metrics import AtPositions, LatentValue, LogitCombination, LogProbs, Metric
from lens_relevance.inputs.token_ids import Tokens, device_of, positions, text_ids, token_ids

Logits = Float[Tensor, "batch pos d_vocab"]
Kind = Literal["logit", "logit_diff", "log_prob"]
Extended = tuple[Int[Tensor, "batch pos_and_added"], Int[Tensor, "batch pos_and_added"]]


class Target(ABC):
    """A scalar per example that relevance is propagated from; `point` names the HookPoint it is a function of, None the logits."""

    point: str | None = None

    @abstractmethod
    def metric(
        self, model: HookedModel, tokens: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"] | None = None
    ) -> Metric:
        """The target as a function of the logits of these tokens."""

    def select(self, rows: Any) -> Target:
        """The target of some rows (slice, list or index tensor) of the batch."""
        return self

    def made_for(self, n: int) -> Target:
        """The target of a data set of n rows, before rows are selected. Needed where a target does not tell what it holds for each row."""
        return self

    def extend(self, model: HookedModel, tokens: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"]) -> Extended:
        """The inputs with what the target itself adds to them (a continuation); by default nothing."""
        return tokens, attention_mask


TargetFunction = Callable[[Float[Tensor, "batch pos d_vocab"]], Float[Tensor, "*batch"]]
"""A target of your own: from logits (of a classifier [batch, 1, class]) to one number per example, or a single one."""
AnyTarget = Target | TargetFunction


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

    kind: Kind
    answer: Tokens
    wrong: Tokens = None
    position: int = -1

    def metric(
        self, model: HookedModel, tokens: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"] | None = None
    ) -> Metric:
        if is_headless(model):
            raise RelevanceError(
                "this model has no head: its output is the last hidden state, and no token or class has a logit there; "
                "explain similarity(...), latent(...), or a function of the output"
            )
        batch = tokens.shape[0]
        at = positions(self.position, tokens, attention_mask).unsqueeze(1)
        answer = token_ids(model, self.answer, batch, what="answer")
        if self.kind == "log_prob":
            if answer.shape[1] > 1:
                raise RelevanceError("log_prob takes one token per example; continuation(...) sums over several")
            return AtPositions(at, LogProbs(answer))
        wrong = None if self.wrong is None else token_ids(model, self.wrong, batch, what="wrong answer")
        return AtPositions(at, LogitCombination(answer, wrong))

    def select(self, rows: Any) -> TokenTarget:
        return replace(self, answer=_rows(self.answer, rows), wrong=None if self.wrong is None else _rows(self.wrong, rows))


def logit(token: Tokens, position: int = -1) -> TokenTarget:
    """The logit of a token, or of a classifier's class (the mean, where an example gives a tuple of several) at a position.

    Where LRP starts (Bach et al. 2015). Units: logits. Raises RelevanceError for a string that is not one token, or not one class.
    """
    return TokenTarget("logit", token, position=position)


def logit_diff(answer: Tokens, wrong: Tokens, position: int = -1) -> TokenTarget:
    """logit(answer) - logit(wrong) at a position, the metric of Wang et al. 2022 (arXiv 2211.00593). Units: logits."""
    return TokenTarget("logit_diff", answer, wrong, position)


def log_prob(token: Tokens, position: int = -1) -> TokenTarget:
    """log softmax(logits)[token] at a position; ours as a target. Units: nats. Not linear in the logits: see `pair_coefficients`."""
    return TokenTarget("log_prob", token, position=position)


@dataclass(frozen=True, eq=False)
class CallableTarget(Target):
    """Any function from logits [batch, pos, d_vocab] to a scalar or [batch].

    n: how many rows it was made for; None: those that it is given. rows: which of them this is the target of; None: all.
    """

    function: TargetFunction
    n: int | None = None
    rows: Int[Tensor, " row"] | None = None

    def metric(
        self, model: HookedModel, tokens: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"] | None = None
    ) -> FunctionMetric:
        expected = len(tokens) if self.n is None else len(self._all())
        if len(tokens) != expected:
            raise RelevanceError(
                f"the function is the target of {expected} row(s), and there are {len(tokens)}; select the same rows of both, as "
                "pairs[rows] does, or give the function itself"
            )
        n_tokens = int(getattr(getattr(model, "cfg", None), "d_vocab", 0))
        like = torch.empty(0, tokens.shape[1], n_tokens, dtype=next(model.parameters()).dtype, device=tokens.device)
        return FunctionMetric(self.function, len(tokens) if self.n is None else self.n, self.rows, like)

    def made_for(self, n: int) -> CallableTarget:
        if self.n is None:
            return replace(self, n=n)
        if len(self._all()) != n:
            raise RelevanceError(f"the function is the target of {len(self._all())} row(s), and there are {n}; give the function itself")
        return self

    def select(self, rows: Any) -> CallableTarget:
        if self.n is None:
            raise RelevanceError("how many rows a function was made for has to be known before some are selected: target.made_for(n)")
        return replace(self, rows=self._all()[rows if isinstance(rows, slice) else torch.as_tensor(rows, device="cpu")])

    def _all(self) -> Int[Tensor, " row"]:
        return torch.arange(self.n or 0) if self.rows is None else self.rows


@dataclass(frozen=True)
class Continuation(Target):
    """The summed log-probability of an answer of several tokens; built by `continuation`."""

    text: Any

    def _answers(self, model: HookedModel, batch: int) -> list[Tensor]:
        if class_names(model) is not None:
            raise RelevanceError("continuation: nothing follows the inputs of a classifier; explain a class, as in logit('cat')")
        given = [self.text] * batch if isinstance(self.text, str) or _is_ids(self.text) else list(self.text)
        if len(given) != batch:
            raise RelevanceError(f"continuation: {len(given)} given for {batch} example(s); give one per example, or one for all")
        device = device_of(model)
        answers = [text_ids(model, a) if isinstance(a, str) else torch.as_tensor(a, device=device) for a in given]
        if any(a.numel() == 0 for a in answers):
            raise RelevanceError("continuation: an answer is empty")
        if len({len(a) for a in answers}) > 1:
            raise RelevanceError(f"continuation: answers need equally many tokens within a batch, got {[len(a) for a in answers]}")
        return [a.to(device) for a in answers]

    def extend(self, model: HookedModel, tokens: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"]) -> Extended:
        from lens_relevance.inputs.prompt import pad

        rows = zip(tokens, attention_mask.bool(), self._answers(model, tokens.shape[0]), strict=True)
        return pad([torch.cat([row[real], answer[:-1]]) for row, real, answer in rows], model)

    def metric(
        self, model: HookedModel, tokens: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"] | None = None
    ) -> Metric:
        answers = torch.stack(self._answers(model, tokens.shape[0]))
        n = answers.shape[1]
        at = torch.stack([positions(i - n, tokens, attention_mask) for i in range(n)], 1)
        return AtPositions(at, LogProbs(answers))

    def select(self, rows: Any) -> Continuation:
        return self if _is_ids(self.text) else replace(self, text=_rows(self.text, rows))


def _is_ids(given: Any) -> bool:
    """Whether this is one row of token ids, meant for all examples."""
    return (isinstance(given, Tensor) and given.ndim == 1) or (isinstance(given, list | tuple) and all(isinstance(i, int) for i in given))


def continuation(text: Any) -> Continuation:
    """The summed log-probability of several tokens that follow the prompt, e.g. continuation(" went home"); ours. Units: nats.

    text: a string, a row of token ids, or one of these per example (equally many tokens). All but its last token are appended to the
    inputs, so results have that many more positions.
    """
    return Continuation(text)


@dataclass(frozen=True, eq=False)
class Latent(Target):
    """A latent instead of the output; built by `latent`."""

    point: str | None = None
    head: int | None = None
    unit: int | None = None
    direction: Float[Tensor, " d"] | None = None
    position: int = -1
    feature: int | None = None

    def metric(
        self, model: HookedModel, tokens: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"] | None = None
    ) -> Metric:
        unit = self.unit if self.feature is None else 0  # of a feature its own values are read, [batch, pos, 1]
        return LatentValue(
            str(self.point), positions(self.position, tokens, attention_mask), self.head, unit=unit, direction=self.direction
        )


def latent(
    name: str,
    unit: int | None = None,
    head: int | None = None,
    *,
    direction: Float[Tensor, " d"] | None = None,
    position: int = -1,
    feature: int | None = None,
) -> Latent:
    """Start from a unit, or a direction, at a HookPoint (of one head, where the layout is [.., head, d_head]) at a position.

    feature: Of the dictionary that writes there: why did it fire (Achtibat et al. 2023, arXiv 2206.03208)? Units: those of the activation.

    Raises:
        RelevanceError: a feature together with a unit, head or direction.
    """
    if feature is not None and not (unit is None and head is None and direction is None):
        raise RelevanceError("latent: a feature goes without unit, head and direction")
    return Latent(name, head, unit, direction, position, feature)


def top_prediction(logits: Float[Tensor, "batch *pos d_vocab"], tokens: Tensor, mask: Tensor | None) -> TokenTarget:
    """Each row's most likely next token (or class) against its runner-up, where there is one."""
    rows = torch.arange(tokens.shape[0], device=logits.device)
    last = logits if logits.ndim == 2 else logits[rows, positions(-1, tokens, mask).to(logits.device)]
    if last.shape[-1] == 1:
        return logit(0)
    top = last.detach().topk(2, -1).indices
    return logit_diff(top[:, 0], top[:, 1])


def as_target(target: Any) -> Target:
    """A Target from what the user gave."""
    if isinstance(target, Target):
        return target
    if callable(target):
        return CallableTarget(target)
    raise RelevanceError(
        f"target must be a Target (logit, logit_diff, log_prob, ...), a function of the logits or None, got {type(target).__name__}"
    )


def describe(target: AnyTarget | None, model: HookedModel | None = None) -> str:
    """A target in words, for tables and pages."""
    if isinstance(target, Latent):
        if target.feature is not None:
            return f"latent({target.point}, feature={target.feature})"
        return f"latent({target.point}, head={target.head}, unit={target.unit})"
    if isinstance(target, Continuation):
        return f"continuation({target.text!r})"
    if isinstance(target, CallableTarget):
        return getattr(target.function, "__name__", "metric")
    if not isinstance(target, TokenTarget):
        return type(target).__name__ if isinstance(target, Target) else getattr(target, "__name__", "top prediction")

    def words(tokens: Tokens) -> str:
        first, several = tokens, False
        while not isinstance(first, str | int) and getattr(first, "ndim", 1) > 0:
            first, several = first[0], several or len(first) > 1
        return repr(word(first)) + (" ..." if several else "")

    def word(token: Any) -> Any:
        classes = None if model is None else class_names(model)
        if isinstance(token, str):
            return token
        if classes is not None:
            return classes.get(int(token), int(token))
        return int(token) if getattr(model, "tokenizer", None) is None else model.tokenizer.decode([int(token)])  # type: ignore[union-attr]

    if target.wrong is not None:
        return f"logit({words(target.answer)}) - logit({words(target.wrong)})"
    return f"{target.kind}({words(target.answer)})"
