"""What the embedded model reads: its vocabulary and tokenizer, the pairs of names kept from it, and its training sequences."""

from __future__ import annotations

import random
import re
from itertools import combinations, groupby
from typing import cast

import torch
from jaxtyping import Int
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast

from analyses.tasks.fitting import token_lengths
from analyses.tasks.ioi_task import NAMES, OBJECTS, PLACES, TEMPLATES, ioi
from lens_relevance.inputs.targets import TokenTarget

SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
PREFIXES = ("", "Yesterday, ", "Today, ", "One day, ", "Last week, ", "On Sunday, ", "In the morning, ", "Two days ago, ")
HELD_OUT_SHARE = 0.2
REPEATED_LENGTHS = (5, 7, 9, 12, 15, 18, 23)


def held_out_pairs() -> list[tuple[str, str]]:
    """The pairs of names, a fifth of all, that never occur together in one training sequence. Each name occurs, with others."""
    pairs = list(combinations(NAMES, 2))
    return random.Random(0).sample(pairs, round(HELD_OUT_SHARE * len(pairs)))


def training_pairs() -> list[tuple[str, str]]:
    """All other pairs of names."""
    held_out = set(held_out_pairs())
    return [pair for pair in combinations(NAMES, 2) if pair not in held_out]


def training_templates() -> list[str]:
    """The templates of the IOI task behind every prefix, so that no name has a position of its own."""
    return [prefix + (template if not prefix else template[0].lower() + template[1:]) for prefix in PREFIXES for template in TEMPLATES]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word. A word is the same token with and without a leading space: "Mary" and " Mary"."""
    text = " ".join(re.sub(r"{\w+}", "", template) for template in training_templates())
    words = sorted(set(re.findall(r"\w+", text)) | {*NAMES, *PLACES, *OBJECTS})
    vocabulary = {token: i for i, token in enumerate([*SPECIAL.values(), ",", ".", *(f"▁{word}" for word in words)])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    # The mark of a word is put before it, typed space or not; other white space goes, so that "store ," and a last space do no harm.
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"\s*(?<!\w)(?=\w)"), "▁"), normalizers.Replace(Regex(r"\s+"), "")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁\w+|[^▁\w]"), "isolated")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="right", **SPECIAL)


def ioi_sequences(reader: TransformerBridge, per_template: int, seed: int) -> list[Int[Tensor, "n pos"]]:
    """Whole IOI sentences "<bos> ... to Mary . <eos>" of the training pairs, one tensor per length. The answer is the third from last."""
    templates = training_templates()
    examples = [template.format(first="Mary", second="John", subject="John", place="store", object="drink") for template in templates]
    by_length = sorted(zip(token_lengths(reader, examples), templates, strict=True))
    end = torch.tensor([reader.to_single_token("."), reader.tokenizer.eos_token_id])
    sequences = []
    for length, group in groupby(by_length, key=lambda item: item[0]):
        of_length = [template for _, template in group]
        pairs = ioi(reader, per_template * len(of_length), seed + length, templates=of_length, name_pairs=training_pairs())
        sequences.append(torch.cat([pairs.clean, cast(TokenTarget, pairs.target).answer[:, None], end.expand(len(pairs), 2)], 1))
    return sequences


def repeated_sequences(reader: TransformerBridge, n: int, length: int, *, seed: int) -> Int[Tensor, "n pos"]:
    """ "<bos> x1 ... xL, then neighbours x_i x_i+1 of it in random order": the second of each can only be known by induction.

    Repeated in order, a model finds the answer by counting back L positions, and never looks for the token itself. No sequence has a
    held-out pair of names.
    """
    rivals: dict[int, set[int]] = {}
    for pair in held_out_pairs():
        a, b = (reader.to_single_token(name) for name in pair)
        rivals.setdefault(a, set()).add(b)
        rivals.setdefault(b, set()).add(a)
    vocabulary = [token for token in range(len(reader.tokenizer)) if token not in reader.tokenizer.all_special_ids]
    rng = random.Random(seed + length)
    rows = []
    for _ in range(n):
        row: list[int] = []
        for token in rng.sample(vocabulary, len(vocabulary)):
            if len(row) < length and not rivals.get(token, set()) & set(row):
                row.append(token)
        starts = rng.sample(range(length - 1), length // 2)
        rows.append([reader.tokenizer.bos_token_id, *row, *(token for start in starts for token in row[start : start + 2])])
    return torch.tensor(rows)
