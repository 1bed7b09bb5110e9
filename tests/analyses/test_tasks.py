"""Each task: what its prompts, answers and corruptions are, checked on the token ids and texts themselves."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.tasks import TASKS, PromptPairs, agreement, arithmetic_addition, docstring, greater_than, induction, ioi, mcqa, pronoun
from analyses.tasks.agreement_task import NOUNS, VERBS
from analyses.tasks.docstring_task import ARGUMENTS, WORDS
from analyses.tasks.fitting import ends_differently, single_token_words
from analyses.tasks.ioi_task import NAMES, TEMPLATES
from analyses.tasks.mcqa_task import COLORS, OBJECTS
from lens_relevance.errors import RelevanceError
from tests.models import build_with_words

IOI_WORDS = "When and went to the store gave a drink to Mary John Tom Anna James".split()


def words(text: str) -> list[str]:
    return text.replace(",", "").split()


def names(text: str) -> list[str]:
    return [word for word in words(text) if word in NAMES]


def test_every_task_takes_a_model_a_number_and_a_seed() -> None:
    for name, task in TASKS.items():
        assert task.__name__ == name
        assert list(inspect.signature(task).parameters)[:3] == ["model", "n", "seed"]


@pytest.mark.parametrize("name", ["ioi", "induction"])
def test_a_seed_gives_the_same_rows_again_and_another_seed_others(embedded: TransformerBridge, name: str) -> None:
    first, again, other = (TASKS[name](embedded, 8, seed) for seed in (1, 1, 2))
    assert torch.equal(first.clean, again.clean) and torch.equal(first.corrupt, again.corrupt)
    assert torch.equal(first.target.answer, again.target.answer)
    assert not torch.equal(first.clean, other.clean)


def test_ioi_swap_asks_for_the_name_that_is_not_repeated(embedded: TransformerBridge) -> None:
    pairs = ioi(embedded, 40)
    assert pairs.dropped == ()
    assert ((pairs.clean != pairs.corrupt).sum(1) == 1).all()
    orders = []
    for row in pairs.to_frame(embedded).itertuples():
        first, second, repeated = names(row.clean)
        assert repeated in (first, second) and first != second
        assert row.answer == (second if repeated == first else first) and row.wrong == repeated
        assert names(row.corrupt) == [first, second, row.answer]
        orders.append(repeated == second)
    assert sum(orders) == 20  # ABBA in half of the rows, BABA in the other


def test_ioi_abc_leaves_no_answer(embedded: TransformerBridge) -> None:
    for row in ioi(embedded, 20, corruption="abc").to_frame(embedded).itertuples():
        others = names(row.corrupt)
        assert len(set(others)) == 3 and not set(others) & set(names(row.clean))


def test_ioi_draws_from_the_name_pairs_it_is_given(embedded: TransformerBridge) -> None:
    frame = ioi(embedded, 30, name_pairs=[("Mary", "John"), ("Tom", "Anna")]).to_frame(embedded)
    assert {frozenset(names(text)) for text in frame["clean"]} == {frozenset(("Mary", "John")), frozenset(("Tom", "Anna"))}
    assert set(frame["answer"]) == {"Mary", "John", "Tom", "Anna"}


def test_ioi_templates_have_one_length_in_words() -> None:
    assert {len(template.replace(",", " ,").split()) for template in TEMPLATES} == {14}


def test_ioi_drops_what_the_tokenizer_does_not_know_and_says_what(tmp_path: Path) -> None:
    pairs = ioi(build_with_words(tmp_path, IOI_WORDS), 10)
    assert {"Lucy", "park", "book"} < set(pairs.dropped)
    assert not {"Mary", "store", "drink"} & set(pairs.dropped)
    assert TEMPLATES[0] not in pairs.dropped and set(TEMPLATES[1:]) <= set(pairs.dropped)
    assert pairs.clean.shape == (10, 15)


def test_ioi_answers_are_tokens_with_a_leading_space(tmp_path: Path) -> None:
    model = build_with_words(tmp_path, IOI_WORDS)
    assert model.to_single_token(" Mary") != model.to_single_token("Mary")
    spaced = {model.to_single_token(f" {name}") for name in IOI_WORDS[-5:]}
    assert set(ioi(model, 20).target.answer.tolist()) <= spaced


def test_ioi_takes_templates_of_the_most_common_length_only(embedded: TransformerBridge) -> None:
    longer = f"Yesterday, w{TEMPLATES[0][1:]}"
    assert ioi(embedded, 4, templates=[*TEMPLATES[:2], longer]).dropped == (longer,)


def test_ioi_says_why_it_does_not_fit(stories: TransformerBridge, gpt2: TransformerBridge) -> None:
    with pytest.raises(RelevanceError, match="too few names are single tokens"):
        ioi(stories)
    with pytest.raises(RelevanceError, match="no tokenizer"):
        ioi(gpt2)


@pytest.mark.parametrize("length", [6, 7, 16])
def test_induction_answers_follow_the_earlier_occurrence(embedded: TransformerBridge, gpt2: TransformerBridge, length: int) -> None:
    for model, start in ((embedded, 1), (gpt2, 0)):
        pairs = induction(model, 10, length=length)
        assert pairs.clean.shape == (10, start + length + length // 2)
        assert ((pairs.clean != pairs.corrupt).sum(1) == 2).all()
        for clean, corrupt, answer, wrong in zip(
            pairs.clean.tolist(), pairs.corrupt.tolist(), pairs.target.answer.tolist(), pairs.target.wrong.tolist(), strict=True
        ):
            last = clean[-1]
            assert corrupt[-1] == last
            assert clean[clean.index(last) + 1] == answer and corrupt[corrupt.index(last) + 1] == wrong
            assert answer != wrong and clean.count(answer) == corrupt.count(answer) == clean.count(wrong) == 1
            assert clean[start + length :] == clean[start : start + length // 2] == corrupt[start + length :]


def test_induction_leaves_special_tokens_alone_and_checks_the_length(embedded: TransformerBridge) -> None:
    assert not set(induction(embedded, 50).clean[:, 1:].flatten().tolist()) & set(embedded.tokenizer.all_special_ids)
    for length, message in ((5, "at least 6"), (400, "context holds")):
        with pytest.raises(RelevanceError, match=message):
            induction(embedded, length=length)


@pytest.fixture
def years_model(tmp_path: Path) -> TransformerBridge:
    return build_with_words(tmp_path, "The war siege lasted from the year to".split())


def test_greater_than_prompts_end_in_the_century(years_model: TransformerBridge) -> None:
    pairs = greater_than(years_model, 20)
    assert "voyage" in pairs.dropped and "war" not in pairs.dropped
    for row in pairs.to_frame(years_model).itertuples():
        start, century = words(row.clean)[6], words(row.clean)[-1]
        assert start[:2] == century and 2 <= int(start[2:]) <= 98
        assert row.corrupt == row.clean.replace(start, f"{century}01")


def test_greater_than_is_the_probability_of_later_years_less_that_of_the_others(years_model: TransformerBridge) -> None:
    pairs = greater_than(years_model, 6)
    frame = pairs.to_frame(years_model)
    logits = torch.randn(*pairs.clean.shape, years_model.cfg.d_vocab)
    probability = logits[:, -1].softmax(-1)
    expected = []
    for row, text in enumerate(frame["clean"]):
        start = int(words(text)[6][2:])
        terms = [probability[row, years_model.to_single_token(f"{year:02d}")] * (1 if year > start else -1) for year in range(100)]
        expected.append(torch.stack(terms).sum())
    metric = pairs.metric(years_model)
    torch.testing.assert_close(metric(logits), torch.stack(expected))
    part = pairs[[4, 1]]
    torch.testing.assert_close(part.metric(years_model)(logits[[4, 1]]), metric(logits)[[4, 1]])
    with pytest.raises(RelevanceError, match="of 6 rows and was given 2"):
        pairs.target.metric(years_model, part.clean)


def test_greater_than_reads_each_rows_last_real_token(years_model: TransformerBridge) -> None:
    pairs = greater_than(years_model, 2)
    padded, mask = (torch.nn.functional.pad(tensor, (0, 3)) for tensor in (pairs.clean, pairs.clean_mask))
    logits = torch.randn(2, pairs.clean.shape[1] + 3, years_model.cfg.d_vocab)
    expected = pairs.metric(years_model)(logits[:, :-3])
    torch.testing.assert_close(pairs.target.metric(years_model, padded, mask)(logits), expected)


def test_greater_than_says_why_it_does_not_fit(embedded: TransformerBridge) -> None:
    with pytest.raises(RelevanceError, match="'the year 1732' becomes"):
        greater_than(embedded)


def test_agreement_changes_the_number_of_the_subject_alone(tmp_path: Path) -> None:
    every = [word for pair in (*NOUNS[:4], *VERBS) for word in pair]
    model = build_with_words(tmp_path, ["The", "near", "the", "and", *every])
    pairs = agreement(model, 16)
    assert set(pairs.dropped) == {word for pair in NOUNS[4:] for word in pair}
    singulars, plurals = ({pair[number] for pair in NOUNS} for number in (0, 1))
    counts = {True: 0, False: 0}
    for row in pairs.to_frame(model).itertuples():
        (_, subject, *rest), (_, other, *other_rest) = words(row.clean), words(row.corrupt)
        plural = subject in plurals
        counts[plural] += 1
        assert rest == other_rest and other in (singulars if plural else plurals)
        assert (subject, other) in NOUNS or (other, subject) in NOUNS
        verbs = (row.wrong.strip(), row.answer.strip()) if plural else (row.answer.strip(), row.wrong.strip())
        assert verbs in VERBS
    assert counts == {True: 8, False: 8}


CODE = ["def", "self", "param", "and", "(", ")", ":", '"', " "]


@pytest.mark.parametrize("line_breaks", [True, False])
def test_docstring_asks_for_the_next_argument(tmp_path: Path, line_breaks: bool) -> None:
    known = [*CODE, *ARGUMENTS[:6], *WORDS[:12], *(["\n    ", "\n\n    "] if line_breaks else [])]
    model = build_with_words(tmp_path, known, n_ctx=64)
    pairs = docstring(model, 12)
    assert set(pairs.dropped) == (set(ARGUMENTS[6:]) | set(WORDS[12:])) - set(known)
    assert ((pairs.clean != pairs.corrupt).sum(1) == 2).all()
    for row in pairs.to_frame(model).itertuples():
        assert ("\n" in row.clean) == line_breaks
        for text, answer, wrong in ((row.clean, row.answer, row.wrong), (row.corrupt, row.wrong, row.answer)):
            definition, documented = text.split("):")
            arguments = definition.split("self,")[1].replace(",", "").split()
            assert [name for name in words(documented.replace(":", " ")) if name in arguments] == arguments[:2]
            assert (arguments[2], arguments[3]) == (answer.strip(), wrong.strip()) and len(set(arguments)) == 4
            assert documented.endswith(":param")


def test_docstring_says_why_it_does_not_fit(tmp_path: Path, embedded: TransformerBridge) -> None:
    with pytest.raises(RelevanceError, match="too few other words are single tokens .not: river"):
        docstring(embedded)
    with pytest.raises(RelevanceError, match="does not fit this tokenizer: it reads"):
        docstring(build_with_words(tmp_path, [*ARGUMENTS, *WORDS, "and"], n_ctx=64))


def test_pronoun_on_a_trained_model(stories: TransformerBridge) -> None:
    pairs = pronoun(stories, 32)
    frame = pairs.to_frame(stories)
    for row in frame.itertuples():
        assert ("girl" in row.clean, "girl" in row.corrupt) == ((True, False) if row.answer == "she" else (False, True))
    assert (frame["answer"] == "she").sum() == 16
    assert len(set(frame["clean"] + frame["corrupt"])) == 32
    assert difference(stories, pairs).mean() > 1  # logits; the model knows the task


def test_ioi_and_induction_on_the_embedded_model(embedded: TransformerBridge) -> None:
    for task in (ioi, induction):
        assert difference(embedded, task(embedded, 64)).mean() > 5


def difference(model: TransformerBridge, pairs: PromptPairs) -> torch.Tensor:
    """Metric on clean less metric on corrupt, [n]."""
    metric = pairs.metric(model)
    with torch.no_grad():
        return metric(model(pairs.clean)) - metric(model(pairs.corrupt))


def test_tasks_without_a_fitting_word_list_every_word_they_miss(tmp_path: Path) -> None:
    model = build_with_words(tmp_path, ["and", "key", "keys"])
    with pytest.raises(RelevanceError, match="too few nouns or verbs.*is, are"):
        agreement(model)
    with pytest.raises(RelevanceError, match="she, he"):
        pronoun(model)


def test_words_that_share_a_token_are_not_both_answers(embedded: TransformerBridge) -> None:
    kept, dropped = single_token_words(embedded, ["Mary", "Zaphod", "Mary", "Arthur"])
    assert list(kept) == ["Mary"] and dropped == ["Zaphod", "Arthur"]


@pytest.mark.parametrize("name", ["arithmetic_addition", "arithmetic_subtraction"])
@pytest.mark.parametrize("digits", ["two in a token", "one in a token"])
def test_arithmetic_answers_are_the_first_token_of_the_result(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, digits: str
) -> None:
    one = digits == "one in a token"
    model = request.getfixturevalue("stories") if one else build_with_words(tmp_path, ["+", "-", "=", " "])
    pairs = TASKS[name](model, 20, 3)
    assert len(pairs) == 20 and len({tuple(row) for row in pairs.clean.tolist()}) > 15
    for clean, corrupt, answer, wrong in zip(pairs.clean, pairs.corrupt, pairs.target.answer, pairs.target.wrong, strict=True):
        numbers = []
        for row in (clean, corrupt):
            text = "".join(model.to_str_tokens(row)).replace("<|endoftext|>", "").replace("<s>", "").replace(" ", "").rstrip("=")
            first, second = text.split("+" if name.endswith("addition") else "-")
            numbers.append((int(first), int(first) + int(second) if name.endswith("addition") else int(first) - int(second)))
        (first, right), (also_first, other) = numbers
        assert first == also_first and right // 10 != other // 10 and 10 <= min(right, other) <= max(right, other) < 100
        said, not_said = (model.tokenizer.decode([int(token)]).strip() for token in (answer, wrong))
        assert (said, not_said) == ((str(right // 10), str(other // 10)) if one else (str(right), str(other)))


def test_mcqa_asks_for_the_letter_of_the_colour_named(tmp_path: Path) -> None:
    letters = ["Question", "The", "is", "What", "color", "the", "Answer", "?", ":", "\n", " ", *"ABCD"]
    model = build_with_words(tmp_path, [*letters, *COLORS[:6], *OBJECTS[:5]], n_ctx=64)
    pairs = mcqa(model, 24)
    assert set(COLORS[6:]) <= set(pairs.dropped)
    seen = set()
    for clean, corrupt, answer, wrong in zip(pairs.clean, pairs.corrupt, pairs.target.answer, pairs.target.wrong, strict=True):
        letter, other = (model.tokenizer.decode([int(token)]).strip() for token in (answer, wrong))
        for row, expected in ((clean, letter), (corrupt, other)):
            text = "".join(model.to_str_tokens(row))
            named = text.split(" is ")[1].split(".")[0]
            choices = {line[0]: line[3:] for line in text.split("\n") if line[1:3] == ". "}
            assert sorted(choices) == list("ABCD") and len(set(choices.values())) == 4
            assert choices[expected] == named and text.endswith("Answer:")
        assert letter != other and int((clean != corrupt).sum()) == 2
        seen.add(letter)
    assert seen == set("ABCD")


def test_mcqa_and_arithmetic_say_why_they_do_not_fit(gpt2: TransformerBridge, tmp_path: Path) -> None:
    for task in (mcqa, arithmetic_addition):
        with pytest.raises(RelevanceError, match="no tokenizer"):
            task(gpt2)
    model = build_with_words(tmp_path, ["red", "blue"])
    with pytest.raises(RelevanceError, match="too few colours or objects are single tokens"):
        mcqa(model)
    with pytest.raises(RelevanceError, match="arithmetic_addition does not fit this tokenizer: it writes"):
        arithmetic_addition(model)


def test_ends_differently_leaves_shared_tokens_to_the_prompt(stories: TransformerBridge) -> None:
    prompt, answer, wrong = ends_differently(stories, "47 + 21 =", " 68", " 61") or ([], 0, 0)
    assert stories.tokenizer.decode([answer]) == "8" and stories.tokenizer.decode([wrong]) == "1"
    assert stories.tokenizer.decode(prompt).endswith("6")
    assert ends_differently(stories, "47 + 21 =", " 68", " 68") is None
