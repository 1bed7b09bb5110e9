"""NaN, inf and odd masks: one sentence that names the first HookPoint, in the engine and in every command."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from typer.testing import CliRunner

from analyses.circuits import faithfulness_table
from analyses.cli import app
from analyses.evaluation.comparison import compare
from analyses.evaluation.ranking import rank_heads
from analyses.patching import ablation, activation_patching, path_patching
from analyses.tasks import PromptPairs
from lens_relevance import RelevanceError, continuation, log_prob, logit, propagate, random_tokens, token_relevance
from tests.analyses.test_ranking import random_pairs
from tests.engine.families import TARGET, inputs_and_reference
from tests.models import build_gpt2, build_llama, build_with_words

TOKENS, OTHER = inputs_and_reference()
PAIRS = random_pairs(3)

# Where a NaN in a parameter shows first, and the parameter's name in the error.
DAMAGED = {
    "wte.weight": "embed.hook_out",
    "wpe.weight": "pos_embed.hook_out",
    "h.0.attn.c_attn.weight": "blocks.0.attn.q.hook_out",
    "h.0.attn.c_attn.bias": "blocks.0.attn.q.hook_out",
    "h.1.attn.c_proj.weight": "blocks.1.attn.o.hook_out",
    "h.0.mlp.c_fc.bias": "blocks.0.mlp.in.hook_out",
    "h.1.mlp.c_proj.weight": "blocks.1.mlp.out.hook_out",
    "h.1.ln_2.weight": "blocks.1.ln2.hook_out",
    "ln_f.bias": "ln_final.hook_out",
}


# As TransformerLens calls what Hugging Face calls c_attn and c_proj.
OF_TRANSFORMER_LENS = {"attn.c_attn": "attn.qkv", "attn.c_proj": "attn.o"}


def damage(model: TransformerBridge, name: str, value: float = float("nan"), column: int = 1) -> None:
    """One entry of a parameter; in the token embedding, that of a token that is there."""
    there = name
    for plain, other in OF_TRANSFORMER_LENS.items():
        there = there.replace(plain, other)
    (parameter,) = [p for n, p in model.original_model.named_parameters() if n.replace("_original_component.", "").endswith(there)]
    with torch.no_grad():  # not by flatten(), which copies what is no contiguous tensor
        parameter[(int(TOKENS[0, 3]) if name.startswith("wte") else 0, column) if parameter.ndim == 2 else column] = value
    assert sum(not bool(p.isfinite().all()) for _, p in model.original_model.named_parameters()) >= 1


@pytest.mark.parametrize("name", list(DAMAGED))
@pytest.mark.parametrize("rules", ["attnlrp", "deeplift"])
def test_one_nan_weight_is_named(name: str, rules: str) -> None:
    model = build_gpt2()
    damage(model, name)
    with pytest.raises(RelevanceError) as caught:
        propagate(model, TOKENS, TARGET, rules=rules, reference=OTHER if rules == "deeplift" else None)
    message = str(caught.value)
    assert f"{DAMAGED[name]} is the first HookPoint" in message
    assert f"The parameter transformer.{name} holds such values: load the model's weights again" in message
    assert not any(point.has_hooks() for point in model.hook_dict.values())


@pytest.mark.parametrize(("column", "part"), [(3, "q"), (16 + 3, "k"), (32 + 3, "v")])
@pytest.mark.parametrize("name", ["h.1.attn.c_attn.weight", "h.1.attn.c_attn.bias"])
def test_each_part_of_a_joint_parameter_is_named(name: str, column: int, part: str) -> None:
    """Queries, keys and values are columns of one matrix in GPT-2."""
    model = build_gpt2()
    damage(model, name, column=column)
    with pytest.raises(RelevanceError, match=rf"blocks\.1\.attn\.{part}\.hook_out is the first HookPoint.* transformer\.{name} holds"):
        propagate(model, TOKENS, TARGET)


@pytest.mark.parametrize("name", ["self_attn.q_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight"])
def test_parameters_of_llama_have_their_names(name: str) -> None:
    model = build_llama()
    of_lens = {"self_attn.q_proj": "self_attn.q", "mlp.down_proj": "mlp.out"}
    endings = [name, *(name.replace(a, b) for a, b in of_lens.items())]
    (parameter,) = [
        p
        for n, p in model.original_model.named_parameters()
        if n.replace("_original_component.", "").endswith(tuple(f"layers.1.{ending}" for ending in endings))
    ]
    with torch.no_grad():
        parameter[0] = float("inf")
    with pytest.raises(RelevanceError, match=rf"The parameter model\.layers\.1\.{name} holds"):
        propagate(model, TOKENS, TARGET)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_overflow_in_half_precision_is_named(recompute: bool, padded: bool) -> None:
    """A residual stream beyond 65504 from the second block's MLP on; padding does not count."""
    model = build_llama(torch.float16)
    with torch.no_grad():
        model.blocks[1].mlp.out.weight.mul_(2e4)
    mask = torch.ones_like(TOKENS)
    mask[0, :2] = 0 if padded else 1
    with pytest.raises(RelevanceError, match=r"blocks\.1\.mlp\.out\.hook_out is the first HookPoint .*float16 ends at 65504.* or bfloat16"):
        propagate(model, TOKENS, TARGET, attention_mask=mask, recompute=recompute)


