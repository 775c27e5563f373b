"""One prompt run through `model.generate()`, with the time of every token."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from moe_runtime.measure.decoding import Decoding
from moe_runtime.measure.prompt import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What the model wrote after one prompt. `logits` is `[tokens, vocab]` float32 if kept."""

    prompt: Prompt
    text: str
    token_ids: list[int]
    # "stop": end of sequence or a stop string; "length": no more tokens allowed; "terminated": the
    # program was asked to end
    finish_reason: str
    first_token_seconds: float
    decode_seconds: float  # from the first token to the last
    logits: torch.Tensor | None = None

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        return {
            "index": self.prompt.index,
            "prompt": self.prompt.text,
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
        }


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    decoding: Decoding,
    *,
    on_text: Callable[[str], None] | None = None,
    keep_logits: bool = False,
    is_stop_asked: Callable[[], bool] | None = None,
) -> Completion:
    """Run `prompt`; `on_text` gets the text piece by piece as it is written.

    `is_stop_asked` is asked at every token whether to end with it.
    """
    inputs = torch.tensor([prompt.token_ids], device=model.device)
    arguments = decoding.generate_arguments()
    if decoding.stop:
        arguments["tokenizer"] = tokenizer
    asked = None if is_stop_asked is None else _Asked(is_stop_asked)
    if asked is not None:
        arguments["stopping_criteria"] = [asked]
    torch.manual_seed(decoding.seed + prompt.index)
    watch = _Watch(tokenizer, on_text)
    start = time.perf_counter()
    output: Any = model.generate(  # type: ignore[operator]
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=prompt.max_new_tokens,
        streamer=watch,
        return_dict_in_generate=True,
        output_logits=keep_logits,
        **arguments,
    )
    token_ids = output.sequences[0, inputs.shape[1] :].tolist()
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    return Completion(
        prompt=prompt,
        text=str(text),
        token_ids=token_ids,
        finish_reason=(
            "terminated"
            if asked is not None and asked.has_stopped
            else _finish_reason(model, tokenizer, prompt, decoding, token_ids)
        ),
        first_token_seconds=watch.times[0] - start,
        decode_seconds=watch.times[-1] - watch.times[0],
        logits=torch.cat(output.logits).float().cpu() if keep_logits else None,
    )


def _finish_reason(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    decoding: Decoding,
    token_ids: list[int],
) -> str:
    end = model.generation_config.eos_token_id
    ends = end if isinstance(end, list) else [end]
    text = str(tokenizer.decode(token_ids))
    is_stopped = (
        len(token_ids) < prompt.max_new_tokens
        or token_ids[-1] in ends
        or any(stop in text for stop in decoding.stop)
    )
    return "stop" if is_stopped else "length"


class _Asked(StoppingCriteria):
    """Ends a generation from outside."""

    def __init__(self, is_stop_asked: Callable[[], bool]) -> None:
        self._is_stop_asked = is_stop_asked
        self.has_stopped = False

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any
    ) -> torch.BoolTensor:
        self.has_stopped = self._is_stop_asked()
        return torch.full((len(input_ids),), self.has_stopped, device=input_ids.device)  # type: ignore[return-value]


class _Watch(BaseStreamer):
    """Notes when each token arrives and hands on text once it is whole."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None] | None
    ) -> None:
        self.times: list[float] = []
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._saw_prompt = False
        self._token_ids: list[int] = []
        self._context = 0  # first token that the next piece is decoded with
        self._written = 0  # tokens whose text was handed on

    def put(self, value: torch.Tensor) -> None:
        if not self._saw_prompt:
            self._saw_prompt = True
            return
        self.times.append(time.perf_counter())
        self._token_ids += value.flatten().tolist()
        self._write(is_last=False)

    def end(self) -> None:
        self._write(is_last=True)

    def _write(self, *, is_last: bool) -> None:
        if self._on_text is None:
            return
        # Decoding a few tokens back keeps the spaces that a tokenizer puts between words.
        before = self._decode(self._token_ids[self._context : self._written])
        text = self._decode(self._token_ids[self._context :])
        is_whole = not text.endswith("\N{REPLACEMENT CHARACTER}")
        if len(text) > len(before) and (is_whole or is_last):
            self._on_text(text[len(before) :])
            self._context, self._written = self._written, len(self._token_ids)

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))
