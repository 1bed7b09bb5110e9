"""Whisper tiny.en, and sentences spoken by a synthesiser.

Its makers list 8 of the 24 heads of the decoder that read the encoder as `alignment_heads`: their attention follows the sound in time, and
word-level timestamps are computed from it (openai/whisper, MIT; also in the model's generation_config.json).

The model writes each sentence down, and what is explained is the log-probability of what it wrote. The counterpart hears another sentence.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from jaxtyping import Float
from scipy.io import wavfile
from scipy.signal import resample_poly
from scipy.stats import rankdata
from torch import Tensor
from transformers import AutoModelForSpeechSeq2Seq, PreTrainedModel, WhisperFeatureExtractor

from analyses.evaluation.agreement import correlation
from analyses.known_roles.cases import Case, Written
from analyses.known_roles.whisper import hooked_decoder
from lens_relevance import RelevanceError, propagate
from lens_relevance.sites import HookedModule, anatomy
from lens_relevance.sites.token_sets import ENCODER

KNOWN = ((1, 0), (2, 0), (2, 5), (3, 0), (3, 1), (3, 2), (3, 3), (3, 4))
START, END = (50257, 50362), 50256  # start of the transcript without timestamps; end of the text
RATE, FRAMES_PER_SECOND, LONGEST = 16_000, 50, 40
SENTENCES = (
    "My father bought a red bicycle in the market last Sunday.",
    "Please put the heavy boxes behind the kitchen door.",
    "The doctor told her patient to drink more water.",
    "Our train was late because of the snow.",
    "Two birds were singing in the old apple tree.",
    "The farmer sold three horses and a small black dog.",
    "Nobody knew where the captain had hidden the money.",
    "In winter the lake is covered with thick ice.",
    "She wrote a long letter to her sister in London.",
    "The children built a castle of sand on the beach.",
    "He forgot his umbrella in the bus this morning.",
    "A loud noise woke the whole family at midnight.",
    "The teacher opened the window and closed the book.",
    "We need seven eggs and a little sugar for the cake.",
    "The river runs through the town and under a bridge.",
    "My grandmother tells the best stories in the world.",
    "They painted the front door of the house green.",
    "The museum is closed on Monday and on Friday.",
    "A young man with a guitar sat near the station.",
    "The soup was too hot, so we waited a few minutes.",
    "Every student must bring a pencil and some paper.",
    "The moon was bright above the quiet village.",
    "I would like to buy two tickets for the concert.",
    "The mouse ran under the table and ate the cheese.",
)


def load_whisper(folder: Path) -> PreTrainedModel:
    """Whisper tiny.en from a folder in Hugging Face format.

    Raises:
        RelevanceError: there is no such folder, or the synthesiser espeak-ng is not installed.
    """
    if not (folder / "config.json").is_file():
        raise RelevanceError(f"{folder} is not a folder of Whisper tiny.en in Hugging Face format: it holds no config.json")
    if shutil.which("espeak-ng") is None:
        raise RelevanceError("the sentences are spoken by espeak-ng, which is not installed (Debian: apt-get install espeak-ng)")
    return AutoModelForSpeechSeq2Seq.from_pretrained(folder).eval()


def spoken(text: str) -> np.ndarray:
    """The samples of a sentence, at 16 kHz."""
    with TemporaryDirectory() as folder:  # a header that goes to a pipe does not know the length
        sound = Path(folder) / "sound.wav"
        subprocess.run(["espeak-ng", "-v", "en-us", "-s", "150", "-w", str(sound), text], capture_output=True, check=True)
        rate, samples = wavfile.read(sound)
    return resample_poly(samples.astype(np.float32) / 2**15, RATE, rate)


@torch.no_grad()
def listening(model: PreTrainedModel, sentences: tuple[str, ...]) -> tuple[HookedModule, list[Case], list[list[int]]]:
    """The decoder, ready for relevance, a case for each sentence, and what the model wrote for each.

    The encoder runs once for each sentence; its heads are not asked about.
    """
    listener = WhisperFeatureExtractor()
    samples = [spoken(text) for text in sentences]
    sounds = [listener(one, sampling_rate=RATE, return_tensors="pt").input_features for one in samples]
    states = [model.model.encoder(sound).last_hidden_state for sound in sounds]
    texts = [_written(model, one) for one in states]
    decoder = hooked_decoder(model, states[0])
    cases = []
    for i, (heard, text, sound) in enumerate(zip(states, texts, samples, strict=True)):
        ids = torch.tensor([[*START, *text[:-1]]])
        at = torch.arange(len(START) - 1, ids.shape[1]).unsqueeze(0)
        inputs = {"input_features": heard, "decoder_input_ids": ids}
        other = {"input_features": states[(i + 1) % len(states)], "decoder_input_ids": ids}
        target = Written(at, torch.tensor([text]))
        cases.append(Case(inputs, other, target, _follows(decoder, inputs, target, len(sound))))
    return decoder, cases, texts


def _written(model: PreTrainedModel, states: Tensor) -> list[int]:
    """What the model writes, the most likely token at each step, up to and with the end of the text."""
    ids = [*START]
    while ids[-1] != END and len(ids) < LONGEST:
        logits = model(encoder_outputs=(states,), decoder_input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(START) :]


def _follows(model: HookedModule, inputs: dict[str, Tensor], target: Written, n_samples: int) -> Float[Tensor, "1 layer head"]:
    """How well each head's attention follows the sound: Spearman's correlation of the frame it looks at most with the word's place.

    Only frames with sound count, and positions that predict a word.
    """
    names = [one.pattern for one in anatomy(model).attentions if one.sources == ENCODER]
    with torch.enable_grad():
        cache = propagate(model, inputs, target, rules="gradient", names_filter=names)
    frames = n_samples * FRAMES_PER_SECOND // RATE
    words = slice(len(START) - 1, inputs["decoder_input_ids"].shape[1] - 1)  # the last position predicts the end
    looked = torch.stack([cache.activations[name][0, :, words, :frames].argmax(-1) for name in names])
    by_head = rankdata(looked.flatten(0, 1).numpy(), axis=1)
    found = correlation(by_head, np.broadcast_to(np.arange(by_head.shape[1]), by_head.shape))
    found = np.nan_to_num(found)  # a head that looks at one frame only follows nothing
    return torch.tensor(found, dtype=torch.float32).reshape(1, *looked.shape[:2])
