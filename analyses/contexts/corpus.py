"""A corpus as windows of tokens: texts from a file or a list, read one after the other, cut into pieces that a model reads at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_relevance.errors import RelevanceError
from lens_relevance.shown_text import visible

ENDINGS = (".txt", ".jsonl", ".csv", ".parquet")
_ROWS = 1000  # of a table at a time


@dataclass(frozen=True, eq=False)
class Window:
    """A piece of a text: its number in the corpus, and its tokens, BOS first where the model has one."""

    number: int
    tokens: Int[Tensor, " pos"]


def texts_of(corpus: str | Path | Sequence[str], column: str = "text") -> Iterator[str]:
    """The texts of a list, or of a file: each line of a `.txt`; the field `column` of each row of `.jsonl`, `.csv` or `.parquet`.

    Raises:
        RelevanceError: another ending, a file that cannot be read, a row without that field, or a text that is none.
    """
    if not isinstance(corpus, str | Path):
        yield from corpus
        return
    path = Path(corpus)
    if path.suffix.lower() not in ENDINGS:
        raise RelevanceError(f"{path}: a corpus is read from {', '.join(ENDINGS)}; or give a list of texts")
    try:
        for row, text in enumerate(_read(path, column)):
            if not isinstance(text, str):
                raise RelevanceError(f"{path}: row {row} holds {visible(repr(text))[:40]} as {column!r}, which is no text")
            yield text
    except ImportError as error:
        raise RelevanceError(f"{path}: parquet files are read with pyarrow, which is not installed: pip install pyarrow") from error
    except (OSError, ValueError, KeyError) as error:
        raise RelevanceError(f"{path} cannot be read as a corpus ({type(error).__name__}: {visible(str(error))[:200]})") from error


def _read(path: Path, column: str) -> Iterator[object]:
    kind = path.suffix.lower()
    if kind == ".txt":
        with path.open(encoding="utf-8") as file:
            yield from (line.rstrip("\n") for line in file if line.strip())
    elif kind == ".jsonl":
        with path.open(encoding="utf-8") as file:
            yield from (json.loads(line)[column] for line in file if line.strip())
    elif kind == ".csv":
        for part in pd.read_csv(path, usecols=[column], dtype=str, chunksize=_ROWS, keep_default_na=False):
            yield from part[column]
    else:
        yield from pd.read_parquet(path, columns=[column])[column]


def windows(model: TransformerBridge, texts: Iterator[str], size: int) -> Iterator[Window]:
    """Texts cut into windows of at most `size` tokens, BOS included; what is left of a text is a shorter one. Of one token: left out.

    Raises:
        RelevanceError: the model has no tokenizer, or windows of fewer than two tokens.
    """
    if model.tokenizer is None:
        raise RelevanceError("the model has no tokenizer, so it cannot read texts")
    if not 2 <= size <= model.cfg.n_ctx:
        raise RelevanceError(f"a window has 2 to {model.cfg.n_ctx} tokens on this model, not {size}")
    number = 0
    for text in texts:
        ids = model.to_tokens(text, truncate=False)[0].cpu()
        begin, rest = _beginning(model, ids)
        step = size - len(begin)
        for start in range(0, len(rest), step):
            piece = torch.cat([begin, rest[start : start + step]])
            if len(piece) > 1:
                yield Window(number, piece)
                number += 1


def _beginning(model: TransformerBridge, ids: Int[Tensor, " pos"]) -> tuple[Int[Tensor, " begin"], Int[Tensor, " rest"]]:
    """The BOS that every window begins with, and the rest of a text."""
    bos = getattr(model.tokenizer, "bos_token_id", None)
    return (ids[:1], ids[1:]) if len(ids) and bos is not None and int(ids[0]) == bos else (ids[:0], ids)


def in_batches(stream: Iterator[Window], size: int, together: int = 8) -> Iterator[list[Window]]:
    """Windows in batches of `size`, those of like length together, as far as that can be had within `together` batches."""
    waiting: list[Window] = []
    for window in stream:
        waiting.append(window)
        if len(waiting) == size * together:
            yield from _sorted(waiting, size)
            waiting = []
    yield from _sorted(waiting, size)


def _sorted(waiting: list[Window], size: int) -> Iterator[list[Window]]:
    ordered = sorted(waiting, key=lambda window: (len(window.tokens), window.number))
    yield from (ordered[start : start + size] for start in range(0, len(ordered), size))


def digest_of(corpus: str | Path | Sequence[str]) -> str:
    """A hash of a corpus, by which a checkpoint knows it."""
    result = hashlib.sha256()
    if isinstance(corpus, str | Path):
        try:
            with Path(corpus).open("rb") as file:
                while block := file.read(2**20):
                    result.update(block)
        except OSError as error:
            raise RelevanceError(f"{corpus} cannot be read as a corpus ({error.strerror})") from error
    else:
        for text in corpus:
            encoded = text.encode("utf-8", errors="surrogatepass")
            result.update(f"{len(encoded)} ".encode() + encoded)
    return result.hexdigest()
