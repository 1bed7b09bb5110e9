"""Classifiers of images (ViT, DeiT) and of texts (BERT): conservation, completeness, classes by name, patches, references, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from analyses import PromptPairs, activation_patching, bridge_encoder
from analyses.benchmarks.tiny_models import random_model
from lens_relevance import (
    LivenessError,
    NotKeptError,
    RelevanceCache,
    RelevanceError,
    continuation,
    coverage,
    log_prob,
    logit,
    logit_diff,
    mean_embedding,
    propagate,
    random_tokens,
)
from tests.classifiers import CLASSIFIERS, IMAGES, build_classifier, build_encoder, inputs_for
from tests.engine.families import RULESETS, close, reference_for, unexplained, whole, zero_all_that_keeps
from tests.models import build_gpt2
from tests.precision import no_upcasts

FAMILY = pytest.mark.parametrize("family", CLASSIFIERS)
TARGET = logit_diff("cat", "horse")


@FAMILY
def test_every_ruleset_conserves_and_leaves_the_forward_alone(family: str) -> None:
    model, (inputs, other) = build_classifier(family), inputs_for(family)
    with torch.no_grad():
        logits = model(inputs)
    assert logits.shape == (2, 5)
    for rules in RULESETS:
        cache = propagate(model, inputs, TARGET, rules=rules, reference=reference_for(rules, other), audit=True)
        assert torch.equal(cache.logits, logits), rules
        close(cache.value, logits[:, 0] - logits[:, 2], 1e-12)
        assert unexplained(cache) < 1e-5, rules
        with no_upcasts():
            cache = propagate(model, inputs, TARGET, rules=rules, reference=reference_for(rules, other), audit=True)
        assert unexplained(cache) < 1e-9, rules
        assert float(cache.tokens().abs().sum()) > 0
        if rules == "deeplift":
            close(cache.residual().sum(1), whole(cache).unsqueeze(1).expand(-1, 3), 1e-9)
            close(whole(cache), cache.value - (model(other)[:, 0] - model(other)[:, 2]), 1e-6)


@FAMILY
def test_cp_lrp_conserves_without_biases(family: str) -> None:
    """Down to the embeddings, of which an image's class token and positions are a part, a text's positions are not."""
    with no_upcasts():
        model, (inputs, _) = build_classifier(family), inputs_for(family)
        zero_all_that_keeps(model)
        if "bert" in family:  # the pooler's activation has no share of its own: tanh(0) = 0
            with torch.no_grad():
                for name, parameter in model.original_model.named_parameters():
                    if "position_embeddings" in name or "token_type" in name:
                        parameter.zero_()
        cache = propagate(model, inputs, logit("dog"), rules="cp_lrp")
    close(cache.tokens().sum(1), cache.value, 1e-9)
    close(cache.residual().sum(1), cache.value.unsqueeze(1).expand(-1, 3), 1e-9)


@FAMILY
def test_coverage_proves_every_site_live(family: str) -> None:
    found = coverage(build_classifier(family, torch.float32), ["attnlrp", "deeplift"])
    assert not found.uncovered
    assert found.rulesets["works"].equals(found.rulesets["applies"]), found.rulesets
    assert found.sites["live"].all(), found.sites.loc[~found.sites["live"]]
    assert {"unembed" if family in IMAGES else "pooler:activation"} <= set(found.sites["site"])


@FAMILY
def test_a_class_goes_by_name_or_by_number(family: str) -> None:
    model, (inputs, other) = build_classifier(family), inputs_for(family)
    by_name = propagate(model, inputs, logit("bird"))
    close(by_name.tokens(), propagate(model, inputs, logit(3)).tokens(), 1e-12)
    assert by_name.info["target"] == "logit('bird')" == propagate(model, inputs, logit(torch.tensor([3, 3]))).info["target"][:-5] + ")"
    probable = propagate(model, inputs, log_prob("bird"), rules="deeplift", reference=other)
    close(probable.value, model(inputs).log_softmax(-1)[:, 3], 1e-12)
    close(probable.residual().sum(1)[:, -1], whole(probable), 1e-9)
    top = model(inputs).topk(2, -1).values
    close(propagate(model, inputs).value, top[:, 0] - top[:, 1], 1e-12)
    for target, message in (
        (logit(5), "answer 5 is none of the 5 classes"),
        (logit("do"), "answer 'do' is not a class of this model; it knows 'dog'"),
        (logit("whale"), "it knows 'cat', 'dog', 'horse', 'bird', 'fish'"),
        (continuation([1, 2]), "nothing follows the inputs of a classifier"),
        (logit("cat", position=1), "outside the prompt"),
    ):
        with pytest.raises(RelevanceError, match=message):
            propagate(model, inputs, target)


def test_classes_of_the_same_name_are_told_apart_by_number() -> None:
    """ImageNet has two cranes."""
    model, (inputs, _) = build_classifier("vit"), inputs_for("vit")
    model.original_model.config.id2label = {0: "crane", 1: "dog", 2: "horse", 3: "crane", 4: "fish"}
    with pytest.raises(RelevanceError, match=r"'crane' is the name of the classes \[0, 3\]; give a number"):
        propagate(model, inputs, logit("crane"))
    assert propagate(model, inputs, logit(3)).info["target"] == "logit('crane')"


@pytest.mark.parametrize("family", IMAGES)
def test_patches_lie_where_they_lie_in_the_image(family: str, tmp_path: Any) -> None:
    """A change of one patch is all that a pair of images differs in, so that everything is in its place of the grid."""
    model, (image, _) = build_classifier(family), inputs_for(family)
    other = image.clone()
    other[:, :, 4:8, 8:12] += 1
    with no_upcasts():
        cache = propagate(model, image, TARGET, rules="deeplift", reference=other)
    patches = cache.patches()
    assert patches.shape == (2, 2, 3) and cache.tokens().shape == (2, 8 if family == "deit" else 7)
    close(patches[:, 1, 2], whole(cache), 1e-9)
    assert int((patches != 0).sum()) == 2
    assert cache.heads().shape[:2] == cache.tokens().shape
    cache.save(tmp_path / "cache.safetensors")
    assert torch.equal(RelevanceCache.load(tmp_path / "cache.safetensors").patches(), patches)


def test_a_model_of_tokens_has_no_patches() -> None:
    with pytest.raises(NotKeptError, match="patches are those of an image classifier"):
        propagate(build_gpt2(), torch.tensor([[1, 2, 3]]), logit(3)).patches()


def test_a_single_image_is_one_row() -> None:
    model, (images, other) = build_classifier("vit"), inputs_for("vit")
    alone = propagate(model, images[0], TARGET, rules="deeplift", reference=other[0])
    together = propagate(model, {"pixel_values": images}, TARGET, rules="deeplift", reference={"pixel_values": other})
    close(alone.tokens(), together.tokens()[:1], 1e-9)


def test_images_are_compared_with_images() -> None:
    model, (images, _) = build_classifier("vit"), inputs_for("vit")
    for given in (mean_embedding(), random_tokens(2)):
        with pytest.raises(RelevanceError, match="called with none: give another image as the reference"):
            propagate(model, images, TARGET, reference=given)
    with no_upcasts():
        for reference in (torch.zeros_like(images), images.mean((2, 3), keepdim=True).expand_as(images)):
            cache = propagate(model, images, TARGET, reference=reference)
            close(cache.tokens().sum(1), whole(cache), 1e-9)
            assert float(cache.tokens()[:, 0].abs().max()) == 0  # the class token is the same in both
    with pytest.raises(RelevanceError, match="pixel_values.*of the same shapes"):
        propagate(model, images, TARGET, reference=images[:1])


@pytest.mark.parametrize(
    "given, message",
    [
        (torch.tensor([[1, 2, 3]]), "takes images .batch, channel, height, width.*int64 of shape .1, 3."),
        ("a cat", "takes images .*got str"),
        (torch.zeros(8, 12), "takes images .*of shape .8, 12."),
    ],
)
def test_what_is_no_image_is_refused(given: Any, message: str) -> None:
    with pytest.raises(RelevanceError, match=message):
        propagate(build_classifier("vit", torch.float32), given, TARGET)


def test_patches_that_are_masked_have_no_relevance() -> None:
    """ViT takes a mask over the class token and the patches, and hands it to its attention by position."""
    model, (images, other) = build_classifier("vit"), inputs_for("vit")
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1]] * 2)
    with no_upcasts():
        cache = propagate(model, images, TARGET, rules="deeplift", reference=other, attention_mask=mask, audit=True)
    close(cache.logits, model(images, attention_mask=mask), 1e-6)
    assert float((cache.logits - model(images)).detach().abs().max()) > 1e-3
    assert unexplained(cache) < 1e-9 and float(cache.tokens()[:, 3:5].abs().max()) == 0
    close(cache.tokens().sum(1), whole(cache), 1e-9)


def test_padding_of_a_text_has_no_relevance_and_changes_none() -> None:
    model, (tokens, other) = build_classifier("bert_classifier", torch.float32), inputs_for("bert_classifier")
    short, other = tokens[:1, :4], other[:1, :4]
    padded, padded_other = (torch.cat([t, torch.full((1, 2), 9)], 1) for t in (short, other))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    for rules in ("attnlrp", "cp_lrp", "relp", "deeplift"):
        alone = propagate(model, short, TARGET, rules=rules, reference=reference_for(rules, other))
        together = propagate(
            model,
            padded,
            TARGET,
            rules=rules,
            names_filter=lambda _: True,
            reference=reference_for(rules, padded_other),
            attention_mask=mask,
        )
        close(together.tokens()[:, :4], alone.tokens(), 1e-4)
        assert float(together.tokens()[:, 4:].abs().max()) == 0
        close(together["classifier.hook_in"].sum(-1), together["pooler.hook_out"].sum(-1), 1e-6)


def test_what_is_pooled_has_one_row_per_text_with_several_references() -> None:
    """Its [batch, d] is not taken for positions that were folded into the batch, which 4 references of 4 tokens would suggest."""
    model, tokens = build_classifier("bert_classifier"), inputs_for("bert_classifier")[0][:, :4]
    cache = propagate(model, tokens, TARGET, reference=random_tokens(4), names_filter=["pooler.hook_out", "embed.hook_out"])
    assert cache["pooler.hook_out"].shape == (2, 16)
    close(cache["pooler.hook_out"].sum(1), whole(cache), 1e-9)


@pytest.mark.parametrize(
    "fault, message",
    [
        ("decorative", "pooler:activation .* was bypassed"),
        ("dropped", "pooler:activation .*pooler.dense.hook_out -> pooler.hook_out"),
        ("twice", "pooler.dense.hook_out fired twice before pooler.hook_out did"),
    ],
)
def test_a_pooler_whose_hook_points_do_not_hold_is_refused(fault: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model goes on with something else than what pooler.hook_out returns, passes it by, or asks its linear layer twice."""
    model, (inputs, _) = build_classifier("bert_classifier"), inputs_for("bert_classifier")
    pooler, dense = model.pooler, model.pooler.dense

    def forward(_: object, hidden: torch.Tensor) -> torch.Tensor:
        projected = dense(hidden[:, 0])
        if fault == "twice":
            projected = dense(hidden[:, 0])
        pooled = torch.tanh(projected)
        if fault == "dropped":
            return pooled
        seen = pooler.hook_out(pooled)
        return pooled if fault == "decorative" else seen

    monkeypatch.setattr(type(pooler), "forward", forward)
    with pytest.raises(LivenessError, match=message):
        propagate(model, inputs, TARGET, rules="attnlrp", check=False)


