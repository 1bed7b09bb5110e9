"""Runs shared among processes, interrupted and resumed, on a bridge with device hooks: always the result of one undisturbed run."""

from __future__ import annotations

import io
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from accelerate import dispatch_model
from accelerate.commands import launch as accelerate_launch
from safetensors.torch import load_file
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from analyses.cli import app
from analyses.contexts import Atlas
from analyses.datasets import progress
from analyses.datasets.processes import Processes
from analyses.evaluation.comparison import compare_with_patching
from analyses.evaluation.ranking import rank_heads, rank_neurons
from analyses.methods import Estimator, collect, conductance, eap_ig
from analyses.patching import activation_patching
from analyses.tasks import PromptPairs, ioi
from lens_relevance import RelevanceError, logit_diff
from tests import models
from tests.analyses.streamed_run import ANALYSES, BATCH, N_PAIRS, atlas, stepped, told
from tests.analyses.test_ranking import random_pairs
from tests.forked_processes import Forked

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def numbers(frame: pd.DataFrame) -> torch.Tensor:
    return torch.tensor(frame.select_dtypes("number").to_numpy(float))


def launch(*program: str) -> None:
    """What `accelerate launch` does, in two new interpreters."""
    options = "--multi_gpu --num_processes=2 --num_machines=1 --mixed_precision=no --dynamo_backend=no --main_process_port=0"
    sys.argv = ["accelerate-launch", *options.split(), "-m", *program]
    accelerate_launch.main()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    """Each runs about half of the pairs, both end up with the whole result, and the command speaks once."""
    child = Forked(launch, "tests.analyses.streamed_run", str(tmp_path), environment=ENVIRONMENT)
    printed, errors = child.stdout.read(), child.stderr.read()
    assert child.wait() == 0, errors[-3000:]
    assert printed.count("heads by combined") == 1
    assert (tmp_path / "command.csv").exists()
    seen = [tuple(map(int, (tmp_path / f"pairs-{i}.txt").read_text().split())) for i in (0, 1)]
    assert [count for count, _ in seen] == [2, 2]
    assert sum(pairs for _, pairs in seen) == 3 * N_PAIRS and max(pairs for _, pairs in seen) == 3 * (N_PAIRS - N_PAIRS // 2)
    for name, analysis in ANALYSES.items():
        alone = analysis()
        for index in (0, 1):
            shared = pd.read_csv(tmp_path / f"{name}-{index}.csv", float_precision="round_trip")
            keys = [column for column in ("layer", name.removesuffix("s"), "method", "component", "index") if column in alone]
            both = [numbers(frame.sort_values(keys, kind="stable")) for frame in (alone, shared)]
            assert both[0].shape == both[1].shape and both[0].numel()
            torch.testing.assert_close(both[1], both[0], rtol=1e-6, atol=1e-6, equal_nan=True)
        if name != "comparison":
            texts = [(tmp_path / f"{name}-{index}.txt").read_text() for index in (0, 1)]
            assert texts[0] == texts[1] and "gap" in texts[0]
    one = atlas()
    for index in (0, 1):
        found = Atlas.load(tmp_path / f"atlas-{index}")
        assert found.info["windows"] == one.info["windows"] and found.info["tokens"] == one.info["tokens"]
        for name in one.rankings:
            torch.testing.assert_close(found.rankings[name]["score"], one.rankings[name]["score"], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["heads", "comparison"])
def test_a_killed_run_goes_on_where_it_was(name: str, tmp_path: Path) -> None:
    checkpoint, n_batches = tmp_path / "checkpoint", -(-N_PAIRS // BATCH)
    chance = random.Random(time.time_ns())
    kill_at, delay = chance.randint(2, n_batches - 1), chance.uniform(0, 0.03)
    child = Forked(stepped, name, checkpoint, environment=ENVIRONMENT)
    for _ in range(kill_at):
        assert child.stdout.readline() == "batch\n", child.stderr.read()
        child.stdin.write("go on\n")
        child.stdin.flush()
    time.sleep(delay)  # somewhere in this batch, or in writing it down: the next one waits for a line that never comes
    child.kill()
    assert child.wait() == -9
    told_again: list[torch.Tensor] = []
    resumed = ANALYSES[name](told(lambda pairs: told_again.append(pairs.clean)), checkpoint)
    left = torch.cat(told_again)
    done = N_PAIRS - len(left)
    assert done in (BATCH * (kill_at - 1), BATCH * kill_at), f"killed in batch {kill_at} after {delay} s"
    assert torch.equal(left, random_pairs(N_PAIRS).clean[done:])
    pd.testing.assert_frame_equal(resumed, ANALYSES[name](), check_exact=True)
    assert not list(checkpoint.glob("*.pt")) and {path.suffix for path in checkpoint.iterdir()} <= {".json", ".safetensors", ".tmp"}


class Interruption(Exception):
    pass


def interrupted(after: int) -> Estimator:
    calls = []

    def stop(pairs: PromptPairs) -> None:
        calls.append(pairs)
        if len(calls) > after:
            raise Interruption

    return told(stop)


@pytest.mark.parametrize("name", list(ANALYSES))
def test_an_exception_costs_at_most_a_batch(name: str, tmp_path: Path) -> None:
    with pytest.raises(Interruption):
        ANALYSES[name](interrupted(after=2), tmp_path, n=7)
    batches: list[int] = []
    resumed = ANALYSES[name](told(lambda pairs: batches.append(len(pairs))), tmp_path, n=7)
    assert sum(batches) == 7 - 2 * BATCH
    pd.testing.assert_frame_equal(resumed, ANALYSES[name](n=7), check_exact=True)


def never(pairs: PromptPairs) -> None:
    raise AssertionError("a completed run is read, not run")


@pytest.mark.parametrize("name", list(ANALYSES))
def test_a_completed_run_is_read(name: str, tmp_path: Path) -> None:
    first = ANALYSES[name](checkpoint=tmp_path, n=3)
    pd.testing.assert_frame_equal(ANALYSES[name](told(never), tmp_path, n=3), first, check_exact=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(method="attnlrp"), 'method: .*"relp".* there, .*"attnlrp".* here'),
        (dict(top_k=2), "top_k: 1 there, 2 here"),
        (dict(run="clean"), 'run: "corrupt" there, "clean" here'),
        (dict(batch_size=3), "batch_size: 2 there, 3 here"),
        (dict(model=models.build_gpt2(seed=1)), "model"),
        (dict(model=models.build_gpt2(torch.float64)), "model"),
        (dict(pairs=random_pairs(6)), "pairs"),
        (dict(pairs=PromptPairs(random_pairs(5).clean, random_pairs(5).corrupt, logit_diff(1, 2))), "pairs"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(change: dict[str, object], named: str, tmp_path: Path) -> None:
    arguments: dict[str, object] = dict(
        model=models.build_gpt2(), pairs=random_pairs(5), method="relp", top_k=1, run="corrupt", batch_size=2
    )
    rank_heads(**arguments, checkpoint=tmp_path)  # type: ignore[arg-type]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RelevanceError, match=rf"checkpoint of another run \({named}.*delete it to start anew"):
        rank_heads(**arguments | change, checkpoint=tmp_path)  # type: ignore[arg-type]
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_checkpoint_of_another_analysis_is_refused(gpt2: TransformerBridge, tmp_path: Path) -> None:
    rank_heads(gpt2, random_pairs(), top_k=3, checkpoint=tmp_path)
    with pytest.raises(RelevanceError, match="analysis"):
        rank_neurons(gpt2, random_pairs(), top_k=3, checkpoint=tmp_path)


def test_a_model_with_hooks_is_another_model(gpt2: TransformerBridge, tmp_path: Path) -> None:
    rank_heads(gpt2, random_pairs(), checkpoint=tmp_path)
    gpt2.add_hook("blocks.0.hook_mlp_out", lambda x, hook: x * 2)
    with pytest.raises(RelevanceError, match="hooks on the model"):
        rank_heads(gpt2, random_pairs(), checkpoint=tmp_path)
    gpt2.reset_hooks()


def test_what_is_no_checkpoint_is_left_alone(gpt2: TransformerBridge, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("chapter 1")
    with pytest.raises(RelevanceError, match="thesis.tex but no run.json"):
        rank_heads(gpt2, random_pairs(), checkpoint=tmp_path)
    with pytest.raises(RelevanceError, match="a checkpoint is a folder"):
        rank_heads(gpt2, random_pairs(), checkpoint=tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_damaged_checkpoint_is_named(gpt2: TransformerBridge, tmp_path: Path) -> None:
    rank_heads(gpt2, random_pairs(), checkpoint=tmp_path)
    (part,) = tmp_path.glob("*.safetensors")
    part.write_bytes(part.read_bytes()[:40])
    with pytest.raises(RelevanceError, match=f"{part.name} cannot be read"):
        rank_heads(gpt2, random_pairs(), checkpoint=tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RelevanceError, match="run.json cannot be read"):
        rank_heads(gpt2, random_pairs(), checkpoint=tmp_path)


def test_a_checkpoint_holds_sums_and_not_pairs(gpt2: TransformerBridge, tmp_path: Path) -> None:
    """Three times the pairs make no larger file."""
    sizes = []
    for n in (12, 36):
        rank_neurons(gpt2, random_pairs(n), batch_size=2, checkpoint=tmp_path / str(n))
        (part,) = (tmp_path / str(n)).glob("*.safetensors")
        assert int(load_file(part)["rows_done"]) == n
        sizes.append(part.stat().st_size)
    assert sizes[0] == sizes[1]
    assert "sha" not in json.loads((tmp_path / "12" / "run.json").read_text())


@pytest.mark.parametrize(("n", "count"), [(5, 2), (23, 4), (2, 3), (0, 2)])
def test_shares_cover_every_pair_once(n: int, count: int) -> None:
    pairs = random_pairs(max(n, 1))[:n]
    shares = [Processes(index, count).share(pairs) for index in range(count)]
    assert torch.equal(torch.cat([share.clean for share, _ in shares]), pairs.clean)
    assert [first for _, first in shares] == [sum(len(share) for share, _ in shares[:i]) for i in range(count)]
    assert max(len(share) for share, _ in shares) - min(len(share) for share, _ in shares) <= 1


class Shared:
    """Several processes played one after the other: `gather` gives what the others gave."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.monkeypatch, self.count = monkeypatch, count

    def __call__(self, run: Callable[[], pd.DataFrame]) -> list[pd.DataFrame]:
        """The result of every process. Each run is repeated until all that it gathers is known."""
        known: list[list[object]] = []
        while True:
            frames, given = [], []
            for index in range(self.count):
                calls = iter(range(10**6))

                class Player(Processes):
                    def gather(self, part, calls=calls, given=given):  # type: ignore[no-untyped-def]
                        at = next(calls)
                        if at < len(known):
                            return list(known[at])
                        given.append(part)
                        raise Interruption

                self.monkeypatch.setattr(
                    "analyses.datasets.streaming.processes", lambda index=index, player=Player: player(index, self.count)
                )
                try:
                    frames.append(run())
                except Interruption:
                    pass
            if len(frames) == self.count:
                return frames
            known.append(given)


@pytest.mark.parametrize(("name", "count"), [("heads", 2), ("heads", 4), ("neurons", 3), ("comparison", 2)])
def test_shares_add_up(name: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the pairs do not divide evenly, without the cost of starting processes."""
    alone = ANALYSES[name](n=11)
    frames = Shared(monkeypatch, count)(lambda: ANALYSES[name](n=11))
    keys = [column for column in ("layer", name.removesuffix("s"), "method", "component", "index") if column in alone]
    for frame in frames:
        torch.testing.assert_close(
            numbers(frame.sort_values(keys, kind="stable")),
            numbers(alone.sort_values(keys, kind="stable")),
            rtol=1e-6,
            atol=1e-6,
            equal_nan=True,
        )


def test_more_processes_than_pairs(gpt2: TransformerBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = rank_heads(gpt2, random_pairs(2))
    for frame in Shared(monkeypatch, 3)(lambda: rank_heads(gpt2, random_pairs(2))):
        torch.testing.assert_close(numbers(frame), numbers(alone), rtol=1e-6, atol=1e-6)


def test_a_checkpoint_of_two_processes_is_not_taken_by_one(
    gpt2: TransformerBridge, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as context:
        Shared(context, 2)(lambda: rank_heads(gpt2, random_pairs(), checkpoint=tmp_path))
    with pytest.raises(RelevanceError, match="processes: 2 there, 1 here"):
        rank_heads(gpt2, random_pairs(), checkpoint=tmp_path)


def test_a_metric_over_all_pairs_cannot_be_shared(gpt2: TransformerBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = random_pairs()
    mean = PromptPairs(pairs.clean, pairs.corrupt, lambda logits: logits[:, -1, 3].mean())
    assert len(rank_heads(gpt2, mean))
    monkeypatch.setattr("analyses.datasets.streaming.processes", lambda: Processes(0, 2))
    with pytest.raises(RelevanceError, match="one number for all pairs"):
        rank_heads(gpt2, mean)


def test_the_ablated_sets_cost_what_setting_them_by_hand_costs(gpt2: TransformerBridge) -> None:
    pairs = random_pairs(6)
    ranking = rank_heads(gpt2, pairs, top_k=3, ablate=True, batch_size=4)
    check = ranking.attrs["ablation"]
    top = list(ranking[["layer", "head"]].itertuples(index=False, name=None))[:3]
    _, corrupt = gpt2.run_with_cache(pairs.corrupt)

    def set_(z: torch.Tensor, hook: object) -> torch.Tensor:
        z = z.clone()
        layer = int(hook.name.split(".")[1])  # type: ignore[attr-defined]
        for at, head in top:
            if at == layer:
                z[:, :, head] = corrupt[f"blocks.{layer}.attn.hook_z"][:, :, head]
        return z

    metric = pairs.metric(gpt2)
    with torch.no_grad():
        plain, corrupted = (metric(gpt2(tokens, return_type="logits")) for tokens in (pairs.clean, pairs.corrupt))
        with gpt2.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_z", set_) for layer in range(2)]):
            ablated = metric(gpt2(pairs.clean, return_type="logits"))
    losses = (plain - ablated).double()
    assert check.k == 3 and check.top == pytest.approx(float(losses.mean()), rel=1e-4)
    assert check.top_error == pytest.approx(float(losses.std() / 6**0.5), rel=1e-4)
    assert check.gap == pytest.approx(float((plain - corrupted).mean()), rel=1e-4)


def test_ablating_everything_is_noising_everything(gpt2: TransformerBridge) -> None:
    """All heads at once, or one: what activation patching says of it."""
    pairs = random_pairs(6)
    one = rank_heads(gpt2, pairs, top_k=1, ablate=True)
    effects = activation_patching(gpt2, pairs, "z", direction="noising").to_dataframe().set_index(["layer", "head"])["effect"]
    assert one.attrs["ablation"].top == pytest.approx(effects.loc[one["layer"][0], one["head"][0]], rel=1e-4)
    everything = rank_neurons(gpt2, pairs, top_k=128, ablate=True).attrs["ablation"]
    assert everything.k == 128 and everything.random == pytest.approx(everything.top, rel=1e-5) and everything.random_std < 1e-5


@pytest.mark.parametrize("rank", [rank_heads, rank_neurons])
def test_the_top_of_a_ranking_matters_more_than_chance(embedded: TransformerBridge, rank: Callable[..., pd.DataFrame]) -> None:
    check = rank(embedded, ioi(embedded, n=16), ablate=True).attrs["ablation"]
    assert check.top > check.random + 2 * check.random_std
    assert check.top > 0.1 * check.gap > 0


def build_dispatched(device_map: dict[str, str]) -> TransformerBridge:
    """The model of `build_gpt2`, with the hooks that accelerate puts on a model with a device map, which move what passes."""
    config = GPT2Config(
        vocab_size=models.VOCAB_SIZE,
        n_positions=models.N_CTX,
        n_embd=16,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
    models.randomize(model, 0)
    model = dispatch_model(model.eval(), device_map, force_hooks=True)
    return build_bridge_from_module(model, "GPT2LMHeadModel", hf_config=config).eval()


def test_a_bridge_with_device_hooks() -> None:
    """A device map of one device, all there is here; but its hooks move inputs and outputs of every block as they do with several."""
    device_map = {
        name: "cpu" for name in ("transformer.wte", "transformer.wpe", "transformer.h.0", "transformer.h.1", "transformer.ln_f", "lm_head")
    }
    model, plain, pairs = build_dispatched(device_map), models.build_gpt2(), random_pairs()
    assert any(hasattr(module, "_hf_hook") for module in model.original_model.modules())
    torch.testing.assert_close(numbers(rank_heads(model, pairs)), numbers(rank_heads(plain, pairs)))
    torch.testing.assert_close(numbers(rank_neurons(model, pairs, ablate=True)), numbers(rank_neurons(plain, pairs)))
    methods = ["deeplift", eap_ig(2), conductance(2), "direct_logit_attribution"]
    tables = [compare_with_patching(m, pairs, methods, resamples=0).drop(columns="seconds") for m in (model, plain)]
    torch.testing.assert_close(*map(numbers, tables), rtol=1e-4, atol=1e-5, equal_nan=True)


def test_scores_of_layers_on_several_devices_come_together(gpt2: TransformerBridge) -> None:
    """The meta device stands for a second one: PyTorch refuses to mix it with the CPU as it refuses to mix two GPUs."""
    where = {"blocks.0.attn.hook_z": "meta", "blocks.1.attn.hook_z": "cpu"}
    with pytest.raises(RuntimeError):
        torch.stack([torch.zeros(3, device=device) for device in where.values()])
    found = collect(gpt2, ["heads"], lambda point: torch.zeros(2, 6, 4, 4, device=where[point]))
    assert found["heads"].shape == (2, 2, 4)


@pytest.mark.parametrize(("terminal", "force", "rank"), [(False, "1", "0"), (False, "", "0"), (True, "", "1")])
def test_no_bar_but_on_the_terminal_of_the_first_process(
    terminal: bool, force: str, rank: str, monkeypatch: pytest.MonkeyPatch, gpt2: TransformerBridge
) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("FORCE_COLOR", force)
    assert not progress.watched()
    rank_heads(gpt2, random_pairs(), batch_size=1)
    assert stream.getvalue() == ""


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, gpt2: TransformerBridge) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert progress.watched()
    rank_heads(gpt2, random_pairs(), batch_size=1)
    assert "ranking heads" in stream.getvalue()


def test_the_commands_resume_and_verify(tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, [*arguments, "--checkpoint", str(tmp_path / arguments[0])])
        assert result.exit_code == 0, result.output
        return result.stdout

    ranked = [run("rank", "heads", "--n", "3", "--ablate") for _ in range(2)]
    assert ranked[0] == ranked[1] and "ablating the top 3 costs" in ranked[0]
    out = ("--out", str(tmp_path / "table.csv"))
    compared = [run("compare", "--n", "2", "--methods", "relp", "--components", "heads", *out) for _ in range(2)]
    assert compared[0] == compared[1]
    refused = CliRunner().invoke(app, ["rank", "heads", "--n", "5", "--checkpoint", str(tmp_path / "rank")])
    assert refused.exit_code == 2 and "another run" in refused.stderr
