"""build_atlas: one way through a corpus, with relevance and activation of every unit in every window.

What is most relevant names a unit better than what is most active, say Achtibat et al. 2023 (relevance maximization) and, for language
models, Achtibat et al. 2024 (AttnLRP, section 4). Whether that holds for a unit can be measured with `analyses.interventions`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import resolve_component
from analyses.contexts.atlas import RANKINGS, Atlas
from analyses.contexts.corpus import Window, digest_of, in_batches, texts_of, windows
from analyses.contexts.extremes import Extreme
from analyses.datasets.batches import text_of
from analyses.datasets.checkpoint import Checkpoint
from analyses.datasets.fingerprint import fingerprint
from analyses.datasets.processes import processes
from analyses.datasets.progress import progress_bar
from analyses.tasks import PromptPairs
from lens_relevance import RelevanceError, logit, propagate
from lens_relevance.cache import RelevanceCache
from lens_relevance.hooks.model_state import left_as_found
from lens_relevance.provenance import provenance
from lens_relevance.ruleset_tables import needs_reference, ruleset
from lens_relevance.sites import anatomy

COMPONENTS = ("neurons", "heads")
_TOKENS_PER_PASS = 2048
_SAVED_EVERY = 20.0  # seconds
_RANKED = {  # what each ranking goes by, the other measure, and the position that it names
    "relevance_highest": ("relevance", "highest", "most at"),
    "relevance_lowest": ("relevance", "highest", "most at"),
    "activation_highest": ("highest", "relevance", "highest at"),
    "activation_lowest": ("lowest", "relevance", "lowest at"),
}


@left_as_found
def build_atlas(
    model: TransformerBridge,
    corpus: str | Path | Sequence[str],
    components: Sequence[str] = ("neurons",),
    *,
    layers: Sequence[int] | None = None,
    k: int = 10,
    window: int | None = None,
    rules: str = "attnlrp",
    column: str = "text",
    limit: int | None = None,
    checkpoint: str | Path | None = None,
) -> Atlas:
    """The k windows of a corpus in which each unit is most relevant, least relevant (most against), most active and least active.

    Relevance is that of the unit for the model's own prediction behind the window, its logit less that of the runner-up, summed over the
    window's positions; activation is the largest (or lowest) one of the window, of a head the norm of its output z. Memory does not grow
    with the corpus: what is kept is at most 4 k windows per unit.

    Args:
        corpus: texts, or a file: a line per text (`.txt`), or a row (`.jsonl`, `.csv`, `.parquet`) with the text in `column`.
        components: of `neurons` and `heads`.
        layers: which; None for all.
        window: tokens that the model reads at once; longer texts are cut. By default 64, or as many as the model takes.
        rules: a ruleset for single runs.
        limit: stop after so many windows.
        checkpoint: a folder; an interrupted run that is started again with the same arguments goes on from there, and gives the same atlas
            bit by bit.

    Under `accelerate launch` each process takes its share of the batches, and all return the whole atlas.

    Raises:
        RelevanceError: an unknown component or layer, a ruleset that compares two runs, a corpus without texts, or a checkpoint of another
            run.
    """
    kinds = [resolve_component(name).name for name in components]
    if not kinds or any(name not in COMPONENTS for name in kinds) or len(set(kinds)) < len(kinds):
        raise RelevanceError(f"an atlas is of {' and '.join(COMPONENTS)}, each once, not {', '.join(components) or 'nothing'}")
    if k < 1 or (limit is not None and limit < 1):
        raise RelevanceError(f"k and limit are at least 1, not {k} and {limit}")
    if needs_reference(ruleset(rules)):
        raise RelevanceError(f"ruleset {rules!r} compares two runs, and an atlas explains single ones: attnlrp, cp_lrp, ...")
    body = anatomy(model)
    chosen = list(range(body.n_layers)) if layers is None else sorted(set(layers))
    if wrong := [layer for layer in chosen if not 0 <= layer < body.n_layers]:
        raise RelevanceError(f"layer {wrong[0]} is out of range: the model has {body.n_layers} layers")
    names = {(kind, layer): body.layout["z" if kind == "heads" else "neurons"][layer] for kind in kinds for layer in chosen}
    window = min(64, model.cfg.n_ctx) if window is None else window
    size, here = windows_per_pass(window), processes()
    stream = islice(windows(model, texts_of(corpus, column), window), limit)
    seen, saved, part = _Seen(k), None, f"atlas-{here.index}"
    if checkpoint is not None:
        settings = {"corpus": digest_of(corpus), "components": kinds, "layers": chosen, "k": k, "window": window, "column": column}
        first = _first_pairs(model, corpus, column, window)
        run = fingerprint(model, {"corpus": first}, 1, analysis="atlas", **settings, limit=limit, rules=rules, processes=here.count)
        saved = Checkpoint(checkpoint, run)
        if (state := saved.load(part)) is not None:
            seen.restore(state)
    noted = time.monotonic()
    with progress_bar() as bar:
        for number, batch in enumerate(bar.track(in_batches(stream, size), description="contexts", total=None)):
            if number % here.count != here.index or number < seen.batches:
                continue
            tokens, mask = batch_of(batch)
            cache = propagate(model, tokens, rules=rules, names_filter=list(names.values()), attention_mask=mask, device="cpu")
            seen.add(cache, batch, names)
            seen.batches = number + 1
            if saved is not None and time.monotonic() - noted > _SAVED_EVERY:
                saved.save(part, seen.state())
                noted = time.monotonic()
    if saved is not None:
        saved.save(part, seen.state())
    parts = here.gather(seen.state())
    whole = _Seen(k)
    for state in parts:
        whole.merge(state)
    if not whole.windows:
        raise RelevanceError("the corpus holds no text of two tokens or more")
    return _atlas(model, whole, names, corpus=corpus, rules=rules)


@dataclass
class _Seen:
    """What is known so far.

    windows: by number: the tokens, and the token predicted behind them. batches: how many batches were looked at.
    """

    k: int
    rankings: dict[str, Extreme] = field(default_factory=dict)
    windows: dict[int, tuple[Int[Tensor, " pos"], int]] = field(default_factory=dict)
    widths: list[int] = field(default_factory=list)
    batches: int = 0
    n_windows: int = 0
    n_tokens: int = 0

    def add(self, cache: RelevanceCache, batch: list[Window], names: dict[tuple[str, int], str]) -> None:
        """Take in the windows of a batch."""
        measured = [_measures(cache, kind, name) for (kind, _), name in names.items()]
        self.widths = [len(one["relevance"]) for one in measured]
        numbers = torch.tensor([w.number for w in batch])
        predicted = cache.logits[:, 0].argmax(-1).tolist()
        self._fill(sum(self.widths))
        joined = {name: torch.cat([one[name] for one in measured]) for name in measured[0]}
        for ranking, (score, other, position) in _RANKED.items():
            self.rankings[ranking].add(joined[score], joined[other], joined[position], numbers.expand(len(joined[score]), -1))
        for one, token in zip(batch, predicted, strict=True):
            self.windows[one.number] = (one.tokens, token)
        self.n_windows += len(batch)
        self.n_tokens += sum(len(one.tokens) for one in batch)
        self._forget()

    def _fill(self, n_units: int) -> None:
        for ranking in RANKINGS if not self.rankings else ():
            self.rankings[ranking] = Extreme.empty(n_units, self.k, 1 if ranking.endswith("highest") else -1)

    def _forget(self) -> None:
        """Leave out windows that no unit names any more."""
        named = set(torch.cat([one.window.flatten() for one in self.rankings.values()]).unique().tolist())
        self.windows = {number: held for number, held in self.windows.items() if number in named}

    def state(self) -> dict[str, Tensor]:
        """As tensors; empty before the first batch."""
        if not self.rankings:
            return {}
        numbers = sorted(self.windows)
        lengths = torch.tensor([len(self.windows[number][0]) for number in numbers], dtype=torch.int32)
        tokens = torch.zeros(len(numbers), int(lengths.max()), dtype=torch.int32)
        for i, number in enumerate(numbers):
            tokens[i, : lengths[i]] = self.windows[number][0]
        tensors = {f"{name}/{key}": values for name, one in self.rankings.items() for key, values in one.state().items()}
        return tensors | {
            "numbers": torch.tensor(numbers),
            "tokens": tokens,
            "lengths": lengths,
            "predicted": torch.tensor([self.windows[number][1] for number in numbers]),
            "counts": torch.tensor([self.batches, self.n_windows, self.n_tokens]),
            "widths": torch.tensor(self.widths),
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a state, exactly."""
        self.merge(state)
        self.batches = int(state["counts"][0])

    def merge(self, state: dict[str, Tensor]) -> None:
        """Take in what another process has seen."""
        if not state:  # it had no batch
            return
        self.widths = state["widths"].tolist()
        self._fill(sum(self.widths))
        for name, one in self.rankings.items():
            one.merge({key: state[f"{name}/{key}"] for key in ("score", "other", "position", "window")})
        for i, number in enumerate(state["numbers"].tolist()):
            self.windows[number] = (state["tokens"][i, : int(state["lengths"][i])].long(), int(state["predicted"][i]))
        self.n_windows += int(state["counts"][1])
        self.n_tokens += int(state["counts"][2])
        self._forget()