def test_inf_on_the_reference_alone() -> None:
    model = build_gpt2()
    reference = torch.full((int(model.cfg.d_model),), float("inf"))
    with pytest.raises(RelevanceError, match=r"the target on the reference is nan: .* is the first HookPoint"):
        propagate(model, TOKENS, logit(3), reference=reference)


def test_a_target_that_makes_the_nan_itself() -> None:
    for target in (lambda logits: logits[:, -1, 3] / 0, lambda logits: (logits[:, -1, 3] * 0).log() * 0):
        with pytest.raises(RelevanceError, match="although every activation is finite"):
            propagate(build_gpt2(), TOKENS, target)


def test_relevance_that_overflows_behind_a_finite_target() -> None:
    model = build_gpt2(torch.float16)
    with pytest.raises(RelevanceError, match=r"the target is finite and the relevance at .* is not.*float16"):
        propagate(model, TOKENS, lambda logits: logits[:, -1, 3].float() * 1e6, rules="gradient")


def test_a_hook_that_makes_the_nan() -> None:
    model = build_gpt2()
    with model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", lambda x, hook: x / 0)]):
        with pytest.raises(RelevanceError, match=r"blocks\.1\..*mlp.* is the first HookPoint.*hooks of your own"):
            propagate(model, TOKENS, TARGET)


ANALYSES: dict[str, Callable[[TransformerBridge], object]] = {
    "log_prob": lambda m: propagate(m, TOKENS, log_prob(3)),
    "continuation": lambda m: propagate(m, TOKENS, continuation([3, 4])),
    "top prediction": lambda m: propagate(m, TOKENS),
    "random references": lambda m: propagate(m, TOKENS, TARGET, reference=random_tokens(2)),
    "token relevance": lambda m: token_relevance(m, TOKENS, TARGET),
    "rank": lambda m: rank_heads(m, PAIRS),
    "rank by eap_ig": lambda m: rank_heads(m, PAIRS, "eap_ig"),
    "rank by conductance": lambda m: rank_heads(m, PAIRS, "conductance"),
    "rank by direct logits": lambda m: rank_heads(m, PAIRS, "direct_logit_attribution"),
    "rank by attention": lambda m: rank_heads(m, PAIRS, "weighted_accumulation"),
    "compare": lambda m: compare(m, PAIRS, ["deeplift"]),
    "patching": lambda m: activation_patching(m, PAIRS, "heads"),
    "ablation": lambda m: ablation(m, PAIRS, "heads"),
    "path patching": lambda m: path_patching(m, PAIRS, "heads", receivers="logits"),
    "circuit": lambda m: faithfulness_table(m, PAIRS, ["deeplift"], level="node"),
}


@pytest.mark.parametrize("name", list(ANALYSES))
def test_every_analysis_names_it(name: str) -> None:
    model = build_gpt2()
    damage(model, "h.0.mlp.c_fc.bias")
    with pytest.raises(RelevanceError, match=r"blocks\.0\.mlp\.in\.hook_out is the first HookPoint.*c_fc\.bias"):
        ANALYSES[name](model)


