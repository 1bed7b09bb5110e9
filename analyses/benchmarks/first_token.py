"""How much relevance lands on the first token of a model with norms on queries and keys (Qwen3), and the switch that reduces it.

    python -m analyses.benchmarks.first_token [--model FOLDER-OR-HUB-NAME --n 48 --positions 40]

Attention rests on the first token where it has nothing to do (a sink). Its scores there are high, and rules that hand them on to queries
and keys give the first token much relevance, although its key could be twice as long without any difference: k_norm divides its length
out. The LN-rule lets all of a norm's relevance through; the plain gradient of a norm lets through none of what hangs on the length, so

    {**rulesets()["attnlrp"], "norm@q_norm": Rule(), "norm@k_norm": Rule()}

(the ruleset `attnlrp_plain_qk`) keeps the relevance of a sink's scores off the first token. It is a choice, not
a repair: it moves relevance off the sink, and whether what is left agrees better with what tokens do (see single_prompts.py) differs from
model to model.

Without --model, on a random Qwen3 with a sink built in: its first token has one large feature (as trained models have), to which all keys
and queries are tuned, and values that are small beside it. With it, on texts that the model itself continues from its first token.
"""

from __future__ import annotations

from typing import Annotated, Any

import pandas as pd
import torch
import typer
from jaxtyping import Int
from rich.console import Console
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import AutoConfig, AutoModelForCausalLM

from analyses.benchmarks.tiny_models import randomize
from lens_relevance import propagate, rulesets
from lens_relevance.rules import Rule

PLAIN_NORMS = {"norm@q_norm": Rule(), "norm@k_norm": Rule()}
RULESETS = ("attnlrp", "relp", "gim", "cp_lrp", "gradient")
_D_HEAD, _LARGE, _SCALE, _GAIN = 8, 30.0, 4.0, 1.5  # the large feature's size, its weight in keys, the norms' gain


@torch.no_grad()
def sink_model(seed: int = 0, dtype: torch.dtype = torch.float64) -> TransformerBridge:
    """A random Qwen3 of 4 layers in which token 0, at the first position, is an attention sink."""
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=_D_HEAD,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    config._attn_implementation = "eager"
    model: Any = AutoModelForCausalLM.from_config(config)
    randomize(model, seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(0.5)
    flag, constant = 0, 1  # features of the residual stream: large at the sink, the same at every token
    embedding = model.model.embed_tokens.weight
    embedding[:, flag], embedding[:, constant], embedding[0, flag] = 0.0, 1.0, _LARGE
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        slowest = _D_HEAD - 1  # the feature of a head that the rotation hardly turns
        for weight, feature in ((attention.q_proj.weight, constant), (attention.k_proj.weight, flag)):
            weight[:, feature] = 0.0
            weight[slowest::_D_HEAD, feature] = _SCALE
        for weight in (attention.v_proj.weight, mlp.gate_proj.weight, mlp.up_proj.weight):
            weight[:, flag] = 0.0
        for weight in (attention.o_proj.weight, mlp.down_proj.weight):
            weight[[flag, constant]] = 0.0
        attention.q_norm.weight.fill_(_GAIN)
        attention.k_norm.weight.fill_(_GAIN)
    model.lm_head.weight[:, flag] = 0.0
    return build_bridge_from_module(model.to(dtype).eval(), type(model).__name__, hf_config=config).eval()


def sink_tokens(batch: int = 8, positions: int = 24, seed: int = 1) -> Int[Tensor, "batch pos"]:
    """Random tokens behind the sink of `sink_model`."""
    tokens = torch.randint(1, 50, (batch, positions), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = 0
    return tokens


@torch.no_grad()
def continued(model: TransformerBridge, n: int, positions: int, *, seed: int = 0) -> Int[Tensor, "batch pos"]:
    """Texts that the model itself samples from its BOS token, or from token 0 where it has none."""
    first = getattr(getattr(model, "tokenizer", None), "bos_token_id", None) or 0
    tokens, generator = torch.full((n, 1), first), torch.Generator().manual_seed(seed)
    while tokens.shape[1] < positions:
        probabilities = model(tokens)[:, -1].float().softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], 1)
    return tokens


def first_token(model: TransformerBridge, tokens: Int[Tensor, "batch pos"]) -> pd.DataFrame:
    """One row per ruleset: the first token's share of |relevance| at the embeddings, with the ruleset as it is (`before`) and with the
    plain gradient at q_norm and k_norm (`after`); means over the prompts. What is explained is each prompt's top prediction."""
    rows = []
    for name in RULESETS:
        shares = []
        for table in (rulesets()[name], {**rulesets()[name], **PLAIN_NORMS}):
            relevance = propagate(model, tokens, None, rules=table, names_filter="embed.hook_out").tokens().abs()
            shares.append(float((relevance[:, 0] / relevance.sum(1)).mean()))
        rows.append((name, *shares))
    return pd.DataFrame(rows, columns=["ruleset", "before", "after"])


@torch.no_grad()
def attention_to_first(model: TransformerBridge, tokens: Int[Tensor, "batch pos"]) -> list[float]:
    """By layer: mean attention of later positions (from a quarter of the text on) to the first."""
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("attn.hook_pattern"))
    return [float(pattern[:, :, tokens.shape[1] // 4 :, 0].mean()) for pattern in cache.values()]


def main(
    model: Annotated[str | None, typer.Option(help="A folder or hub name; a model with a sink built in if left out.")] = None,
    n: int = 48,
    positions: int = 40,
) -> None:
    """Print the shares before and after."""
    if model is None:
        bridge: Any = sink_model()
        tokens = sink_tokens(n, positions)
    else:
        from analyses import load_model

        bridge = load_model(model)
        tokens = continued(bridge, n, positions)
    layers = ", ".join(f"{share:.2f}" for share in attention_to_first(bridge, tokens))
    Console().print(f"{n} x {positions} tokens; attention to the first token by layer: {layers}")
    Console().print("share of |relevance| on the first token, with a ruleset's own rule and with the plain gradient at q_norm and k_norm:")
    Console().print(first_token(bridge, tokens).to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    typer.run(main)
