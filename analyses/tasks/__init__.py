"""Prompt pairs with a target. Every task fits its words to the tokenizer of the model it is given, or says why it cannot."""

from collections.abc import Callable

from analyses.tasks.agreement_task import agreement
from analyses.tasks.arithmetic_task import arithmetic_addition, arithmetic_subtraction
from analyses.tasks.docstring_task import docstring
from analyses.tasks.greater_than_task import greater_than
from analyses.tasks.induction_task import induction
from analyses.tasks.ioi_task import ioi
from analyses.tasks.mcqa_task import mcqa
from analyses.tasks.pairs import PromptPairs
from analyses.tasks.pronoun_task import pronoun
from analyses.tasks.question_answering_task import question_answering

TASKS: dict[str, Callable[..., PromptPairs]] = {
    "ioi": ioi,
    "induction": induction,
    "greater_than": greater_than,
    "agreement": agreement,
    "pronoun": pronoun,
    "docstring": docstring,
    "mcqa": mcqa,
    "question_answering": question_answering,
    "arithmetic_addition": arithmetic_addition,
    "arithmetic_subtraction": arithmetic_subtraction,
}
"""Every task by name; all take (model, n, seed)."""

__all__ = [
    "TASKS",
    "PromptPairs",
    "agreement",
    "arithmetic_addition",
    "arithmetic_subtraction",
    "docstring",
    "greater_than",
    "induction",
    "ioi",
    "mcqa",
    "pronoun",
    "question_answering",
]