def test_padding_may_hold_what_it_likes() -> None:
    """A row of padding in front of the prompt, where attention sees nothing."""
    model = build_gpt2()
    model.hook_dict["blocks.0.attn.hook_pattern"].add_hook(
        lambda x, hook: torch.where(torch.arange(x.shape[-2])[:, None] < 2, torch.full_like(x, 0.0), x)
    )
    mask = torch.ones_like(TOKENS)
    mask[:, :2] = 0
    assert propagate(model, TOKENS, TARGET, attention_mask=mask).tokens().isfinite().all()


IN_FILES = {
    "transformer.h.0.mlp.c_fc.bias": "blocks.0.mlp.in.hook_out",
    "transformer.h.0.attn.c_attn.weight": "blocks.0.attn.q.hook_out",
}


@pytest.fixture(scope="module", params=list(IN_FILES))
def damaged_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with one NaN weight; the folder's name is that of the parameter."""
    folder = tmp_path_factory.mktemp("damaged") / request.param
    folder.mkdir()
    build_with_words(folder, ["she", "he", "went", "home", "to", "the", "store", "Mary", "John"])
    weights = load_file(folder / "model.safetensors")
    weights[request.param].view(-1)[3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


PAIR = "clean,corrupt,answer,wrong\nMary went to the store,John went to the store, she, he\nMary went home,John went home, she, he\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("explain", "--prompt", "Mary went to"),
        ("explain", "--prompt", "Mary went to", "--rules", "attnlrp"),
        ("explain", "--prompt", "Mary went to", "--method", "rollout"),
        ("report", "--prompt", "Mary went to", "--answer", " she"),
        ("report", "--pairs"),
        ("compare", "--pairs"),
        ("rank", "heads", "--pairs"),
        ("rank", "neurons", "--pairs"),
        ("circuit", "--pairs"),
        ("graph", "--prompt", "Mary went to"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_every_command_gives_one_sentence(arguments: tuple[str, ...], damaged_folder: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text(PAIR)
    given = [*arguments, *([str(pairs)] if arguments[-1] == "--pairs" else []), "--model", str(damaged_folder)]
    if arguments[0] in ("report", "compare", "graph"):
        given += ["--out", str(tmp_path / "page.html")]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1 and "Traceback" not in result.output
    assert f"{IN_FILES[damaged_folder.name]} is the first HookPoint" in errors[0]
    assert f"The parameter {damaged_folder.name} holds such values" in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.csv"]


ODD_MASKS: dict[str, Tensor] = {
    "2s": torch.full((2, 6), 2),
    "one 2": torch.ones(2, 6, dtype=torch.long).index_put((torch.tensor(0), torch.tensor(3)), torch.tensor(2)),
    "halves": torch.full((2, 6), 0.5),
    "-1": -torch.ones(2, 6, dtype=torch.long),
    "nan": torch.full((2, 6), float("nan")),
    "additive": torch.zeros(2, 6).index_put((torch.tensor(0), torch.tensor(3)), torch.tensor(-1e9)),
}


@pytest.mark.parametrize("name", list(ODD_MASKS))
def test_masks_are_0_and_1(name: str) -> None:
    mask, model = ODD_MASKS[name], build_gpt2()
    for inputs, given in ((TOKENS, mask), ({"input_ids": TOKENS, "attention_mask": mask}, None)):
        with pytest.raises(RelevanceError, match=r"attention_mask holds .*1 where a token is real and 0 where it is padding"):
            propagate(model, inputs, TARGET, attention_mask=given)
    for which in ("clean_mask", "corrupt_mask"):
        with pytest.raises(RelevanceError, match=f"{which} holds .*1 where a token is real and 0 where it is padding"):
            PromptPairs(TOKENS, OTHER, TARGET, **{which: mask})
    with pytest.raises(RelevanceError, match="mask"):
        token_relevance(model, TOKENS, TARGET, attention_mask=mask)


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32, torch.uint8])
def test_masks_of_any_type_are_read(dtype: torch.dtype) -> None:
    mask = torch.ones_like(TOKENS)
    mask[0, :2] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, other = (propagate(build_gpt2(), TOKENS, TARGET, attention_mask=m) for m in (mask, mask.to(dtype)))
        pairs = PromptPairs(TOKENS, OTHER, TARGET, clean_mask=mask.to(dtype))
    assert torch.equal(plain.tokens(), other.tokens()) and plain.tokens().abs().max() > 0
    assert torch.equal(pairs.clean_mask, mask) and pairs.clean_mask.dtype == torch.long
