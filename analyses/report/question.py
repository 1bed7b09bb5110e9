"""What a report explains: pairs of prompts, what is asked of the model there, and how to say so in words."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.models.structure import check_answers_text, check_answers_words
from analyses.tasks import TASKS, PromptPairs
from analyses.tasks.prompts import check_rows
from lens_relevance import RelevanceError, logit, logit_diff, random_tokens
from lens_relevance.inputs.class_labels import class_names
from lens_relevance.inputs.prompt import Prompt, tokenize
from lens_relevance.inputs.targets import Target, TokenTarget, describe, top_prediction
from lens_relevance.inputs.token_ids import token_ids

N_REFERENCES = 8
_LIKELY = 20  # next tokens that an answer is expected among

_TASK_WORDS = {
    "ioi": "indirect object identification: two names, one of them again, and the model has to say the other one",
    "pronoun": "a story of a girl or a boy, and the model has to go on with the right pronoun",
    "induction": "a sequence that repeats itself, and the model has to say what came next the first time",
    "greater_than": "a span of years, and the model has to end it after it began",
    "docstring": "a function whose arguments are documented in their order, and the model has to name the next one",
    "mcqa": "a question with four answers, and the model has to give the letter of the one that it was told",
    "arithmetic_addition": "a sum of two numbers, and the model has to write the result",
    "arithmetic_subtraction": "a difference of two numbers, and the model has to write the result",
    "agreement": "a subject and a distractor, and the model has to choose the verb that agrees with the subject",
}


@dataclass(frozen=True)
class Question:
    """What is explained.

    Attributes:
        title, words: what it is, in a few words and in a sentence.
        pairs: the prompts that are explained (`clean`) and what each is compared with (`corrupt`); the first is the example that is shown
            token by token.
        baseline: whether there is no counterpart, and pairs hold random words instead.
    """

    title: str
    words: str
    pairs: PromptPairs
    baseline: bool

    @property
    def example(self) -> PromptPairs:
        """The pair that is shown token by token."""
        return self.pairs[slice(0, 1)]

    def target_in_words(self, model: TransformerBridge) -> str:
        """The target of the example."""
        return describe(self.example.target, model)

    def asked(self, model: TransformerBridge) -> list[str]:
        """The example's answer and, if there is one, what it is weighed against; empty where the target is no such question."""
        target = self.example.target
        if not isinstance(target, TokenTarget):
            return []
        rows = [token_ids(model, tokens, 1, what="answer")[0] for tokens in (target.answer, target.wrong) if tokens is not None]
        return [answer_text(model, int(row[0])) for row in rows] if all(len(row) == 1 for row in rows) else []

    def probability(self, model: TransformerBridge) -> float | None:
        """The probability of the answer to the first prompt; None where the target is no single token."""
        pairs = self.example
        if not isinstance(pairs.target, TokenTarget) or len(self.asked(model)) == 0:
            return None
        metric = replace(pairs.target, kind="log_prob", wrong=None).metric(model, pairs.clean, pairs.clean_mask)
        with torch.no_grad():
            return float(metric(model(pairs.clean, attention_mask=pairs.clean_mask)).exp())


def from_task(model: TransformerBridge, task: str | None = None, n: int = 32, *, seed: int = 0) -> Question:
    """Pairs of a task; without a name ioi, or the pronoun task where ioi's names do not fit the tokenizer.

    Raises:
        RelevanceError: an unknown task, or one that does not fit the model.
    """
    check_answers_words(model)
    if task is not None:
        if task not in TASKS:
            raise RelevanceError(f"unknown task {task!r}; there are {', '.join(TASKS)}")
        return _task_question(task, TASKS[task](model, n=n, seed=seed))
    reasons = []
    for name in ("ioi", "pronoun"):
        try:
            return _task_question(name, TASKS[name](model, n=n, seed=seed))
        except RelevanceError as error:
            reasons.append(str(error))
    raise RelevanceError(f"no task fits this model: {'; '.join(reasons)}. Ask about a prompt of your own: --prompt, --answer and --wrong")


def _task_question(name: str, pairs: PromptPairs) -> Question:
    return Question(f"the {name} task", f"{len(pairs)} pairs of {_TASK_WORDS.get(name, name)}", pairs, False)


def from_pairs(pairs: PromptPairs, source: str) -> Question:
    """The user's own pairs; the first row is the example."""
    return Question("your own pairs", f"{len(pairs)} pairs from {source}", pairs, False)


