"""What a notebook shows of a result whose name stands alone in a cell: the tokens in colour, the strongest heads, the account."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_relevance.errors import RelevanceError

if TYPE_CHECKING:
    from lens_relevance.cache import RelevanceCache

_EXAMPLES, _TOKENS, _HEADS = 3, 200, 5  # what is shown of a large result
_POSITIVE, _NEGATIVE = "37,99,235", "220,38,38"  # blue and red, over whatever background the notebook has


def token_strings(tokenizer: Any, ids: Int[Tensor, " pos"]) -> list[str]:
    """One string per token id, as `model.to_str_tokens` gives them."""
    return tokenizer.batch_decode([[i] for i in ids.tolist()], clean_up_tokenization_spaces=False)


def tokens_html(strings: Sequence[str], relevance: Float[Tensor, " pos"]) -> str:
    """A line of tokens on blue (for the target) and red (against it); the number is shown when the pointer rests on a token."""
    largest = float(relevance.abs().max()) or 1.0
    shown = [
        f'<span title="{escape(repr(text))}: {value:+.4g}" style="background:rgba({_POSITIVE if value > 0 else _NEGATIVE},'
        f'{0.75 * abs(value) / largest:.3f});padding:1px 2px;white-space:pre-wrap">{escape(_visible(text))}</span>'
        for text, value in zip(strings[:_TOKENS], relevance[:_TOKENS].tolist(), strict=True)
    ]
    rest = f" … {len(strings) - _TOKENS} more tokens" if len(strings) > _TOKENS else ""
    return f'<div style="line-height:1.9">{"".join(shown)}{rest}</div>'


def examples_html(tokenizer: Any, ids: Tensor, mask: Tensor, relevance: Tensor) -> str:
    """The first examples of a batch as lines of tokens, without padding; nothing for images and without a tokenizer."""
    if tokenizer is None or ids.shape != relevance.shape or ids.is_floating_point():
        return ""
    rows = [mask[i].bool().cpu() for i in range(min(len(ids), _EXAMPLES))]
    lines = [tokens_html(token_strings(tokenizer, ids[i].cpu()[real]), relevance[i].double().cpu()[real]) for i, real in enumerate(rows)]
    return "".join(lines) + (f"<div>… {len(ids) - _EXAMPLES} more examples</div>" if len(ids) > _EXAMPLES else "")


def table_html(rows: Sequence[Mapping[str, object]]) -> str:
    """A small table; the keys of the first row are its head."""
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(str(value))}</td>" for value in row.values()) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def cache_html(cache: RelevanceCache) -> str:
    """A RelevanceCache: its line of facts, with one stack also the tokens and the strongest heads, and the account's largest error."""
    parts = [f"<div><code>{escape(repr(cache))}</code></div>"]
    if len(cache.stacks) == 1:
        parts += [_tokens_of(cache), _strongest_heads(cache)]
    if cache.account is not None and "unexplained" in cache.account:
        parts.append(f"<div>account: at most {float(cache.account['unexplained'].abs().max()):.2g} unexplained at any layer</div>")
    return "".join(parts)


def _tokens_of(cache: RelevanceCache) -> str:
    try:
        return examples_html(cache.tokenizer, cache.input_tokens, cache.mask, cache.tokens())
    except RelevanceError:  # not kept
        return ""


def _strongest_heads(cache: RelevanceCache) -> str:
    try:
        heads = cache.heads().double().sum(1).mean(0).cpu()  # over positions, then over examples
    except (RelevanceError, RuntimeError):  # not kept, or layers with different numbers of heads
        return ""
    top = torch.topk(heads.abs().flatten(), min(_HEADS, heads.numel())).indices.tolist()
    width = heads.shape[1]
    return table_html([{"head": f"L{i // width}H{i % width}", "relevance": f"{heads.flatten()[i]:+.4g}"} for i in top])


def _visible(text: str) -> str:
    return "".join({"\n": "↵", "\t": "⇥"}.get(sign, sign if sign.isprintable() else "�") for sign in text)
