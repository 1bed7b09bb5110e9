"""Which rulesets work on which family of models, with the conservation error of each: the table of the README.

    python -m analyses.benchmarks.families [--family GPT-2 --family T5] [--dtype float64] [--seed 0]

Every family is a tiny model with random weights, made from its config class: nothing is downloaded. A cell is what `coverage` finds: the
largest share of the target, at any layer, that the conservation account leaves open, rounded up to a power of ten. A family of which a part
has no rule is refused as a whole by `propagate`, with the reason that the table gives.

Errors of 1e-13 and less are rounding in float64. Those of 1e-8 to 1e-5 are rounding in float32: Hugging Face computes
RMSNorm and some softmaxes in it whatever the dtype of the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import pandas as pd
import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track
from torch import nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers.utils import logging

from analyses.progress import watched
from lens_relevance import RelevanceError, coverage, rulesets
from lens_relevance.sites import anatomy

_SIZES: dict[str, Any] = dict(
    vocab_size=50, max_position_embeddings=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
)
_GROUPED = _SIZES | dict(num_key_value_heads=2, pad_token_id=0)
_WITH_HEAD_SIZE = _GROUPED | dict(head_dim=4)
_GPT2: dict[str, Any] = dict(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=4)
_T5: dict[str, Any] = dict(vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0)
_BART: dict[str, Any] = {
    f"{stack}_{what}": n for stack in ("encoder", "decoder") for what, n in dict(layers=2, attention_heads=4, ffn_dim=24).items()
}
_CAPS = dict(attn_logit_softcapping=2.0, final_logit_softcapping=4.0, query_pre_attn_scalar=8, sliding_window=4)
_MOE = dict(moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2)
_MLA = dict(
    q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4, n_routed_experts=4, n_group=1, topk_group=1
)
_NATIVE: dict[str, Any] = dict(
    d_model=16, d_head=4, n_heads=4, n_layers=2, n_ctx=32, d_vocab=50, d_mlp=32, act_fn="gelu", normalization_type="LN"
)


@dataclass(frozen=True)
class Family:
    """A family: Hugging Face's class of model and of config, with the settings of a tiny one; no class: TransformerLens's own model."""

    model: str | None
    config: str
    settings: dict[str, Any]

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> TransformerBridge:
        """A tiny model with random weights, in eval mode."""
        if self.model is None:
            native = TransformerBridge.boot_native(TransformerBridgeConfig(**self.settings), dtype=dtype)  # type: ignore[attr-defined]
            randomize(native.original_model, seed)
            return native.eval()
        config = getattr(transformers, self.config)(**self.settings)
        config._attn_implementation = "eager"
        config._experts_implementation = "eager"  # the default for mixtures of experts knows no float64
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = getattr(transformers, self.model)(config)
        randomize(model, seed)
        return build_bridge_from_module(model.to(dtype).eval(), self.model, hf_config=config).eval()


FAMILIES: dict[str, Family] = {
    "GPT-2": Family("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "GPT-NeoX, Pythia (parallel)": Family("GPTNeoXForCausalLM", "GPTNeoXConfig", _SIZES | dict(use_parallel_residual=True, rotary_pct=0.5)),
    "GPT-NeoX (sequential)": Family("GPTNeoXForCausalLM", "GPTNeoXConfig", _SIZES | dict(use_parallel_residual=False, rotary_pct=0.5)),
    "GPT-J": Family("GPTJForCausalLM", "GPTJConfig", _GPT2 | dict(rotary_dim=2)),
    "OPT": Family("OPTForCausalLM", "OPTConfig", _SIZES | dict(ffn_dim=24, word_embed_proj_dim=16)),
    "Bloom": Family("BloomForCausalLM", "BloomConfig", dict(vocab_size=50, hidden_size=16, n_layer=2, n_head=4)),
    "Llama": Family("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "Mistral": Family("MistralForCausalLM", "MistralConfig", _GROUPED | dict(sliding_window=4)),
    "Qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "Qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", _WITH_HEAD_SIZE),
    "Gemma 1": Family("GemmaForCausalLM", "GemmaConfig", _WITH_HEAD_SIZE),
    "Gemma 2": Family("Gemma2ForCausalLM", "Gemma2Config", _WITH_HEAD_SIZE | _CAPS),
    "Gemma 3": Family("Gemma3ForCausalLM", "Gemma3TextConfig", _WITH_HEAD_SIZE | dict(sliding_window=4)),
    "Phi-3": Family("Phi3ForCausalLM", "Phi3Config", _GROUPED),
    "OLMo 2": Family("Olmo2ForCausalLM", "Olmo2Config", _GROUPED),
    "Mixtral": Family("MixtralForCausalLM", "MixtralConfig", _GROUPED | dict(num_local_experts=4)),
    "Qwen3-MoE": Family("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _WITH_HEAD_SIZE | _MOE),
    "BERT (masked language model)": Family("BertForMaskedLM", "BertConfig", _SIZES),
    "native (LayerNorm)": Family(None, "", _NATIVE),
    "native (RMSNorm, gated, rotary)": Family(
        None, "", _NATIVE | dict(normalization_type="RMS", gated_mlp=True, act_fn="silu", positional_embedding_type="rotary", rotary_dim=4)
    ),
    "T5": Family("T5ForConditionalGeneration", "T5Config", _T5),
    "BART": Family("BartForConditionalGeneration", "BartConfig", _BART | dict(vocab_size=50, d_model=16, max_position_embeddings=32)),
    "ViT": Family(
        "ViTForImageClassification",
        "ViTConfig",
        dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, image_size=8, patch_size=4),
    ),
    "DeepSeek-V3": Family(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        _SIZES | _MLA | dict(moe_intermediate_size=12, num_experts_per_tok=2, first_k_dense_replace=0),
    ),
    "GPT-OSS": Family("GptOssForCausalLM", "GptOssConfig", _WITH_HEAD_SIZE | dict(num_local_experts=4, num_experts_per_tok=2)),
    "Mamba": Family("MambaForCausalLM", "MambaConfig", dict(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2)),
}


@torch.no_grad()
def randomize(module: nn.Module, seed: int) -> None:
    """Every parameter from a seeded normal, biases and norm weights too: these start at 0 or 1, where an error in them would not show."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
        if parameter.ndim >= 2:
            parameter.copy_(noise * 0.3)
        else:
            parameter.copy_(0.2 * noise + (1 if name.endswith(("weight", ".w")) else 0))


