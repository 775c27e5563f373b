"""Keys and values of many sequences in host memory, in pages that all layers share a table for.

N decoding sequences, T tokens of a pass, H query heads, G key-value heads, d their width, v the
width of values, P tokens a page, B pages of the store.
"""

import math
from dataclasses import dataclass

import torch

from moe_runtime.kernels.cpu.attention import PagedAttention
from moe_runtime.kernels.cpu.attention_status import PAGE_TOKENS
from moe_runtime.memory.anonymous_memory import anonymous_memory
from moe_runtime.offline.page_table import PageTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Rows `begin:end` of a pass that are the first tokens of one sequence."""

    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PassLayout:
    """Where the tokens of one pass stand: first one of each decoding sequence, then whole prompts.

    `page_T` and `offset_T` are where each token's key and value go; `table_NB` (int64, padded with
    zeros) and `length_N`, this pass's token included, are where decoding sequences look.
    """

    page_T: torch.Tensor
    offset_T: torch.Tensor
    table_NB: torch.Tensor
    length_N: torch.Tensor
    prompts: tuple[Segment, ...]

    @property
    def num_decoding(self) -> int:
        return len(self.length_N)

    @classmethod
    def of(
        cls, table: PageTable, decoding: list[tuple[int, int]], prompts: list[tuple[int, int]]
    ) -> "PassLayout":
        """(sequence, tokens with this pass's) of all that decode, and of all prompts."""
        pages_N = [table.pages(sequence) for sequence, _ in decoding]
        width = max(map(len, pages_N), default=0)
        page: list[int] = []
        offset: list[int] = []
        for pages, (_, length) in zip(pages_N, decoding, strict=True):
            page.append(pages[(length - 1) // PAGE_TOKENS])
            offset.append((length - 1) % PAGE_TOKENS)
        segments = []
        for sequence, length in prompts:
            pages = table.pages(sequence)
            segments.append(Segment(begin=len(page), end=len(page) + length))
            page += (pages[i // PAGE_TOKENS] for i in range(length))
            offset += (i % PAGE_TOKENS for i in range(length))
        return cls(
            page_T=torch.tensor(page),
            offset_T=torch.tensor(offset),
            table_NB=torch.tensor(
                [pages + [0] * (width - len(pages)) for pages in pages_N], dtype=torch.int64
            ).view(len(decoding), width),
            length_N=torch.tensor([length for _, length in decoding], dtype=torch.int64),
            prompts=tuple(segments),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """What one attention layer keeps of a token."""

    num_heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        return self.num_heads * (self.key_width + self.value_width) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class LayerPages:
    """One layer's pages. Keys stand with tokens side by side, as the kernel multiplies them."""

    key_BGdP: torch.Tensor
    value_BGPv: torch.Tensor

    @classmethod
    def of(cls, shape: LayerShape, num_pages: int) -> "LayerPages":
        """Nothing is touched: memory is taken as pages are written.

        Pages of a sequence are anywhere, and finding small ones takes as long as reading them.
        """
        key = (num_pages, shape.num_heads, shape.key_width, PAGE_TOKENS)
        value = (num_pages, shape.num_heads, PAGE_TOKENS, shape.value_width)
        return cls(*(_in_huge_pages(sizes, shape.dtype) for sizes in (key, value)))

    def write(self, key_TGd: torch.Tensor, value_TGv: torch.Tensor, layout: PassLayout) -> None:
        """Store what a pass computed."""
        self.key_BGdP[layout.page_T, :, :, layout.offset_T] = key_TGd
        self.value_BGPv[layout.page_T, :, layout.offset_T] = value_TGv


def _in_huge_pages(sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    memory = anonymous_memory(math.prod(sizes) * dtype.itemsize)
    return torch.from_numpy(memory).view(dtype).view(sizes)


class KVPages:
    """The pages of all layers. `attention` reads them for sequences that decode."""

    def __init__(self, shapes: list[LayerShape], num_pages: int) -> None:
        self.table = PageTable(num_pages)
        self.layers = [LayerPages.of(shape, num_pages) for shape in shapes]
        self.page_bytes = page_bytes(shapes)
        self.attention = PagedAttention.load()

    @property
    def most_used_bytes(self) -> int:
        """Of keys and values that were held at a time."""
        return self.table.most_used * self.page_bytes


def page_bytes(shapes: list[LayerShape]) -> int:
    """Bytes of one page in all layers."""
    return PAGE_TOKENS * sum(shape.token_bytes for shape in shapes)
