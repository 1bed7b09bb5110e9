"""Prompt pairs with a target: what every analysis of a clean and a corrupt run starts from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Int, Shaped
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.tasks import prompts, storage
from lens_relevance.errors import OutOfRangeError, RelevanceError
from lens_relevance.inputs.metrics import Metric
from lens_relevance.inputs.prompt import read_mask
from lens_relevance.inputs.targets import AnyTarget, CallableTarget, TokenTarget, as_target, logit_diff
from lens_relevance.inputs.token_ids import token_ids

_WINDOW = 256  # rows: few enough that the shares of several processes are alike

Rows = int | slice | Sequence[int] | Sequence[bool] | Shaped[Tensor, ""] | Shaped[Tensor, " n"]


@dataclass(frozen=True, eq=False)
class PromptPairs:
    """Rows of a clean and a corrupt prompt of equal length, and what is asked of the model there.

    Attributes:
        clean, corrupt: token ids [n, pos].
        target: a target of `lens_relevance` (one token for all rows, or one per row), or any function of the logits of all these rows,
            [n, pos, d_vocab] -> [n]. It may hold something for each row: of rows that are selected later it gives what it gives of all.
        clean_mask, corrupt_mask: attention masks [n, pos], 1 on real tokens and 0 on padding; all ones where not given. Masks of any type
            are read as integers.
        dropped: what a task left out because it does not fit the tokenizer (words, templates).
    """

    clean: Int[Tensor, "n pos"]
    corrupt: Int[Tensor, "n pos"]
    target: AnyTarget  # a Target after __post_init__
    clean_mask: Shaped[Tensor, "n pos"] = None  # type: ignore[assignment]  # a tensor after __post_init__
    corrupt_mask: Shaped[Tensor, "n pos"] = None  # type: ignore[assignment]
    dropped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", as_target(self.target).made_for(len(self.clean)))
        if self.clean.shape != self.corrupt.shape or self.clean.ndim != 2:
            raise RelevanceError(
                f"clean and corrupt must be ids of one shape [n, pos], got {tuple(self.clean.shape)} and {tuple(self.corrupt.shape)}; "
                "a position must mean the same in both prompts"
            )
        for name in ("clean_mask", "corrupt_mask"):
            mask = getattr(self, name)
            if mask is None:
                object.__setattr__(self, name, torch.ones_like(self.clean))
            elif mask.shape != self.clean.shape:
                raise RelevanceError(f"{name} has shape {tuple(mask.shape)}, the prompts have {tuple(self.clean.shape)}")
            else:
                object.__setattr__(self, name, read_mask(mask, name))

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, rows: Rows) -> PromptPairs:
        """The chosen rows (int, slice, list of ints, mask of bools) as pairs of their own; an int gives one row."""
        ids = torch.arange(len(self))
        if isinstance(rows, int):
            if not -len(self) <= rows < len(self):
                raise OutOfRangeError(f"there is no row {rows} of {len(self)} pairs")
            ids = ids[rows].reshape(1)
        else:
            chosen = rows if isinstance(rows, slice) else torch.as_tensor(rows, device="cpu")
            empty = isinstance(chosen, Tensor) and chosen.numel() == 0  # of no dtype that can index
            ids = ids[:0] if empty else ids[chosen].reshape(-1)
        here = ids.to(self.clean.device)
        return replace(
            self,
            clean=self.clean[here],
            corrupt=self.corrupt[here],
            target=as_target(self.target).select(ids),
            clean_mask=self.clean_mask[here],
            corrupt_mask=self.corrupt_mask[here],
        )

    def metric(self, model: TransformerBridge, on: Literal["clean", "corrupt"] = "clean") -> Metric:
        """The target as a function logits [n, pos, d_vocab] -> [n], for the logits of the clean (or the corrupt) prompts."""
        return as_target(self.target).metric(model, getattr(self, on), getattr(self, f"{on}_mask"))

    def batches(self, size: int) -> Iterator[PromptPairs]:
        """Consecutive pieces of `size` rows; the last one may be shorter.

        Raises:
            RelevanceError: a size below 1.
        """
        if size < 1:
            raise RelevanceError(f"a batch has at least one row, got size {size}")
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def by_length(self) -> PromptPairs:
        """The same pairs with rows of like length side by side, a few hundred at a time, so that batches hold little padding.

        Rows of equal length stay in their order, and all of them do where the target is a function, which may know its rows.
        """
        if isinstance(self.target, CallableTarget):
            return self
        lengths = self.clean_mask.sum(1).cpu()
        windows = torch.arange(len(self)) // _WINDOW
        order = torch.argsort(windows * (self.clean.shape[1] + 1) + lengths, stable=True)
        return self if torch.equal(order, torch.arange(len(self))) else self[order]

    def cropped(self) -> PromptPairs:
        """The same rows without columns at the end that are padding in all of them; as they are where the target is a function."""
        real = ((self.clean_mask | self.corrupt_mask) != 0).any(0)
        end = int(real.nonzero().max()) + 1 if bool(real.any()) else len(real)
        if end == len(real) or isinstance(self.target, CallableTarget):
            return self
        return replace(self, **{name: getattr(self, name)[:, :end] for name in storage.TENSORS})

    def to(self, device: str | torch.device) -> PromptPairs:
        """The same pairs with token ids and masks on `device`."""
        return replace(self, **{name: getattr(self, name).to(device) for name in storage.TENSORS})

    def to_frame(self, model: TransformerBridge) -> pd.DataFrame:
        """One row per pair with the columns clean, corrupt, answer, wrong as text.

        Several answers of one row are joined by " | "; answer and wrong are None where the target is not about given tokens.
        """
        columns: dict[str, list[str] | list[None]] = {
            "clean": prompts.texts(model, self.clean, self.clean_mask),
            "corrupt": prompts.texts(model, self.corrupt, self.corrupt_mask),
            "answer": [None] * len(self),
            "wrong": [None] * len(self),
        }
        if isinstance(self.target, TokenTarget):
            for name, tokens in (("answer", self.target.answer), ("wrong", self.target.wrong)):
                if tokens is not None:
                    columns[name] = prompts.words(model, token_ids(model, tokens, len(self), what=name))
        return pd.DataFrame(columns)

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file with token ids, masks and, in its metadata, the target as JSON.

        Raises:
            RelevanceError: the target is a plain callable (or a target class of your own), which cannot be written without pickling code.
        """
        storage.save(Path(path), {name: getattr(self, name) for name in storage.TENSORS}, self.target, dropped=self.dropped)

    @classmethod
    def load(cls, path: str | Path) -> PromptPairs:
        """What `save` wrote, on the CPU."""
        return cls(**storage.load(Path(path)))

    @classmethod
    def of(
        cls,
        model: TransformerBridge,
        prompt: str | Int[Tensor, "n pos"],
        against: str | Int[Tensor, "n pos"],
        *,
        target: AnyTarget,
    ) -> PromptPairs:
        """One pair (or rows of ids) with any target.

        Raises:
            RelevanceError: a prompt and a counterpart of different length.
        """
        given = [prompts.tokenize(model, one) for one in (prompt, against)]
        if given[0][0].shape != given[1][0].shape:
            shown = " and ".join(str(one.shape[1]) for one, _ in given)
            raise RelevanceError(f"the prompt and its counterpart have {shown} tokens; a position must mean the same in both")
        return cls(given[0][0], given[1][0], target, given[0][1], given[1][1])

    @classmethod
    def from_strings(
        cls, model: TransformerBridge, clean: Sequence[str], corrupt: Sequence[str], *, answer: Sequence[str], wrong: Sequence[str]
    ) -> PromptPairs:
        """Pairs from text, with the target logit(answer) - logit(wrong). Rows may differ in length (padded on the right); a pair may not.

        Raises:
            RelevanceError: lists every bad row: clean and corrupt of different token length, an answer that is not one token.
        """
        answers, wrongs = prompts.check_rows(model, clean, corrupt, answer=answer, wrong=wrong)
        clean_tokens, clean_mask = prompts.tokenize(model, list(clean))
        corrupt_tokens, corrupt_mask = prompts.tokenize(model, list(corrupt))
        return cls(clean_tokens, corrupt_tokens, logit_diff(torch.tensor(answers), torch.tensor(wrongs)), clean_mask, corrupt_mask)

    @classmethod
    def from_file(cls, model: TransformerBridge, path: str | Path) -> PromptPairs:
        """`from_strings` on a .csv or a .jsonl (one JSON object per line) with the columns clean, corrupt, answer, wrong."""
        columns = prompts.read_columns(Path(path))
        return cls.from_strings(model, **columns)


def require_pairs(pairs: Any) -> PromptPairs:
    """The pairs; raises RelevanceError for prompts on their own, with what to write instead."""
    if not isinstance(pairs, PromptPairs):
        raise RelevanceError(
            f"pairs of prompts are needed, not {type(pairs).__name__}: PromptPairs.of(model, prompt, against, target=...), "
            "PromptPairs.from_strings(model, clean=[...], corrupt=[...], answer=[...], wrong=[...]), a task such as ioi(model), or "
            "PromptPairs.from_file(model, path)"
        )
    return pairs


def require_same_padding(pairs: PromptPairs) -> None:
    """Raises RelevanceError for pairs whose two prompts are padded differently, so that position by position they cannot be compared."""
    if not torch.equal(pairs.clean_mask, pairs.corrupt_mask):
        raise RelevanceError("clean and corrupt prompts differ in their padding, so positions do not correspond")
