"""A reward by models that read pictures and text: the yes or no of any image-text-to-text model.

It sees pictures rounded to 8 bits, as its users give them, and has no gradient. Source: Lin et al. 2024, VQAScore,
arXiv 2404.01291 (t2v_metrics, `clip_t5_model.py`, has the question).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from ..support.errors import RewardError
from ..types import Condition
from .base import reward_dtype
from .image import pictures
from .text_image import dtype_of, in_parts_of, pretrained

QUESTION = 'Does this figure show "{}"? Please answer yes or no.'


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
