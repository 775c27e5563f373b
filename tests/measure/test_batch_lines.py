"""When a line of a batch has ended."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moe_runtime.integrations.transformers.next_token import Sampling, TokenChooser
from moe_runtime.measure.batch_lines import BatchLine, BatchLines
from moe_runtime.offline.request import Request
from moe_runtime.offline.sequence import Sequence

DEMO = Path(__file__).parents[2] / "moe_runtime" / "demo" / "mixtral-stdlib"
PIECES = ["▁", "a", "▁a", "b", ".", "▁.", "é", "<0xC3>", "<0xA9>", "<0x0A>", "\n", "##b", "▁b▁"]


def byte_level() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(DEMO)


def in_words() -> PreTrainedTokenizerBase:
    """As Llama's: bytes that no piece has, and a space that the beginning of a text loses."""
    tokenizer = Tokenizer(models.WordLevel(dict(zip(PIECES, range(99), strict=False)), "a"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=True)


def word_pieces() -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.WordLevel(dict(zip(PIECES, range(99), strict=False)), "a"))
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {make.__name__: make() for make in (byte_level, in_words, word_pieces)}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150)
@given(data=st.data())
def test_a_line_ends_when_its_text_first_has_a_stop(name: str, data: st.DataObject) -> None:
    """Stops are taken from the text itself, so that they occur, across tokens too."""
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=20))
    text = tokenizer.decode(ids, skip_special_tokens=True)
    begin = data.draw(st.integers(0, len(text)))
    stop = text[begin : begin + data.draw(st.integers(1, 4))] or "never"
    line = line_with((stop,))
    lines = BatchLines(tokenizer=tokenizer, end_ids=frozenset(), lines={0: line})
    for token in ids:
        line.sequence.written.append(token)
        so_far = tokenizer.decode(line.sequence.written, skip_special_tokens=True)
        assert lines.is_finished(line.sequence) == (stop in so_far)
        if stop in so_far:
            assert stop not in lines.text(line)
            return


def line_with(stops: tuple[str, ...]) -> BatchLine:
    return BatchLine(
        request=Request(
            line=1,
            custom_id="one",
            prompt="a",
            messages=(),
            max_tokens=99,
            temperature=0.0,
            top_p=None,
            seed=None,
            stop=stops,
        ),
        sequence=Sequence(number=0, prompt_ids=[0], max_new_tokens=99),
        chooser=TokenChooser(Sampling()),
    )
