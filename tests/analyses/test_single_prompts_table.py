"""The table of single prompts: intervals, the default of each model, differences from it, and the prompts themselves."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analyses.benchmarks import single_prompts
from analyses.benchmarks.single_prompts import BASELINES, OCCLUSION, measured
from analyses.benchmarks.single_prompts_table import DEFAULT, PLAIN_QK, by_prompt, default_table, interval, over_models, page
from analyses.benchmarks.single_prompts_texts import WRITTEN, sampled, written

METHODS = ("random", "gradient", "occlusion", "attnlrp", "deeplift, mean embedding")


def rows(model: str, n: int, *, plain: bool, scale: float = 1.0) -> pd.DataFrame:
    """Areas in which a method's place in the list is its worth, with noise of each prompt's own."""
    noise = np.random.default_rng(0).normal(size=n)
    methods = (*METHODS, "attnlrp_plain_qk") if plain else METHODS
    return pd.DataFrame(
        [
            {"model": model, "source": "written", "prompt": i, "target": target, "method": name, "baseline": baseline, "area": area}
            for i in range(n)
            for target in ("logit", "difference")
            for worth, name in enumerate(methods)
            for baseline, area in [*((b, scale * (worth + noise[i])) for b in BASELINES), (OCCLUSION, 0.5)]
        ]
    )


def test_plain_norms_of_queries_and_keys_where_there_are_any() -> None:
    table = by_prompt(pd.concat([rows("with norms", 5, plain=True), rows("without", 5, plain=False)]))
    with_norms, without = table.loc[["with norms"]], table.loc[["without"]]
    assert (with_norms[PLAIN_QK] == with_norms["attnlrp_plain_qk"]).all() and (with_norms[PLAIN_QK] != with_norms["attnlrp"]).all()
    assert (without[PLAIN_QK] == without["attnlrp"]).all()


def test_intervals_are_of_95_percent_and_paired_differences_have_no_noise_of_prompts() -> None:
    values = np.random.default_rng(1).normal(3, 2, size=400)
    mean, low, high = interval(values)
    error = values.std(ddof=1) / 20
    assert mean == pytest.approx(values.mean()) and (mean - low) / error == pytest.approx(1.96, abs=0.15)
    assert (high - mean) / error == pytest.approx(1.96, abs=0.15)
    table = by_prompt(rows("without", 9, plain=False))
    assert interval(table["attnlrp"] - table[DEFAULT]) == pytest.approx((-1, -1, -1))


def test_models_count_alike_whatever_their_logits() -> None:
    small, large = rows("small", 6, plain=False), rows("large", 30, plain=False, scale=50.0)
    both, alone = by_prompt(pd.concat([small, large])), by_prompt(small)
    wanted = [over_models(by_prompt(one), "attnlrp", DEFAULT)[0] for one in (small, large)]
    assert over_models(both, "attnlrp", DEFAULT)[0] == pytest.approx(np.mean(wanted))
    assert over_models(alone, "gradient", DEFAULT)[0] < 0


def test_the_page_has_every_method_and_model() -> None:
    data = pd.concat([rows("with norms", 5, plain=True), rows("without", 5, plain=False)])
    text, differences = page(data), default_table(by_prompt(data))
    assert text.count("| deeplift, mean embedding |") == 2 and "## with norms\n\nPrompts: 5 written." in text
    assert "attnlrp_plain_qk" not in differences and differences.count("\n") == 3  # the head, and attnlrp in its two forms


def test_prompts_are_of_five_kinds_by_turns_and_texts_follow_the_seed(stories) -> None:
    prompts = written()
    assert len(prompts) == 60 == len({text for _, text in prompts}) and [kind for kind, _ in prompts[:5]] == list(WRITTEN)
    one, again, other = (sampled(stories, 2, 6, seed=seed) for seed in (0, 0, 1))
    assert one.shape == (2, 6) and bool((one == again).all()) and not bool((one == other).all())


def test_what_is_measured(stories, monkeypatch: pytest.MonkeyPatch) -> None:
    """Areas of a few methods on two prompts, both targets, four ways of removing, and the correlation with occlusion."""
    chosen = {name: single_prompts.METHODS[name] for name in ("random", "attnlrp", "attnlrp_plain_qk", "occlusion")}
    monkeypatch.setattr(single_prompts, "METHODS", chosen)
    found = measured(stories, ["Once upon a time there was a little", "Tom fell from the tree and"], seed=0, steps=3)
    assert set(found["method"]) == {"random", "attnlrp", "occlusion"} and len(found) == 3 * 2 * 2 * (len(BASELINES) + 1)
    own = found[(found["method"] == "occlusion") & (found["baseline"] == OCCLUSION)]["area"]
    assert own.tolist() == pytest.approx([1.0] * 4)
    means = found[found["baseline"] != OCCLUSION].groupby("method")["area"].mean()
    assert means["attnlrp"] > means["random"] and found["area"].notna().all()
