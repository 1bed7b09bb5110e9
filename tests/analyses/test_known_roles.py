"""Known roles: scores of heads against closed forms and single patches, and, where the weights are there, the trained models themselves."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from analyses.known_roles import reactions, speech
from analyses.known_roles.albert import hooked_albert
from analyses.known_roles.cases import Case, Written
from analyses.known_roles.head_scores import FROM_ATTENTION, PAIR, SINGLE, head_scores
from analyses.known_roles.page import page
from analyses.known_roles.ranking import ranking_table
from analyses.known_roles.whisper import hooked_decoder
from lens_relevance import RelevanceError, logit_diff, propagate
from lens_relevance.sites import HookedModule
from tests.engine.families import close, unexplained
from tests.hooked_models import build_albert, build_whisper, sounds
from tests.models import random_tokens

TOKENS = random_tokens(pos=7, vocab_size=30)
OTHER = TOKENS.clone()
OTHER[:, 2], OTHER[:, 5] = 4, 9
N_METHODS = len(SINGLE) + len(PAIR) + len(FROM_ATTENTION) + 3


def test_the_table_reads_scores_signed_and_by_magnitude() -> None:
    role = np.arange(6.0).reshape(2, 3)
    up, mixed = np.broadcast_to(role, (4, 2, 3)), np.stack([role, -role, role, -role]) + 0.01 * np.arange(4).reshape(4, 1, 1)
    scores = {"up": up, "down": -up, "mixed": mixed, "noising": up, "denoising": up}
    table = ranking_table(scores, [(1, 2), (1, 1)], role, resamples=50).set_index(["method", "reading"])
    assert table.loc[("up", "signed"), ["auroc", "low", "high", "rank", "role", "patching"]].tolist() == [1, 1, 1, 1.5, 1, 1]
    assert table.loc[("down", "signed"), ["auroc", "rank", "role"]].tolist() == [0, 5.5, -1]
    assert table.loc[("down", "absolute"), ["auroc", "rank", "role"]].tolist() == [1, 1.5, 1]
    assert ("up", "absolute") not in table.index, "the same as signed"
    assert table.loc[("mixed", "absolute"), "auroc"] == 1 and table.loc[("mixed", "signed"), "low"] < 0.5


def _albert_case() -> tuple[HookedModule, Case]:
    model = hooked_albert(build_albert(), TOKENS)
    return model, Case(TOKENS, OTHER, logit_diff(3, 4, position=4), torch.zeros(2, 4, 4))


def test_scores_of_every_method_have_a_place_for_every_head() -> None:
    model, case = _albert_case()
    scores = head_scores(model, case)
    assert len(scores) == N_METHODS
    for name, one in scores.items():
        assert one.shape == (2, 4, 4) and bool(one.isfinite().all()) and float(one.abs().max()) > 0, name
    close(scores["attnlrp"], propagate(model, TOKENS, case.target, rules="attnlrp").heads().sum(1).float(), 1e-6)


def test_patching_is_that_of_one_head_after_the_other() -> None:
    model, case = _albert_case()
    scores = head_scores(model, case)
    names = [f"albert.encoder.albert_layer_groups.{i}.albert_layers.0.attention.hook_z" for i in range(4)]

    def metric(logits: Tensor) -> Tensor:
        return logits[:, 4, 3] - logits[:, 4, 4]

    with torch.no_grad():
        logits, kept = model.run_with_cache(OTHER, names_filter=names)
        for layer, head in ((0, 1), (2, 3), (3, 0)):
            columns = slice(4 * head, 4 * head + 4)

            def exchange(z: Tensor, hook: object, layer: int = layer, columns: slice = columns) -> Tensor:
                z = z.clone()
                z[..., columns] = kept[names[layer]][..., columns]
                return z

            patched = model.run_with_hooks(TOKENS, fwd_hooks=[(names[layer], exchange)])
            close(scores["noising"][:, layer, head], (metric(model(TOKENS)) - metric(patched)).float(), 1e-6)
    assert scores["noising"].abs().min() > 0 and scores["denoising"].abs().min() > 0


def test_scores_of_the_heads_that_read_the_encoder() -> None:
    heard, model = sounds(), build_whisper()
    with torch.no_grad():
        states, other = (model.model.encoder(sounds(seed)["input_features"])[0] for seed in (0, 1))
    decoder, ids = hooked_decoder(model, states), heard["decoder_input_ids"]
    target = Written(torch.tensor([[1, 2, 3, 4]] * 2), torch.tensor([[5, 6, 7, 2]] * 2))
    inputs, against = ({"input_features": one, "decoder_input_ids": ids} for one in (states, other))
    scores = head_scores(decoder, Case(inputs, against, target, torch.zeros(2, 3, 4)), "cross")
    assert len(scores) == N_METHODS and all(one.shape == (2, 3, 4) for one in scores.values())
    exact = propagate(decoder, inputs, target, rules="deeplift", reference=against, audit=True)
    assert unexplained(exact) < 1e-11
    expected = decoder(**inputs)[:, 1:].log_softmax(-1).gather(2, target.tokens.unsqueeze(2)).sum((1, 2))
    close(exact.value, expected, 1e-11)


def _folder(path: Path) -> Path:
    """A tiny ALBERT in rxnmapper's format, with its vocabulary."""
    words = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    for reaction in reactions.REACTIONS:
        words += [token for token in reactions._TOKEN.findall(reaction) if token != "X"]
    words = list(dict.fromkeys([*words, *reactions.SUBSTITUENTS]))
    model = build_albert(torch.float32, n_layers=2)
    settings = model.config.to_dict() | {"vocab_size": len(words), "max_position_embeddings": 64}
    model = type(model)(type(model.config)(**settings)).eval()
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    (path / "config.json").write_text(json.dumps(settings | {"architectures": ["AlbertForMaskedLM"]}))
    (path / "vocab.txt").write_text("\n".join(words) + "\n")
    return path


