"""Text in and out of prompt pairs: rows from strings or a file, checked one by one, and rows back as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_relevance.errors import RelevanceError
from lens_relevance.inputs.prompt import tokenize
from lens_relevance.inputs.token_ids import single_token

__all__ = ["check_rows", "read_columns", "texts", "tokenize", "words"]

COLUMNS = ("clean", "corrupt", "answer", "wrong")
_SHOWN = 10


def check_rows(
    model: TransformerBridge, clean: Sequence[str], corrupt: Sequence[str], *, answer: Sequence[str], wrong: Sequence[str]
) -> tuple[list[int], list[int]]:
    """Token ids of answer and wrong, one per row. Raises a RelevanceError that names every bad row and what is wrong with it."""
    lengths = {name: len(column) for name, column in zip(COLUMNS, (clean, corrupt, answer, wrong), strict=True)}
    if len(set(lengths.values())) > 1 or not lengths["clean"]:
        raise RelevanceError(f"clean, corrupt, answer and wrong need one entry per row, got {lengths}")
    if model.tokenizer is None:
        raise RelevanceError("the model has no tokenizer; build PromptPairs(clean, corrupt, target) from token ids")
    answers: list[int] = []
    wrongs: list[int] = []
    problems: list[str] = []
    for row, (clean_text, corrupt_text, answer_text, wrong_text) in enumerate(zip(clean, corrupt, answer, wrong, strict=True)):
        pieces = [model.to_str_tokens(text, prepend_bos=False) if text else [] for text in (clean_text, corrupt_text)]
        if not all(pieces):
            problems.append(f"row {row}: a prompt is empty")
            continue
        if len(pieces[0]) != len(pieces[1]):
            problems.append(f"row {row}: clean has {len(pieces[0])} tokens {pieces[0]}, corrupt has {len(pieces[1])} {pieces[1]}")
        for name, text, ids in (("answer", answer_text, answers), ("wrong", wrong_text, wrongs)):
            try:
                ids.append(_answer_token(model, clean_text, text, name))
            except RelevanceError as error:
                if name == "answer" or wrong_text != answer_text:  # where nothing is wrong, the answer stands for both
                    problems.append(f"row {row}: {error}")
    if problems:
        more = f"\n... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise RelevanceError("these rows do not make prompt pairs:\n" + "\n".join(problems[:_SHOWN]) + more)
    return answers, wrongs


def _answer_token(model: TransformerBridge, prompt: str, answer: str, name: str) -> int:
    """The one token of an answer. With some tokenizers a leading space is a token of its own unless the answer follows a text."""
    try:
        return single_token(model, answer, name)
    except RelevanceError:
        before, both = (model.to_tokens(text, prepend_bos=False, truncate=False)[0].tolist() for text in (prompt, prompt + answer))
        if answer.startswith(" ") and both[:-1] == before and both[-1] != model.tokenizer.unk_token_id:
            return int(both[-1])
        raise


def read_columns(path: Path) -> dict[str, list[str]]:
    """The columns clean, corrupt, answer and wrong of a .csv or .jsonl file; spaces at the start of an answer are kept."""
    if not path.is_file():
        raise RelevanceError(f"there is no file {path}")
    try:
        if path.suffix == ".csv":
            frame = pd.read_csv(path, dtype=str, keep_default_na=False)
        elif path.suffix == ".jsonl":
            frame = pd.read_json(path, lines=True, dtype=False)
        else:
            raise RelevanceError(f"{path.name}: prompt pairs are read from .csv or .jsonl")
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise RelevanceError(f"{path.name} cannot be read: {' '.join(str(error).split())}") from error
    except UnicodeDecodeError as error:
        raise RelevanceError(f"{path.name} is not UTF-8: {error}") from error
    except ValueError as error:
        if isinstance(error, RelevanceError):
            raise
        raise RelevanceError(f"{path.name} is not one JSON object per line: {error}") from error
    missing = [column for column in COLUMNS if column not in frame.columns]
    if missing:
        raise RelevanceError(f"{path.name} lacks the column(s) {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}")
    if twice := [column for column in COLUMNS if f"{column}.1" in frame.columns]:  # as pandas names it
        raise RelevanceError(f"{path.name} has the column {twice[0]} twice")
    if not len(frame):
        raise RelevanceError(f"{path.name} holds no pairs")
    columns = {column: list(frame[column]) for column in COLUMNS}
    bad = [row for row in range(len(frame)) if not all(isinstance(column[row], str) and column[row] for column in columns.values())]
    if bad:
        raise RelevanceError(f"{path.name}: row(s) {', '.join(map(str, bad[:_SHOWN]))} lack a text in one of {', '.join(COLUMNS)}")
    if any("\0" in text for column in columns.values() for text in column):
        raise RelevanceError(f"{path.name} holds NUL characters, so it is damaged or no text")
    return columns


def texts(model: TransformerBridge, tokens: Int[Tensor, "n pos"], mask: Int[Tensor, "n pos"]) -> list[str]:
    """The real tokens of each row as text, without BOS and other special tokens; ids where the model has no tokenizer."""
    rows = [row[keep.bool()].tolist() for row, keep in zip(tokens.cpu(), mask.cpu(), strict=True)]
    if model.tokenizer is None:
        return [" ".join(map(str, row)) for row in rows]
    return [str(model.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]


def words(model: TransformerBridge, tokens: Int[Tensor, "n k"]) -> list[str]:
    """Each row's tokens as text, joined by " | "; ids where the model has no tokenizer."""
    decode = str if model.tokenizer is None else (lambda token: str(model.tokenizer.decode([token])))
    return [" | ".join(decode(token) for token in row) for row in tokens.tolist()]
