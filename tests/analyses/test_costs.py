"""The table of what relevance costs on each family."""

from __future__ import annotations

import pytest
import torch

from analyses.benchmarks import costs as module
from analyses.benchmarks.costs import cost, larger, plain_gradient
from analyses.benchmarks.tiny_models import FAMILIES
from lens_relevance import RelevanceError, logit_diff, propagate
from lens_relevance.coverage_table import random_inputs


@pytest.mark.parametrize("family", ["llama", "mixtral", "t5", "llava"])
def test_the_plain_gradient_is_that_of_the_ruleset_without_rules(family: str) -> None:
    """So that both sides of a ratio do the same work."""
    model = FAMILIES[family].build(torch.float64)
    inputs = random_inputs(model, 2, 5, generator=torch.Generator().manual_seed(0))
    cache = propagate(model, inputs, logit_diff(0, 1), rules="gradient")
    expected = [cache.coefficients[roles["embeddings"][0]] for roles in cache.stacks.values() if roles["embeddings"]]
    plain = [gradient for gradient in plain_gradient(model, inputs) if gradient is not None]
    assert len(plain) >= len(expected)
    for gradient, coefficient in zip(plain, expected, strict=False):
        assert coefficient.abs().max() > 0
        torch.testing.assert_close(gradient, coefficient, rtol=1e-6, atol=1e-9)


def test_larger_families_are_of_the_size_that_the_table_says() -> None:
    settings = larger(FAMILIES["mixtral"]).settings
    assert settings["hidden_size"] == 256 and settings["num_hidden_layers"] == 4 and settings["num_local_experts"] == 8
    nested = larger(FAMILIES["llava"]).settings
    assert nested["text_config"]["hidden_size"] == nested["vision_config"]["hidden_size"] == 256


def test_a_row_has_every_ruleset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LARGER", {})
    measured = cost(FAMILIES["gpt2"], repeats=1, batch=1, positions=4)
    assert list(measured) == ["attnlrp", "cp_lrp", "relp", "gim", "deeplift", "plain, s"] and min(measured.values()) > 0


def test_refused_families_are_left_out_and_unknown_ones_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_LARGER", {})
    module.main(family=["mamba", "gpt2"], repeats=1, batch=1, positions=4)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| family | `attnlrp`") and [line.split("|")[1].strip() for line in lines[2:]] == ["GPT-2"]
    with pytest.raises(RelevanceError, match="unknown family 'gpt9'"):
        module.costs(["gpt9"])
    module.main(family=["mamba"])
    assert len(capsys.readouterr().out.splitlines()) == 2  # a head and nothing under it
    assert "python -m analyses.benchmarks.costs" in str(module.__doc__)
