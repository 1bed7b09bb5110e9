"""What tables say of heads and neurons: the tokens that they write, and their best context."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from typer.testing import CliRunner

from analyses.cli import app
from analyses.contexts import Atlas, build_atlas
from analyses.report import find, from_pairs, report_page
from analyses.report.unit_labels import unit_labels
from analyses.tasks import PromptPairs, ioi
from lens_relevance import RelevanceError, logit_diff, propagate
from tests.wider_models import build_wider

TEXTS = [f"When {a} and {b} went to the store, {b} gave a drink to" for a in ("Mary", "John", "Tom") for b in ("Anna", "James")]


@pytest.fixture(scope="module")
def atlas(_embedded: TransformerBridge) -> Atlas:
    return build_atlas(_embedded, TEXTS, ["heads"], layers=[1], k=2)


def test_what_a_unit_writes_is_its_output_through_the_final_norm(embedded: TransformerBridge, atlas: Atlas) -> None:
    pairs = ioi(embedded, n=3)
    table, note = unit_labels(embedded, pairs, ["L1H3", "L3N7"], atlas=atlas)
    row, target = pairs.clean[:1], pairs[slice(0, 1)].target
    _, run = embedded.run_with_cache(row)
    cache = propagate(embedded, row, target, rules="attnlrp")
    heads, neurons = cache.heads()[0, :, 1, 3], cache["blocks.3.mlp.hook_post"][0, :, 7]
    hf = embedded.original_model
    for unit, relevance, z, weight in (
        ("L1H3", heads, run["blocks.1.attn.hook_z"][0, :, 3], hf.transformer.h[1].attn.c_proj.weight.unflatten(0, (4, -1))[3]),
        ("L3N7", neurons, run["blocks.3.mlp.hook_post"][0, :, 7:8], hf.transformer.h[3].mlp.c_proj.weight[7:8]),
    ):
        at = int(relevance.abs().argmax())
        written = z[at] @ weight
        residual = run["blocks.3.hook_resid_post"][0, at]
        normed = (written - written.mean()) / residual.std(unbiased=False) * hf.transformer.ln_f.weight
        logits = hf.lm_head.weight @ normed
        shown = table.set_index("unit").loc[unit]
        assert shown["writes"] == " ".join(repr(embedded.tokenizer.decode([int(i)])) for i in logits.topk(3).indices)
        assert shown["at"] == f"{embedded.tokenizer.decode([int(row[0, at])])} ({at})"
    best = atlas.contexts("L1H3")["context"][0]
    assert table["context"][0].strip("<>") in best and table["context"][0].count("«") == 1 and len(table["context"][0]) < len(best)
    assert table["context"][1] == "–"  # the atlas has no neurons
    assert "straight way" in note and "atlas" in note


def test_an_atlas_of_another_model_is_refused(embedded: TransformerBridge, atlas: Atlas) -> None:
    other = Atlas(**{**vars(atlas), "info": {**atlas.info, "model": "another"}})
    with pytest.raises(RelevanceError, match="the atlas is of another, and this model is embedded"):
        unit_labels(embedded, ioi(embedded, n=1), ["L1H3"], atlas=other)


def test_where_the_unembedding_cannot_be_read_the_reason_is_told() -> None:
    bert = build_wider("bert", torch.float32)
    pairs = PromptPairs(torch.arange(1, 7)[None], torch.arange(2, 8)[None], logit_diff(3, 4))
    table, note = unit_labels(bert, pairs, ["L0H1"])
    assert list(table.columns) == ["unit"] and note.startswith("what they write is left out: ") and "not linear" in note


@pytest.mark.usefixtures("pictures_as_dots")
def test_rank_and_report_show_them_within_80_columns(
    embedded: TransformerBridge, atlas: Atlas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    atlas.save(tmp_path / "atlas.safetensors")
    shown = CliRunner().invoke(app, ["rank", "heads", "--n", "2", "--top", "3", "--atlas", str(tmp_path / "atlas.safetensors")])
    assert shown.exit_code == 0, shown.output
    assert "writes" in shown.output and "«" in shown.output and max(map(len, shown.output.splitlines())) <= 80
    refused = CliRunner().invoke(app, ["rank", "attention", "--n", "2", "--atlas", str(tmp_path / "atlas.safetensors")])
    assert refused.exit_code == 2 and "--atlas goes with heads and neurons" in refused.output
    findings = find(embedded, from_pairs(ioi(embedded, n=2), "pairs"), atlas=atlas)
    page = report_page(findings, "command").to_html()
    assert findings.labels["writes"][0].split()[0].strip("'") in page and "What they write" in page
