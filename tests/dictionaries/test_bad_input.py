"""Dictionaries that do not fit, and models that go past what a dictionary writes: errors that name the thing, and the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformer_lens.hook_points import HookPoint

from lens_relevance import RelevanceError, attach, latent, propagate, rulesets
from lens_relevance.dictionaries.placement import place_on
from lens_relevance.errors import CoverageError, LivenessError, MismatchError, NotKeptError
from lens_relevance.rules import ElementwiseRule, Rescale, Rule
from lens_relevance.sites import anatomy as anatomy_of
from tests.dictionaries.random_dictionaries import random_dictionary
from tests.engine.families import TARGET, inputs_and_reference
from tests.models import build_gpt2

TOKENS, OTHER = inputs_and_reference()
D = build_gpt2().cfg.d_model
IN, OUT = "blocks.1.mlp.hook_in", "blocks.1.mlp.hook_out"
TRANSCODER = random_dictionary(IN, OUT, d_in=D)


def run(*dictionaries: Any, target: Any = TARGET, rules: Any = "deeplift", reference: Any = OTHER, **further: Any) -> None:
    """propagate, after which the model is as it was."""
    model = build_gpt2(dtype=torch.float64)
    before = model(TOKENS)
    try:
        propagate(model, TOKENS, target, rules=rules, reference=reference, dictionaries=dictionaries, **further)
    finally:
        assert all(type(point) is HookPoint for point in model.hook_dict.values())
        assert torch.equal(model(TOKENS), before)


def test_of_another_model() -> None:
    with pytest.raises(RelevanceError, match=r"reads activations of size 7, and blocks.1.mlp.hook_in has \[2, 6, .*another model"):
        run(random_dictionary(IN, OUT, d_in=7, d_out=D))
    with pytest.raises(RelevanceError, match="writes activations of size 7"):
        run(random_dictionary(IN, OUT, d_in=D, d_out=7))


def test_wrong_points() -> None:
    with pytest.raises(RelevanceError, match="unknown HookPoint 'blocks.9.hook_mlp_out'.*point_in="):
        run(random_dictionary(IN, "blocks.9.hook_mlp_out", d_in=D))
    with pytest.raises(RelevanceError, match="side branch.*ln2.hook_out"):
        run(random_dictionary("blocks.1.ln2.hook_normalized", OUT, d_in=D))
    with pytest.raises(LivenessError, match="fired before blocks.1.mlp.hook_out"):
        run(random_dictionary(OUT, IN, d_in=D))
    with pytest.raises(LivenessError, match="did not fire"):
        run(random_dictionary("blocks.1.attn.hook_result", d_in=D))


def test_two_at_one_point() -> None:
    with pytest.raises(RelevanceError, match=r"two dictionaries write to blocks.1.mlp.hook_out"):
        run(TRANSCODER, random_dictionary(OUT, d_in=D))
    with pytest.raises(RelevanceError, match="two dictionaries write to"):
        run(*(random_dictionary(IN, OUT, d_in=D, set_name=name) for name in ("a", "b")))


def test_features_out_of_range() -> None:
    for feature in (24, -25):
        with pytest.raises(RelevanceError, match="out of range at blocks.1.mlp.hook_out, which has 24"):
            run(TRANSCODER, through={OUT: {"feature": [3, feature]}})
        with pytest.raises(RelevanceError, match=f"feature {feature} is out of range"):
            run(TRANSCODER, target=latent(OUT, feature=feature))
    with pytest.raises(RelevanceError, match="position"):
        run(TRANSCODER, through={OUT: {"feature": [3], "position": [6]}})
    with pytest.raises(RelevanceError, match="axes feature and position"):
        run(TRANSCODER, through={OUT: {"feature": [3], "head": [1]}})


def test_features_without_a_dictionary() -> None:
    with pytest.raises(RelevanceError, match=r"no dictionary writes to blocks.0.mlp.hook_out: those given write to blocks.1.mlp.hook_out"):
        run(TRANSCODER, through={"blocks.0.mlp.hook_out": {"feature": [3]}})
    with pytest.raises(RelevanceError, match="pass dictionaries="):
        run(target=latent(OUT, feature=3))
    with pytest.raises(RelevanceError, match="without unit, head and direction"):
        latent(OUT, 3, feature=3)
    cache = propagate(build_gpt2(), TOKENS, TARGET, rules="attnlrp", dictionaries=[TRANSCODER])
    with pytest.raises(NotKeptError, match="features of blocks.0.mlp.hook_out; it was kept at blocks.1.mlp.hook_out"):
        cache.features("blocks.0.mlp.hook_out")
    with pytest.raises(NotKeptError, match=r"pass dictionaries="):
        propagate(build_gpt2(), TOKENS, TARGET, rules="attnlrp").error(OUT)


def test_settings() -> None:
    anatomy: Any = anatomy_of(build_gpt2())
    with pytest.raises(RelevanceError, match="through the 'features' or through the 'model'"):
        place_on(anatomy, [TRANSCODER], {}, path="error")  # type: ignore[arg-type]
    with pytest.raises(RelevanceError, match="takes Dictionary objects"):
        place_on(anatomy, ["a folder"], {}, path="features")  # type: ignore[list-item]
    with pytest.raises(RelevanceError, match="under dictionary_path='features' alone"):
        run(TRANSCODER, through={OUT: {"feature": [3]}}, dictionary_path="model")
    crossing = random_dictionary("blocks.0.mlp.hook_in", ("blocks.0.mlp.hook_out", OUT), d_in=D)
    with pytest.raises(RelevanceError, match="leave it out"):
        run(crossing, recompute=True)


def test_a_table_has_an_entry_for_dictionaries_alone() -> None:
    model = build_gpt2(dtype=torch.float64)

    class Twice(ElementwiseRule):
        def slope(self, f: Any, x: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor:
            return 2 * (f(x) != 0)

    def tokens(rules: Any) -> torch.Tensor:
        return propagate(model, TOKENS, TARGET, rules=rules, dictionaries=[TRANSCODER], through={OUT: {"feature": range(24)}}).tokens()

    assert torch.allclose(tokens({"activation@dictionary": Twice()}), 2 * tokens({}), rtol=1e-12)
    assert torch.allclose(tokens({"activation@dictionary[-1]": Twice()}), 2 * tokens({}), rtol=1e-12)
    with pytest.raises(RelevanceError, match="is for no operation of this model"):
        propagate(model, TOKENS, TARGET, rules={"activation@dictionary[0]": Twice()}, dictionaries=[TRANSCODER])
    with pytest.raises(RelevanceError, match="is for no operation of this model"):
        propagate(model, TOKENS, TARGET, rules={"activation@dictionary": Twice()})


def test_a_rule_of_another_kind() -> None:
    class Own(Rule):
        def backward(self, op: Any, kept: Any, upstream: torch.Tensor) -> tuple[torch.Tensor]:
            return (upstream,)

    with pytest.raises(RelevanceError, match=r"takes an ElementwiseRule"):
        run(TRANSCODER, rules={"activation@dictionary": Own()}, reference=None)


def test_a_model_that_goes_past_what_is_written() -> None:
    """A model that adds the MLP's own output to what its HookPoint returns."""
    model = build_gpt2(dtype=torch.float64)
    mlp = model.blocks[1].mlp
    inner: list[torch.Tensor] = []
    mlp.out.register_forward_hook(lambda module, args, output: inner.append(output))
    mlp.register_forward_hook(lambda module, args, output: output + inner.pop())
    with pytest.raises((LivenessError, MismatchError)):
        propagate(model, TOKENS, TARGET, reference=OTHER, dictionaries=[TRANSCODER])
    with pytest.raises(LivenessError, match="was bypassed"):
        propagate(model, TOKENS, TARGET, rules="gradient", dictionaries=[TRANSCODER], check=False)
    autoencoder = random_dictionary(OUT, d_in=D)
    with pytest.raises(LivenessError, match="was bypassed"):
        propagate(model, TOKENS, TARGET, rules="gradient", dictionaries=[autoencoder], check=False)


