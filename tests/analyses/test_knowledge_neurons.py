"""The measurement of knowledge neurons: what is chosen, what is changed, and the page."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.benchmarks import knowledge_neurons
from analyses.tasks import ioi
from lens_relevance import logit, propagate


def test_facts_are_changed_by_their_own_neurons(embedded: TransformerBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = ioi(embedded, 2)
    known = [(f"fact {i}", pairs.clean[i : i + 1], int(pairs.target.answer[i]), int(pairs.target.wrong[i])) for i in range(2)]  # type: ignore[attr-defined]
    monkeypatch.setattr(knowledge_neurons, "known", lambda model: known)
    rows = pd.DataFrame(knowledge_neurons.measure(embedded, k=3, factor=2.0, rules="attnlrp", seed=0))
    assert len(rows) == 2 * (1 + 2 * len(knowledge_neurons.CHOICES))
    _, tokens, answer, wrong = known[1]
    points = [f"blocks.{layer}.mlp.hook_post" for layer in range(embedded.cfg.n_layers)]
    cache = propagate(embedded, tokens, logit(answer), rules="attnlrp", names_filter=points)
    relevance = torch.stack([cache[point][0].sum(0) for point in points])
    found = rows.query("fact == 'fact 1' and choice == 'relevance'").set_index("factor")
    chosen = [tuple(map(int, unit[1:].split("N"))) for unit in found["units"].iloc[0].split()]
    assert [float(relevance[place]) for place in chosen] == relevance.flatten().topk(3).values.tolist()
    for factor in (0.0, 2.0):

        def scaled(x: torch.Tensor, hook: object, factor: float = factor) -> torch.Tensor:
            layer = int(hook.name.split(".")[1])  # type: ignore[attr-defined]
            x = x.clone()
            for at, neuron in chosen:
                if at == layer:
                    x[:, :, neuron] *= factor
            return x

        with torch.no_grad():
            logits = embedded.run_with_hooks(tokens, fwd_hooks=[(point, scaled) for point in points])[0, -1].double()
        assert found.loc[factor, "difference"] == pytest.approx(float(logits[answer] - logits[wrong]), abs=1e-5)
        assert found.loc[factor, "probability"] == pytest.approx(float(logits.softmax(-1)[answer]), abs=1e-6)
    changes = knowledge_neurons.changes(rows, "difference")
    before = rows.query("fact == 'fact 1' and factor == 1")["difference"].item()
    assert changes.loc["fact 1", ("relevance", 0.0)] == pytest.approx(found.loc[0.0, "difference"] - before)
    assert abs(changes.loc["fact 1", ("relevance", 0.0)]) > 0.05
    page = knowledge_neurons.tables(rows, 2.0) + knowledge_neurons.per_fact(rows, 2.0) + knowledge_neurons.most_often(rows)
    assert "nan" not in page and "| fact 1 | " in page and "for 1 of 2 facts" in page


def test_every_fact_is_there_once() -> None:
    prompts = [prompt for prompt, _ in knowledge_neurons.facts()]
    assert len(prompts) == len(set(prompts)) > 30 and all(answer[0] == " " for _, answer in knowledge_neurons.facts())
