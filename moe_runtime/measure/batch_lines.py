"""The lines of a batch as token ids, and what ends each of them."""

import zlib
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from moe_runtime.integrations.transformers.next_token import Sampling, TokenChooser
from moe_runtime.offline.request import BadLine, Request
from moe_runtime.offline.sequence import Sequence


@dataclass(slots=True, kw_only=True)
class BatchLine:
    """A line while it runs. Its random numbers are its own, whatever it shares a pass with."""

    request: Request
    sequence: Sequence
    chooser: TokenChooser
    finish_reason: str = ""


@dataclass(slots=True, kw_only=True)
class BatchLines:
    """All lines that run, by the number of their sequence."""

    tokenizer: PreTrainedTokenizerBase
    end_ids: frozenset[int]
    lines: dict[int, BatchLine] = field(default_factory=dict)
    _token_texts: dict[int, str] = field(default_factory=dict)

    def choose(self, logits_NV: torch.Tensor, sequences: Many[Sequence]) -> list[int]:
        """A token for each of `sequences`, row by row."""
        tokens: list[int] = logits_NV.max(-1).indices.tolist()  # several times as fast as argmax
        for row, sequence in enumerate(sequences):
            line = self.lines[sequence.number]
            if line.request.temperature > 0:
                tokens[row] = line.chooser.choose(logits_NV[row : row + 1], [0])[0]
        return tokens

    def is_finished(self, sequence: Sequence) -> bool:
        """Whether its last token was its last; the line then knows why."""
        line = self.lines[sequence.number]
        if sequence.written[-1] in self.end_ids or self._has_stop(line):
            line.finish_reason = "stop"
        elif len(sequence.written) >= sequence.max_new_tokens:
            line.finish_reason = "length"
        return bool(line.finish_reason)

    def text(self, line: BatchLine) -> str:
        """What was written, up to the first stop text."""
        text = self._decode(line.sequence.written)
        found = [text.find(stop) for stop in line.request.stop]
        return text[: min((at for at in found if at >= 0), default=None)]

    def _has_stop(self, line: BatchLine) -> bool:
        last = line.sequence.written[-1]
        if not any(self._may_end(stop, last) for stop in line.request.stop):
            return False
        # A token is a byte at least, and a character four bytes at most.
        reach = 4 * max(map(len, line.request.stop)) + 8
        tail = self._decode(line.sequence.written[-reach:])
        return any(stop in tail for stop in line.request.stop)

    def _may_end(self, stop: str, token_id: int) -> bool:
        """False only if `stop` cannot end in this token, whatever stands before it.

        Any character of ASCII is in the text of its token alone, but for spaces, which tokenizers
        drop at the beginning of a text or write between words.
        """
        if token_id not in self._token_texts:
            self._token_texts[token_id] = self._decode([token_id])
        last = stop[-1]
        return last == " " or not last.isascii() or last in self._token_texts[token_id]

    def _decode(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))


def encode_line(
    request: Request,
    number: int,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    *,
    seed: int,
) -> BatchLine | BadLine:
    """`request` as the model reads it, or why it cannot.

    Where only the new tokens do not fit the model's context, there will be fewer of them.
    """

    def bad(code: str, message: str) -> BadLine:
        return BadLine(line=request.line, custom_id=request.custom_id, code=code, message=message)

    try:
        ids = _token_ids(request, tokenizer)
    except Exception as error:  # templates raise what their authors like, on messages of any kind
        return bad("invalid_request", f"the prompt cannot be encoded: {error}")
    if not ids:
        return bad("empty_prompt", "the prompt has no tokens; write at least a word")
    text_config = config.get_text_config()
    vocabulary = getattr(text_config, "vocab_size", None)
    if vocabulary is not None and max(ids) >= vocabulary:
        return bad(
            "invalid_request", f"token {max(ids)} of the prompt: the model knows {vocabulary}"
        )
    context = getattr(text_config, "max_position_embeddings", None)
    room = request.max_tokens
    if isinstance(context, int):
        room = min(room, context - len(ids))
    if room < 1:
        return bad(
            "context_length_exceeded",
            f"the prompt has {len(ids)} tokens and the model's context is {context}, which leaves "
            "no room for an answer; shorten it",
        )
    own_seed = request.seed
    if own_seed is None:
        own_seed = seed + zlib.crc32(request.custom_id.encode("utf-8", "surrogatepass"))
    sampling = Sampling(temperature=request.temperature, top_p=request.top_p, seed=own_seed)
    sequence = Sequence(number=number, prompt_ids=ids, max_new_tokens=room)
    return BatchLine(request=request, sequence=sequence, chooser=TokenChooser(sampling))


def _token_ids(request: Request, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    prompt = request.prompt
    if isinstance(prompt, tuple):
        return list(prompt)
    if prompt is None:
        if tokenizer.chat_template is None:
            raise ValueError("this model's tokenizer has no chat template; write a prompt instead")
        messages = [dict(message) for message in request.messages]
        prompt = str(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        )
    # A template writes the special tokens itself.
    is_plain = not request.is_chat
    return list(tokenizer(prompt, add_special_tokens=is_plain, verbose=False)["input_ids"])