def test_faults_are_found_under_dictionaries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A component that computes something else than its site says, with dictionaries on the model."""
    model = build_gpt2(dtype=torch.float64)
    own = model.blocks[0].mlp.original_component.act.forward
    monkeypatch.setattr(model.blocks[0].mlp.original_component.act, "forward", lambda x: own(x) * 1.01)
    model.blocks[1].register_forward_hook(lambda module, args, output: output * output.detach().norm().cos())
    with pytest.raises((MismatchError, CoverageError)):
        propagate(model, TOKENS, TARGET, reference=OTHER, dictionaries=[TRANSCODER])


def test_a_rule_that_is_less_exact_than_it_says() -> None:
    class Wrong(Rescale):
        def slope(self, f: Any, x: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor:
            return super().slope(f, x, other) * 1.01

    with pytest.raises(MismatchError, match="does not add up"):
        run(TRANSCODER, rules={**rulesets()["deeplift"], "activation@dictionary": Wrong()})


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_after_an_exception(error: type[BaseException]) -> None:
    model = build_gpt2(dtype=torch.float64)

    def fails(x: torch.Tensor, hook: HookPoint) -> None:
        raise error

    for place in (IN, OUT, "ln_final.hook_out"):
        with pytest.raises(error), model.hooks(fwd_hooks=[(place, fails)]):
            propagate(model, TOKENS, TARGET, reference=OTHER, dictionaries=[TRANSCODER], check=False)
        with pytest.raises(error), attach(model, "attnlrp", dictionaries=[TRANSCODER]):
            model(TOKENS)
            raise error
        assert all(type(point) is HookPoint for point in model.hook_dict.values())
    propagate(model, TOKENS, TARGET, reference=OTHER, dictionaries=[TRANSCODER])
