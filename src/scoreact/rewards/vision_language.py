"""Rewards by models that read: a yes or no of any image-text-to-text model, and how well a wanted text can be read.

Both see pictures rounded to 8 bits, as their users give them, and have no gradient. Sources: Lin et al. 2024, VQAScore,
arXiv 2404.01291 (t2v_metrics, `clip_t5_model.py`, has the question); Liu et al. 2025, Flow-GRPO, arXiv 2505.05470
(flow_grpo, `ocr.py`) for the accuracy of a text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..support.errors import RewardError
from ..types import Condition
from .base import name_of, reward_dtype
from .image import check_images, to_bytes
from .text_image import dtype_of, in_parts_of, pretrained
from .user import UserReward, adapt, from_spec

QUESTION = 'Does this figure show "{}"? Please answer yes or no.'


def pictures(images: Tensor) -> list[Image.Image]:
    """[B, 1 or 3, H, W] in [0, 1], clipped and rounded to 8 bits, as B RGB pictures."""
    check_images(images)
    return [Image.fromarray(x.permute(1, 2, 0).contiguous().numpy()) for x in to_bytes(images).expand(-1, 3, -1, -1)]


class VQAScore:
    """R = p(answer | picture, question about the prompt), by a transformers image-text-to-text model.

    question: with {} for the prompt, put into the model's chat template if it has one; without one, write the model's own
    picture token there. answer: its first token's probability is taken. against: another answer, and R is then the share
    of `answer` among the two. log: log R instead; with kl_weight 1 the optimum is the model's posterior given the answer.
    Samples [B, 1 or 3, H, W] in [0, 1] -> [B], float32. path: a folder or hub id with model and processor.
    """

    name = "vqa"
    differentiable = False

    def __init__(
        self,
        path: str = "llava-hf/llava-1.5-7b-hf",
        question: str = QUESTION,
        answer: str = "Yes",
        against: str = "",
        log: bool = False,
        dtype: str = "float32",
        batch_size: int = 4,
    ) -> None:
        if "{}" not in question:
            raise RewardError(f"reward vqa: question {question!r} lacks the place of the prompt; write {{}} there.")
        self.dtype, self.batch_size = dtype_of(self.name, dtype, batch_size), batch_size
        self.question, self.log = question, log
        self.processor = pretrained(self.name, "AutoProcessor", path)
        self.model = (
            pretrained(self.name, "AutoModelForImageTextToText", path).to(self.dtype).eval().requires_grad_(False)
        )
        self.processor.tokenizer.padding_side = "right"  # what follows a token then cannot change it
        self.answers = [self._first_token(word) for word in (answer, against) if word]
        if len(set(self.answers)) < len(self.answers):
            raise RewardError(f"reward vqa: {answer!r} and {against!r} begin with the same token; give other answers.")

    def _first_token(self, word: str) -> int:
        return int(self.processor.tokenizer(word, add_special_tokens=False).input_ids[0])

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        self.model.to(samples.device)
        scores = [
            self._score(pictures(samples[i : i + self.batch_size]), prompts)
            for i, prompts in in_parts_of(condition.prompts, self.batch_size)
        ]
        return torch.cat(scores).to(reward_dtype(samples))

    def _score(self, seen: list[Image.Image], prompts: Sequence[str]) -> Tensor:
        text = [self.asked(prompt) for prompt in prompts]
        inputs = self.processor(images=[[x] for x in seen], text=text, padding=True, return_tensors="pt")
        inputs = inputs.to(self.model.device, self.dtype)  # casts the pixels, not the ids
        last = inputs.attention_mask.sum(1) - 1
        if self.model.config.is_encoder_decoder:  # the answer is then the first that the decoder says
            start = self.model.generation_config.decoder_start_token_id
            inputs["decoder_input_ids"] = torch.full((len(text), 1), start, device=last.device)
            last = torch.zeros_like(last)
        logits = self.model(**inputs).logits[torch.arange(len(last), device=last.device), last].float()
        among = logits if len(self.answers) == 1 else logits[:, self.answers]
        log_p = logits[:, self.answers[0]] - among.logsumexp(-1)
        return log_p if self.log else log_p.exp()

    def asked(self, prompt: str) -> str:
        """The question about a prompt as the model reads it."""
        question = self.question.replace("{}", prompt)
        if not self.processor.chat_template:
            return question
        content = [{"type": "image"}, {"type": "text", "text": question}]
        turn = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(turn, add_generation_prompt=True))


class OCR:
    """R = 1 - min(distance, n) / n: how well the text that the prompt puts in double quotes can be read. In [0, 1].

    distance: Levenshtein's, of what the reader reads to that text of n letters, both in lower case and without spaces;
    0 where the text is part of what is read. reader: a function of a list of B RGB PIL pictures -> B strings, or its
    name 'file.py:function' or 'module:function'. Samples [B, 1 or 3, H, W] in [0, 1] -> [B], float32.
    Raises ValueError for a prompt without such a text and for a reader that does not return B strings.
    """

    name = "ocr"
    differentiable = False

    def __init__(self, reader: str | Callable[[list[Image.Image]], Sequence[str]]) -> None:
        found = from_spec(reader, {}) if isinstance(reader, str) else adapt(reader, name_of(reader))
        if not isinstance(found, UserReward):
            raise RewardError(
                f"reader {reader!r} is a reward; give a function of a list of pictures that returns strings."
            )
        self.reader = found

    def __call__(self, samples: Tensor, condition: Condition) -> Tensor:
        seen: Any = pictures(samples)  # a reader is found and called as a reward is, but gets PIL pictures
        read = self.reader.raw(seen, condition)
        if not isinstance(read, list | tuple) or [type(x) for x in read] != [str] * len(samples):
            raise RewardError(
                f"reader {self.reader.name} returned {read!r:.100} for {len(samples)} pictures; give one string each."
            )
        scores = [accuracy(text, wanted_text(prompt)) for text, prompt in zip(read, condition.prompts, strict=True)]
        return torch.tensor(scores, dtype=reward_dtype(samples), device=samples.device)


def wanted_text(prompt: str) -> str:
    """What a prompt puts between its first two double quotes. Raises ValueError if there is nothing."""
    parts = prompt.split('"')
    if len(parts) < 3 or not parts[1].strip():
        raise RewardError(f'prompt {prompt!r} has no text in double quotes; write it as: a sign that says "open".')
    return parts[1]


def accuracy(read: str, target: str) -> float:
    """1 - min(Levenshtein distance, n) / n of two texts without spaces, in lower case; 1 where the target is in the text."""
    read, target = read.replace(" ", "").lower(), target.replace(" ", "").lower()
    if target in read:
        return 1.0
    return 1 - min(levenshtein(read, target), len(target)) / len(target)


def levenshtein(a: str, b: str) -> int:
    """The fewest insertions, deletions and replacements of one letter that turn a into b."""
    row = list(range(len(b) + 1))  # distances of the first letters of a to every beginning of b
    for i, letter in enumerate(a, 1):
        above, row = row, [i]
        for j, other in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (letter != other)))
    return row[-1]