def test_a_model_without_a_head_has_no_logits_and_is_covered_all_the_same() -> None:
    model, (tokens, _) = build_encoder(), inputs_for("bert_classifier")
    for target in (logit(3), None):
        with pytest.raises(RelevanceError, match="no head.*explain similarity"):
            propagate(model, tokens, target)
    found = coverage(model, ["attnlrp", "deeplift"])
    assert found.rulesets["works"].equals(found.rulesets["applies"]) and found.sites["live"].all()


def test_a_classifier_of_one_class_is_explained_by_its_score() -> None:
    config = transformers.BertConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)
    config.num_labels = 1
    model = bridge_encoder(random_model(transformers.BertForSequenceClassification, config, torch.float64))
    tokens = inputs_for("bert_classifier")[0]
    with torch.no_grad():
        close(propagate(model, tokens).value, model(tokens)[:, 0], 1e-12)
    assert coverage(model, ["attnlrp"]).rulesets["works"].all()


def test_a_text_classifier_can_be_patched() -> None:
    """Its logits [batch, class] are at one position for the analyses too: a head's effect is that of a forward with the other's z."""
    model, (tokens, other) = build_classifier("bert_classifier"), inputs_for("bert_classifier")
    effects = activation_patching(model, PromptPairs(tokens, other, TARGET), "z")
    with torch.no_grad():
        _, kept = model.run_with_cache(tokens)

        def exchange(z: torch.Tensor, hook: Any) -> torch.Tensor:
            z[:, :, 2] = kept["blocks.1.attn.hook_z"][:, :, 2]
            return z

        patched = model.run_with_hooks(other, fwd_hooks=[("blocks.1.attn.hook_z", exchange)])
        moved = patched - model(other)
    table = effects.to_dataframe()
    row = table[(table["layer"] == 1) & (table["head"] == 2)]
    assert float(row["effect"].iloc[0]) == pytest.approx(float((moved[:, 0] - moved[:, 2]).mean()), rel=1e-6)


def test_a_pooler_that_is_not_known_is_refused_by_name() -> None:
    model, (inputs, _) = build_classifier("bert_classifier", torch.float32), inputs_for("bert_classifier")
    model.original_model.bert.pooler.original_component.activation = None
    with pytest.raises(RelevanceError, match="pooler: the linear layer and the activation of BertPooler were not found"):
        propagate(model, inputs, TARGET)


def test_token_classes() -> None:
    """A class at each position: `position` chooses, and the number of a class is checked."""
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_labels=3
    )
    model = bridge_encoder(random_model(transformers.BertForTokenClassification, config, torch.float64))
    tokens, other = inputs_for("bert_classifier")
    cache = propagate(model, tokens, logit("LABEL_1", position=2), reference=other, audit=True)
    close(cache.value, model(tokens)[:, 2, 1], 1e-12)
    close(cache.residual().sum(1), whole(cache).unsqueeze(1).expand(-1, 3), 1e-9)
    assert unexplained(cache) < 1e-9
    with pytest.raises(RelevanceError, match="none of the 3 classes"):
        propagate(model, tokens, logit(7))
