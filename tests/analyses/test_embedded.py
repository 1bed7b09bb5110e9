"""The embedded model: loads from the package alone, knows its two tasks on names it never saw together, and does not hang on one head."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.embedded import EMBEDDED_FOLDER, load_embedded
from analyses.embedded.corpus import held_out_pairs, ioi_sequences, repeated_sequences, training_pairs
from analyses.embedded.figures import accuracies, head_effects
from analyses.tasks import PromptPairs, induction, ioi
from analyses.tasks.ioi_task import NAMES

PROMPT = "When Mary and John went to the store, John gave a drink to"


@pytest.fixture
def held_out(embedded: TransformerBridge) -> PromptPairs:
    return ioi(embedded, 120, seed=7, name_pairs=held_out_pairs())


def test_it_is_small_and_loads_from_its_folder(record_property: Callable[[str, object], None]) -> None:
    assert sum(path.stat().st_size for path in EMBEDDED_FOLDER.glob("*.safetensors")) < 3e6
    started = time.perf_counter()
    model = load_embedded(dtype=torch.float64)
    record_property("seconds_to_load", time.perf_counter() - started)  # a figure, not a bound: machines differ
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert not model.training
    assert (model.cfg.n_layers, model.cfg.n_heads) == (4, 4)


def test_every_load_is_a_model_of_its_own(embedded: TransformerBridge) -> None:
    other = load_embedded()
    with torch.no_grad():
        before = embedded(PROMPT)
        for parameter in other.parameters():
            parameter.zero_()
        assert torch.equal(embedded(PROMPT), before)


def test_a_typed_prompt_and_both_spellings_of_an_answer(embedded: TransformerBridge) -> None:
    assert embedded.to_single_token("Mary") == embedded.to_single_token(" Mary")
    assert embedded.to_str_tokens(PROMPT) == ["<bos>", *"When Mary and John went to the store , John gave a drink to".split()]
    assert embedded.to_string(embedded.to_tokens(PROMPT, prepend_bos=False)[0]) == PROMPT
    for odd in (f" {PROMPT} ", PROMPT.replace(",", " ,"), PROMPT.replace(" ", "\n")):
        assert torch.equal(embedded.to_tokens(odd), embedded.to_tokens(PROMPT))
    assert embedded.to_tokens("Zaphod", prepend_bos=False).tolist() == [[embedded.tokenizer.unk_token_id]]


def test_it_writes_the_name_and_ends_the_sentence(embedded: TransformerBridge) -> None:
    for prompt, answer in ((PROMPT, "Mary"), (PROMPT.replace("John gave", "Mary gave"), "John")):
        assert embedded.generate(prompt, max_new_tokens=5, do_sample=False, verbose=False) == f"{prompt} {answer}."


def test_held_out_names_never_meet_in_training(embedded: TransformerBridge) -> None:
    held_out, trained = set(held_out_pairs()), set(training_pairs())
    assert len(held_out) == 156 and not held_out & trained and held_out | trained == set(combinations(NAMES, 2))
    assert {name for pair in held_out for name in pair} == set(NAMES) == {name for pair in trained for name in pair}
    ids = {embedded.to_single_token(name): name for name in NAMES}
    sequences = [*ioi_sequences(embedded, per_template=3, seed=0), repeated_sequences(embedded, 100, 15, seed=0)]
    met = set()
    for row in (row for group in sequences for row in group.tolist()):
        present = sorted((ids[token] for token in set(row) if token in ids), key=NAMES.index)
        met |= set(combinations(present, 2))
    assert len(met) > 200 and not met & held_out


def test_repeated_sequences_ask_for_induction(embedded: TransformerBridge) -> None:
    for row in repeated_sequences(embedded, 20, 9, seed=1).tolist():
        first, pairs = row[1:10], row[10:]
        assert len(set(first)) == 9 and len(pairs) == 8
        assert all(first.index(b) == first.index(a) + 1 for a, b in zip(pairs[::2], pairs[1::2], strict=True))


def test_it_knows_ioi_on_pairs_of_names_it_never_saw(embedded: TransformerBridge, held_out: PromptPairs) -> None:
    found = accuracies(embedded, held_out)
    assert found["argmax"] >= 0.99 and found["answer_over_wrong"] >= 0.99
    swapped = PromptPairs(held_out.corrupt, held_out.clean, held_out.target)  # the same answers are wrong there
    assert accuracies(embedded, swapped) == {"argmax": 0.0, "answer_over_wrong": 0.0}


def test_it_knows_induction(embedded: TransformerBridge) -> None:
    pairs = induction(embedded, 200, seed=7)
    assert accuracies(embedded, pairs)["argmax"] >= 0.98
    with torch.no_grad():
        assert (pairs.metric(embedded, "corrupt")(embedded(pairs.corrupt)) < 0).float().mean() >= 0.98


def test_several_heads_in_several_layers_carry_ioi(embedded: TransformerBridge, held_out: PromptPairs) -> None:
    effects = head_effects(embedded, held_out)
    carrying = (effects >= 0.1).nonzero().tolist()
    assert len(carrying) >= 3 and len({layer for layer, _ in carrying}) >= 2
    assert (effects.abs() < 0.02).sum() >= 3  # and some heads do nothing for it, for a ranking to find
    best = divmod(int(effects.argmax()), effects.shape[1])
    whole = accuracies(embedded, held_out)["answer_over_wrong"]
    for kind in ("corrupt", "mean"):
        without = accuracies(embedded, held_out, without=best, kind=kind)["answer_over_wrong"]
        assert 0.75 < without <= whole
    assert accuracies(embedded, held_out, without=best, kind="corrupt")["answer_over_wrong"] < whole


def test_the_recorded_figures_are_those_of_the_weights_that_ship(embedded: TransformerBridge) -> None:
    recorded = json.loads((EMBEDDED_FOLDER / "training.json").read_text())
    assert recorded["parameters"] == sum(parameter.numel() for parameter in embedded.original_model.parameters())
    pairs = ioi(embedded, 400, 1, name_pairs=held_out_pairs())
    assert accuracies(embedded, pairs) == pytest.approx(recorded["ioi_held_out_pairs"], abs=0.005)
    torch.testing.assert_close(head_effects(embedded, pairs), torch.tensor(recorded["head_noising_effects"]), atol=2e-3, rtol=0)


def test_the_best_head_stands_out_from_an_independent_measurement(embedded: TransformerBridge) -> None:
    """Noising one head by hand on one prompt, without the helpers above."""
    clean, corrupt = embedded.to_tokens(PROMPT), embedded.to_tokens(PROMPT.replace("John gave", "Mary gave"))
    mary, john = embedded.to_single_token("Mary"), embedded.to_single_token("John")
    recorded = json.loads((EMBEDDED_FOLDER / "training.json").read_text())
    layer, head = (int(number) for number in recorded["best_head"].split("."))
    name = f"blocks.{layer}.attn.hook_z"
    with torch.no_grad():
        _, cache = embedded.run_with_cache(corrupt)

        def noise(z: torch.Tensor, hook: object) -> torch.Tensor:
            z = z.clone()
            z[0, :, head] = cache[name][0, :, head]
            return z

        logits = [embedded(clean), embedded(corrupt), embedded.run_with_hooks(clean, fwd_hooks=[(name, noise)])]
    whole, changed, noised = ((row[0, -1, mary] - row[0, -1, john]).item() for row in logits)
    assert (whole - noised) / (whole - changed) > 0.1
