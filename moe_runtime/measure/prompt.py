"""Prompts as token ids that fit the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from moe_runtime.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt, ready to run. `max_new_tokens` is what was asked, or what the context leaves."""

    index: int
    text: str
    token_ids: list[int]
    max_new_tokens: int


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model. Raises CheckpointError when there is none."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        lines = [line.strip(" :") for line in str(error).splitlines()]
        reason = next((line for line in lines if line), type(error).__name__)
        raise CheckpointError(
            f"{folder} has no tokenizer that transformers can load ({reason}); "
            "put the model's tokenizer files beside its weights"
        ) from error
    return tokenizer


def read_prompts(
    folder: Path,
    config: PreTrainedConfig,
    texts: Sequence[str],
    *,
    max_new_tokens: int,
    chat: bool,
    trust_remote_code: bool,
) -> tuple[PreTrainedTokenizerBase, list[Prompt]]:
    """The tokenizer beside a model, and `texts` as it encodes them; raises as these two do."""
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    prompts = encode_prompts(texts, tokenizer, config, max_new_tokens=max_new_tokens, chat=chat)
    return tokenizer, prompts


def encode_prompts(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    *,
    max_new_tokens: int,
    chat: bool = False,
) -> list[Prompt]:
    """Token ids of `texts`, all checked before any of them runs.

    Raises ValueError, naming the prompt, its tokens and the limit, for one that does not fit the
    model's context; where only the new tokens would not fit, there will be fewer of them.
    """
    if chat and tokenizer.chat_template is None:
        raise ValueError(
            "--chat needs a chat template, and this model's tokenizer has none: "
            "leave out --chat, or use the instruction-tuned version of the model"
        )
    text_config = config.get_text_config()
    context = getattr(text_config, "max_position_embeddings", None)
    prompts = []
    for index, text in enumerate(texts):
        token_ids = _token_ids(text, tokenizer, chat)
        _check(index, token_ids, getattr(text_config, "vocab_size", None))
        room = max_new_tokens
        if isinstance(context, int):
            room = min(room, context - len(token_ids))
        if room < 1:
            raise ValueError(
                f"prompt {index} has {len(token_ids)} tokens and the model's context is {context}, "
                "which leaves no room for an answer; shorten the prompt"
            )
        prompts.append(Prompt(index=index, text=text, token_ids=token_ids, max_new_tokens=room))
    return prompts


def _token_ids(text: str, tokenizer: PreTrainedTokenizerBase, chat: bool) -> list[int]:
    if chat:
        messages = [{"role": "user", "content": text}]
        text = str(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        )
    # A template writes the special tokens itself.
    return list(tokenizer(text, add_special_tokens=not chat, verbose=False)["input_ids"])


def _check(index: int, token_ids: list[int], vocabulary: int | None) -> None:
    if not token_ids:
        raise ValueError(f"prompt {index} is empty: it has no tokens; write at least a word")
    if vocabulary is not None and max(token_ids) >= vocabulary:
        raise CheckpointError(
            f"the tokenizer turns prompt {index} into token {max(token_ids)}, and the model knows "
            f"{vocabulary}: they do not belong together; use the tokenizer that came with the model"
        )