def test_reactions_are_pairs_in_which_an_atom_is_to_be_copied(tmp_path: Path) -> None:
    model, vocabulary = reactions.load_rxnmapper(_folder(tmp_path))
    words = {i: word for word, i in vocabulary.items()}
    for reaction in reactions.REACTIONS:
        case = reactions.copying(model, vocabulary, reaction)
        for i, one in enumerate(reactions.SUBSTITUENTS):
            tokens = [words[int(token)] for token in case.inputs[i]]
            other = [words[int(token)] for token in case.reference[i]]
            (changed,) = [j for j in range(len(tokens)) if tokens[j] != other[j]]
            assert tokens[changed] == one and changed < tokens.index(">>") < tokens.index("[MASK]")
            assert "".join(tokens[1:-1]).replace("[MASK]", one) == reaction.replace("X", one)
        assert case.role.shape == (4, 2, 4) and float(case.role.min()) > 0
        cache = propagate(model, case.inputs, case.target, rules="deeplift", reference=case.reference, audit=True)
        assert unexplained(cache) < 1e-4


def test_folders_without_the_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RelevanceError, match=r"holds no config\.json"):
        reactions.load_rxnmapper(tmp_path)
    with pytest.raises(RelevanceError, match="Whisper tiny.en"):
        speech.load_whisper(tmp_path)


def test_the_page_says_what_was_measured() -> None:
    rng = np.random.default_rng(0)
    scores = {name: rng.normal(size=(5, 4, 6)) for name in ("relp", "noising", "denoising", "depth")}
    role = rng.uniform(size=(4, 6))
    table = ranking_table(scores, speech.KNOWN, role, resamples=20)
    looks = rng.uniform(size=(12, 8))
    mapped = ranking_table({name: rng.normal(size=(5, 12, 8)) for name in scores}, reactions.KNOWN, looks, resamples=20)
    text = page((table, role), (mapped, looks), n_words=7, when="today")
    reached = int((table["auroc"] >= 0.9).sum())
    assert f"An AUROC of 0.9 or more: {reached} of {len(table)} methods and readings" in text
    assert f"the order of the layers alone\n{table.loc[table['method'] == 'depth', 'auroc'].max():.2f}" in text
    assert "| `relp` | signed |" in text and f"**{role[1, 0]:.2f}**" in text and f"{looks.max():.2f}" in text


def _given(variable: str) -> Path:
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"needs a trained model: {variable} names no folder")
    return Path(folder)


@pytest.mark.slow
def test_whisper_writes_what_was_said() -> None:
    folder = _given("LENS_RELEVANCE_WHISPER")
    if shutil.which("espeak-ng") is None:
        pytest.skip("needs the synthesiser espeak-ng, which is not installed")
    decoder, (case, _), _ = speech.listening(speech.load_whisper(folder), speech.SENTENCES[1:3])
    cache = propagate(decoder, case.inputs, case.target, rules="deeplift", reference=case.reference, audit=True)
    assert cache.reference_value is not None
    assert float(cache.value) > -15 > float(cache.reference_value)
    assert unexplained(cache) < 1e-3


@pytest.mark.slow
def test_rxnmapper_copies_the_atom() -> None:
    model, vocabulary = reactions.load_rxnmapper(_given("LENS_RELEVANCE_RXNMAPPER"))
    case = reactions.copying(model, vocabulary, reactions.REACTIONS[0])
    cache = propagate(model, case.inputs, case.target, rules="deeplift", reference=case.reference, audit=True)
    assert cache.reference_value is not None
    assert float(cache.value.min()) > 1 and float(cache.reference_value.max()) < -1
    assert unexplained(cache) < 1e-3
    ((layer, head),) = reactions.KNOWN
    assert int(case.role.mean(0)[layer].argmax()) == head