def from_prompt(
    model: TransformerBridge, prompt: str, answer: str | None = None, *, wrong: str | None = None, against: str | None = None
) -> Question:
    """One prompt. Without `against` it is compared with the mean embedding; what is patched, with rows of random words.

    Without an answer the model's top prediction is explained against its runner-up, or against `wrong`.

    Raises:
        RelevanceError: a prompt and a counterpart of different length, or answers that are not one token.
    """
    check_answers_text(model)
    tokens, mask = tokenize(model, prompt)
    target = _target(model, prompt, tokens, mask, answer, wrong)
    if against is not None:
        other, _ = tokenize(model, against)
        if other.shape != tokens.shape:
            pieces = [model.to_str_tokens(text) for text in (prompt, against)]
            raise RelevanceError(
                f"the prompt has {tokens.shape[1]} tokens and the one it is held against {other.shape[1]}; a position must mean the same "
                f"in both: {pieces[0]} and {pieces[1]}"
            )
        return Question("one prompt", "one prompt, held against another", PromptPairs(tokens, other, target), False)
    if tokens.shape[1] < 2:
        raise RelevanceError("the prompt holds nothing but one token, so there is nothing that it could be held against")
    references = random_tokens(N_REFERENCES).run(model, Prompt(tokens, mask)).prompt.tokens
    pairs = PromptPairs(tokens.repeat(N_REFERENCES, 1), references, target)
    words = f"one prompt, held against the mean embedding, and heads and circuits against {N_REFERENCES} rows of random words"
    return Question("one prompt", words, pairs, True)


def _target(
    model: TransformerBridge, prompt: str, tokens: torch.Tensor, mask: torch.Tensor, answer: str | None, wrong: str | None
) -> Target:
    """One token for all rows, since every row is the same prompt."""
    if answer is None:
        with torch.no_grad():
            best = top_prediction(model(tokens, return_type="logits"), tokens, mask)
        if wrong is None:
            return logit_diff(int(best.answer[0]), int(best.wrong[0]))
        answers, wrongs = check_rows(model, [prompt], [prompt], answer=[wrong], wrong=[wrong])
        return logit_diff(int(best.answer[0]), wrongs[0])
    answer = _reading(model, tokens, mask, answer)
    wrong = None if wrong is None else _reading(model, tokens, mask, wrong)
    answers, wrongs = check_rows(model, [prompt], [prompt], answer=[answer], wrong=[answer if wrong is None else wrong])
    return logit(answers[0]) if wrong is None else logit_diff(answers[0], wrongs[0])


@torch.no_grad()
def _reading(model: TransformerBridge, tokens: torch.Tensor, mask: torch.Tensor, text: str) -> str:
    """An answer typed without its leading space is another token than the one with it; warns which of the two is taken."""
    if class_names(model) is not None or text.startswith((" ", "\n", "\t")) or getattr(model, "tokenizer", None) is None:
        return text
    typed, spaced = (model.to_tokens(reading, prepend_bos=False)[0].tolist() for reading in (text, f" {text}"))
    if len(spaced) != 1 or typed == spaced:
        return text
    logits = model(tokens, return_type="logits")[0, int(mask[0].sum()) - 1]
    likely = set(logits.topk(min(_LIKELY, len(logits))).indices.tolist())
    taken, said = choose_reading(text, typed, spaced[0], likely=likely)
    if said:
        warnings.warn(said, stacklevel=2)
    return taken


def choose_reading(text: str, typed: list[int], spaced: int, *, likely: set[int]) -> tuple[str, str]:
    """The answer as typed or with a leading space, and what to say of it: the one that is among the likely tokens, where only one is.

    Args:
        text: As typed, without a space.
        typed: Its tokens.
        spaced: The token of the same with a leading space.
        likely: The model's most likely next tokens.
    """
    single = len(typed) == 1
    if spaced in likely and not (single and typed[0] in likely):
        return f" {text}", f"{text!r} is read as {' ' + text!r}, with a leading space: that is the token which the model expects here"
    if single:
        return text, f"{text!r} is taken as typed, without a leading space; to ask about {' ' + text!r}, another token, write the space"
    return text, ""


def answer_text(model: TransformerBridge, answer: int) -> str:
    """What the model says with an output: a token, or the name of a classifier's class."""
    classes = class_names(model)
    return token_text(model, answer) if classes is None else classes[answer]


def token_text(model: TransformerBridge, token: int) -> str:
    """A token as it stands in a sentence: with its leading space, which decoding one SentencePiece or word-level token loses."""
    if model.tokenizer is None:
        return f"<{token}>"
    piece = model.tokenizer.convert_ids_to_tokens(token)
    if isinstance(piece, str) and piece.startswith("▁"):
        return " " + piece[1:]
    return str(model.tokenizer.decode([token]))
