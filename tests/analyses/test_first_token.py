"""AttnLRP's skew to the first token of a model with q_norm and k_norm, why it comes about, and the switch that reduces it."""

from __future__ import annotations

import pytest
import torch

from analyses.benchmarks import first_token as module
from analyses.benchmarks.first_token import PLAIN_NORMS, attention_to_first, continued, first_token, sink_model, sink_tokens
from lens_relevance import RelevanceError, propagate, rulesets
from tests.models import build_llama, random_tokens
from tests.precision import no_upcasts


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_plain_norms_of_queries_and_keys_reduce_the_skew(seed: int) -> None:
    model, tokens = sink_model(seed), sink_tokens()
    assert min(attention_to_first(model, tokens)) > 0.3  # a sink in every layer
    shares = first_token(model, tokens).set_index("ruleset")
    for rules in ("attnlrp", "relp", "gim"):
        assert shares.loc[rules, "after"] < 0.6 * shares.loc[rules, "before"], rules
    assert shares.loc["attnlrp", "before"] > 2 / tokens.shape[1]  # twice what an even spread would give it
    for rules in ("cp_lrp", "gradient"):  # the one hands nothing to queries and keys, the other has no rule for norms
        assert shares.loc[rules, "after"] == pytest.approx(shares.loc[rules, "before"])


def test_what_the_switch_takes_away_is_what_hangs_on_the_length_of_a_key() -> None:
    """A norm's output does not change with the length of its input (eps aside), so its plain gradient leaves the sum over features at 0."""
    model, tokens = sink_model(), sink_tokens()
    names = [f"blocks.2.attn.k_norm.{point}" for point in ("hook_in", "hook_out")]
    with no_upcasts():
        kept = {
            which: propagate(model, tokens, None, rules={**rulesets()["attnlrp"], **extra}, names_filter=names)
            for which, extra in (("before", {}), ("after", PLAIN_NORMS))
        }
    at_in, at_out = (kept["before"][name].sum(-1) for name in names)  # [batch, head, pos]
    assert at_out.abs().max() > 0
    torch.testing.assert_close(at_in, at_out)
    assert kept["after"][names[0]].sum(-1).abs().max() < 1e-4 * kept["after"][names[1]].sum(-1).abs().max()


def test_without_such_norms_there_is_no_switch() -> None:
    with pytest.raises(RelevanceError, match="'norm@q_norm' is for no operation of this model"):
        first_token(build_llama(), random_tokens())


def test_the_command_prints_both_shares(capsys: pytest.CaptureFixture[str]) -> None:
    module.main(model=None, n=4, positions=12)
    printed = capsys.readouterr().out
    assert "attnlrp" in printed and "before" in printed and "attention to the first token by layer" in printed


def test_texts_continue_from_the_first_token(stories: object) -> None:
    texts = continued(stories, 3, 9)
    assert texts.shape == (3, 9) and texts[:, 0].tolist() == [1, 1, 1] and len(texts.unique(dim=0)) == 3