def windows_per_pass(window: int) -> int:
    """How many windows of so many tokens the model reads at once."""
    return max(1, _TOKENS_PER_PASS // max(1, window))


def batch_of(batch: list[Window]) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Windows as ids and mask, padded on the right."""
    length = max(len(one.tokens) for one in batch)
    tokens, mask = torch.zeros(len(batch), length, dtype=torch.long), torch.zeros(len(batch), length, dtype=torch.long)
    for i, one in enumerate(batch):
        tokens[i, : len(one.tokens)], mask[i, : len(one.tokens)] = one.tokens, 1
    return tokens, mask


def _measures(cache: RelevanceCache, kind: str, name: str) -> dict[str, Tensor]:
    """Relevance, highest and lowest activation of each unit in each window, and the position of each: all [unit, window]."""
    per_position, activations = cache[name].float(), cache.activations[name].float()  # [window, pos, unit], of heads [..., d_head]
    if kind == "heads":
        per_position, activations = per_position.sum(-1), activations.norm(dim=-1)
    real = cache.mask.bool()[..., None]
    high, at_high = activations.masked_fill(~real, -torch.inf).max(1)
    low, at_low = activations.masked_fill(~real, torch.inf).min(1)
    found = {"relevance": per_position.sum(1), "most at": per_position.abs().max(1).indices}
    found |= {"highest": high, "highest at": at_high, "lowest": low, "lowest at": at_low}
    return {measure: values.T for measure, values in found.items()}


def _first_pairs(model: TransformerBridge, corpus: str | Path | Sequence[str], column: str, window: int) -> PromptPairs:
    """The first window, by which a checkpoint knows the model."""
    first: Iterator[Window] = windows(model, texts_of(corpus, column), window)
    one = next(first, None)
    if one is None:
        raise RelevanceError("the corpus holds no text of two tokens or more")
    return PromptPairs(one.tokens[None], one.tokens[None], logit(0))


def _atlas(
    model: TransformerBridge, seen: _Seen, names: dict[tuple[str, int], str], *, corpus: str | Path | Sequence[str], rules: str
) -> Atlas:
    state = seen.state()
    used = torch.cat([state["tokens"].flatten().long(), state["predicted"]]).unique().tolist()
    info = provenance(model, rules, logit(0), reference=None, logits=torch.zeros(1, dtype=next(model.parameters()).dtype))
    info |= {"target": "the model's prediction less its runner-up"}
    info |= {"corpus": Path(corpus).name if isinstance(corpus, str | Path) else f"{len(corpus)} texts"}
    return Atlas(
        units=dict(zip(names, seen.widths, strict=True)),
        rankings={name: one.state() for name, one in seen.rankings.items()},
        numbers=state["numbers"],
        tokens=state["tokens"],
        lengths=state["lengths"],
        predicted=state["predicted"],
        strings=_strings(model, used),
        info={**info, "windows": seen.n_windows, "tokens": seen.n_tokens},
    )


def _strings(model: TransformerBridge, tokens: list[int]) -> dict[int, str]:
    """Each token as text as it stands behind another one, so that those of a window joined are its text: some tokenizers leave out the
    space before a token that stands alone."""
    another = next((token for token in tokens if token not in model.tokenizer.all_special_ids), tokens[0])
    before = text_of(model, [another])
    pairs = {token: text_of(model, [another, token]) for token in tokens}
    return {token: text.removeprefix(before) if text.startswith(before) else text_of(model, [token]) for token, text in pairs.items()}
