"""The prompts of `single_prompts`: sentences of five kinds written for it, and texts sampled from a model itself."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

WRITTEN: dict[str, tuple[str, ...]] = {
    "factual": (
        "The Eiffel Tower is in the city of",
        "The capital of Italy is the city of",
        "The largest planet in the solar system is",
        "The language that people speak in Brazil is",
        "The chemical symbol for gold is",
        "The Great Wall is a monument in",
        "The man who wrote Romeo and Juliet was William",
        "Water boils at one hundred degrees",
        "The opposite of hot is",
        "The currency of Japan is the",
        "The first month of the year is",
        "The river that flows through London is the",
    ),
    "pronoun": (
        "Anna lost her keys, so Anna asked her brother whether",
        "The king was old, and the people loved",
        "My sister bought a car because",
        "The actress smiled when the director praised",
        "Tom fell from the tree and broke",
        "The boys were hungry, so the cook fed",
        "Maria opened the window because",
        "The queen sat down and took off",
        "My uncle works at a bank, and every day",
        "When the nurse came home, her husband kissed",
        "Peter washed the dishes before",
        "The girls won the game and lifted",
    ),
    "agreement": (
        "The keys to the old cabinet",
        "The author of the two books",
        "The flowers in the garden of my neighbor",
        "The dog that chased the cats",
        "The pictures on the wall of the office",
        "The teacher of the young children",
        "The trees behind the little house",
        "The car with the broken windows",
        "The players on the winning team",
        "The price of the new houses",
        "The letters from my best friend",
        "The box of old photographs",
    ),
    "ioi": (
        "When Mary and John went to the store, John gave a drink to",
        "After Alice and Bob had dinner, Bob sent a letter to",
        "Then Tom and Sarah talked, and Sarah handed a book to",
        "When Paul and Emma met in the park, Paul showed a picture to",
        "While David and Lucy were at work, David lent a pen to",
        "After Kate and James left the house, James threw the keys to",
        "When Peter and Laura sat at the table, Laura passed the salt to",
        "Then Mark and Julia went home, and Mark told a story to",
        "As Henry and Jane walked to school, Jane offered an apple to",
        "When Susan and Frank were on the train, Frank sold a ticket to",
        "After George and Helen played chess, Helen gave a prize to",
        "While Adam and Ruth waited, Ruth read a poem to",
    ),
    "continuation": (
        "Monday, Tuesday, Wednesday, Thursday,",
        "one two three four five",
        "A B C D A B C",
        "Once upon a time, there was a little",
        "Thank you very much for your",
        "The children were tired, so they went to",
        "It was raining, so she took her",
        "He sat down at the piano and began to",
        "red green blue red green",
        "January, February, March, April,",
        "She put the letter in an envelope and wrote the",
        "The baker put the bread into the",
    ),
}


def written() -> list[tuple[str, str]]:
    """(kind, prompt) of all written prompts, the kinds by turns."""
    return [(kind, prompts[i]) for i in range(len(WRITTEN["factual"])) for kind, prompts in WRITTEN.items()]


@torch.no_grad()
def sampled(model: TransformerBridge, texts: int, length: int, *, seed: int) -> Int[Tensor, "text pos"]:
    """Texts of the model's own, from BOS, at temperature 1."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((texts, 1), model.tokenizer.bos_token_id)
    while tokens.shape[1] < length:
        probabilities = model(tokens, return_type="logits", use_cache=False)[:, -1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], 1)
    return tokens