def families(names: Sequence[str] = tuple(FAMILIES), dtype: torch.dtype = torch.float64, seed: int = 0) -> pd.DataFrame:
    """One row per family: family, a column per ruleset with its conservation error (NaN where it does not work), and reason.

    Raises RelevanceError for an unknown family.
    """
    rows = []
    for name in track(list(names), "families", disable=not watched(), transient=True, console=Console(stderr=True)):
        if name not in FAMILIES:
            raise RelevanceError(f"unknown family {name!r}; there are {', '.join(FAMILIES)}")
        rows.append({"family": name, **_cells(FAMILIES[name].build(dtype, seed))})
    return pd.DataFrame(rows, columns=["family", *rulesets(), "reason"])


def _cells(model: Any) -> dict[str, Any]:
    """What `coverage` finds on a model, or why it is refused."""
    if uncovered := anatomy(model).uncovered:  # refused by `propagate`, whatever the ruleset
        return {"reason": _reasons(uncovered)}
    table = coverage(model).rulesets
    errors = {str(row.ruleset): float(row.unexplained) if row.works else float("nan") for row in table.itertuples()}  # type: ignore[arg-type]
    return errors | {"reason": _reasons({str(row.ruleset): str(row.reason) for row in table.itertuples() if not row.works})}


def _reasons(by_part: dict[str, str]) -> str:
    """Why parts have no rule, each reason once, without the number of the layer."""
    return "; ".join(dict.fromkeys(reason.removeprefix(f"{part}: ") for part, reason in by_part.items()))


def markdown(table: pd.DataFrame) -> str:
    """The table as Markdown: families that work first, then those that are refused, by name and with the reason."""
    names = [column for column in table.columns if column not in ("family", "reason")]
    lines = ["| family | " + " | ".join(f"`{name}`" for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    refused = table[names].isna().all(axis=1)
    for row in table[~refused].to_dict("records"):
        lines.append(f"| {row['family']} | " + " | ".join(power_of_ten(row[name]) for name in names) + " |")
    lines += [f"\n{row['family']}: {_in_a_cell(row['reason'])}" for row in table[~refused].to_dict("records") if row["reason"]]
    if refused.any():
        lines += ["", "| refused | reason |", "|---|---|"]
        lines += [f"| {row['family']} | {_in_a_cell(row['reason'])} |" for row in table[refused].to_dict("records")]
    return "\n".join(lines)


def power_of_ten(error: float) -> str:
    """An error rounded up to a power of ten; a dash where there is none."""
    if math.isnan(error):
        return "–"
    return f"1e{max(-16, math.ceil(math.log10(error)))}" if error > 0 else "1e-16"


def _in_a_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main(
    family: Annotated[list[str] | None, typer.Option(help="A family by name, several times if wanted; all if left out.")] = None,
    dtype: Annotated[str, typer.Option(help="float64 or float32")] = "float64",
    seed: int = 0,
) -> None:
    """Print the table as Markdown."""
    logging.set_verbosity_error()
    typer.echo(markdown(families(family or list(FAMILIES), getattr(torch, dtype), seed)))


if __name__ == "__main__":
    typer.run(main)
