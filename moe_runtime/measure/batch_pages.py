"""How many pages of keys and values a batch has, and which of its lines they hold."""

from collections.abc import Sequence as Many
from dataclasses import dataclass

from moe_runtime.errors import BudgetError
from moe_runtime.expert_memory import ExpertMemory, format_bytes
from moe_runtime.offline.page_table import pages_for
from moe_runtime.offline.request import BadLine, Request
from moe_runtime.offline.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class PagePlan:
    """`num_pages` of `page_bytes` each; `remedy` says how there would be more."""

    num_pages: int
    page_bytes: int
    remedy: str

    def can_hold(self, sequence: Sequence) -> bool:
        """Whether `sequence` fits by itself, to its end."""
        return pages_for(sequence.most_tokens) <= self.num_pages

    def refusal(self, request: Request, sequence: Sequence) -> BadLine:
        """What the results say of a line that does not."""
        needed_bytes = pages_for(sequence.most_tokens) * self.page_bytes
        return BadLine(
            line=request.line,
            custom_id=request.custom_id,
            code="kv_memory_exceeded",
            message=f"{sequence.most_tokens} tokens need {format_bytes(needed_bytes)} of keys and "
            f"values, and there are {format_bytes(self.num_pages * self.page_bytes)}; "
            f"{self.remedy}, or allow fewer tokens",
        )


def plan_pages(
    sequences: Many[Sequence],
    *,
    kv_memory: str,
    max_sequences: int,
    page_bytes: int,
    free_bytes: int,
) -> PagePlan:
    """Pages for all that run at a time, or what the memory has. Raises BudgetError."""
    wanted = sorted((pages_for(one.most_tokens) for one in sequences), reverse=True)
    if kv_memory == "auto":
        budget_bytes = free_bytes
        remedy = "lower --expert-memory"
    else:
        budget_bytes = ExpertMemory.parse(kv_memory).num_bytes or 0
        remedy = f"set --kv-memory {wanted[0] * page_bytes} or more"
    num_pages = min(sum(wanted[:max_sequences]), budget_bytes // page_bytes)
    if num_pages < wanted[-1]:
        raise BudgetError(
            f"{format_bytes(max(0, budget_bytes))} for keys and values are less than the "
            f"{format_bytes(wanted[-1] * page_bytes)} of the shortest line; {remedy}"
        )
    if num_pages * page_bytes > free_bytes:
        raise BudgetError(
            f"{format_bytes(num_pages * page_bytes)} for keys and values do not fit in the "
            f"{format_bytes(max(0, free_bytes))} that weights leave free; set --kv-memory "
            f"{max(0, free_bytes)} or less, or lower --expert-memory"
        )
    return PagePlan(num_pages=num_pages, page_bytes=page_bytes, remedy=remedy)


def check_kv_memory(text: str) -> None:
    """Raise BudgetError for what is neither auto nor a size."""
    if text == "auto":
        return
    try:
        is_size = ExpertMemory.parse(text).num_bytes is not None
    except BudgetError:
        is_size = False
    if not is_size:
        raise BudgetError(f"--kv-memory {text!r} is not a size; write auto, 4GiB or 512MiB")
