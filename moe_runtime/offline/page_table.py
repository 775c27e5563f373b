"""Which pages of a bounded store hold the tokens of which sequence."""

from moe_runtime.kernels.cpu.attention_status import PAGE_TOKENS


def pages_for(num_tokens: int) -> int:
    """Pages that so many tokens of one sequence take."""
    return -(-num_tokens // PAGE_TOKENS)


class PageTable:
    """Hands out pages of `PAGE_TOKENS` tokens. Knows numbers only: no bytes or tensors."""

    def __init__(self, num_pages: int) -> None:
        assert num_pages > 0, num_pages
        self.num_pages = num_pages
        self.most_used = 0
        self._free = list(range(num_pages - 1, -1, -1))
        self._pages: dict[int, list[int]] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages(self, sequence: int) -> list[int]:
        """The pages of `sequence`, in the order of its tokens."""
        return self._pages.get(sequence, [])

    def missing(self, sequence: int, num_tokens: int) -> int:
        """Pages that `sequence` lacks to hold `num_tokens` tokens."""
        return max(0, pages_for(num_tokens) - len(self.pages(sequence)))

    def can_hold(self, sequence: int, num_tokens: int) -> bool:
        """Whether there are free pages for that."""
        return self.missing(sequence, num_tokens) <= self.num_free

    def hold(self, sequence: int, num_tokens: int) -> None:
        """Give `sequence` the pages that it lacks for `num_tokens` tokens."""
        num_missing = self.missing(sequence, num_tokens)
        assert num_missing <= self.num_free, (sequence, num_tokens, self.num_free)
        pages = self._pages.setdefault(sequence, [])
        pages += (self._free.pop() for _ in range(num_missing))
        self.most_used = max(self.most_used, self.num_pages - self.num_free)

    def release(self, sequence: int) -> None:
        """All pages of `sequence` are free again."""
        self._free += reversed(self._pages.pop(sequence, []))
