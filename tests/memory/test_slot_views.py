"""Laws of a slot's views: they are the slot's bytes, and no more of them are kept than slots."""

import torch

from moe_runtime.memory.layout import ExpertLayout
from moe_runtime.memory.slot_views import SlotViews


def layouts(num: int) -> list[ExpertLayout]:
    plain = ExpertLayout.pack([("up", (3, 5), torch.bfloat16)], phase_bytes=512)
    return [plain.at([2 * i]) for i in range(num)]


def test_views_are_the_bytes_of_the_slot_wherever_the_layout_puts_them() -> None:
    memory = torch.randint(0, 255, (4, 1024), dtype=torch.uint8)
    views = SlotViews(memory)
    for layout in layouts(20) * 2:
        for slot in range(4):
            (spec,) = layout.parameters
            found = views.get(slot, layout)["up"]
            wanted = memory[slot, spec.offset : spec.offset + 30].view(torch.bfloat16).view(3, 5)
            assert found.data_ptr() == wanted.data_ptr()
            assert found.shape == (3, 5)
            assert views.get(slot, layout)["up"] is found


def test_experts_of_other_layouts_leave_nothing_behind() -> None:
    """Law: what is kept does not grow with the experts that pass through."""
    views = SlotViews(torch.zeros((3, 1024), dtype=torch.uint8))
    for layout in layouts(200):
        for slot in range(3):
            views.get(slot, layout)
    assert len(views._last) == 3
