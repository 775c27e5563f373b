"""How a grouped product is cut into programs: numbers that change its speed and not its result."""

from dataclasses import dataclass

from moe_runtime.kernels.launch import check_power_of_two

MATRIX_ROWS = 16  # the fewest rows that matrix instructions multiply; below, rows go one by one


@dataclass(frozen=True, slots=True, kw_only=True)
class TileSettings:
    """One program multiplies a block of rows by `block_outputs` weight rows.

    It walks along their columns `block_inputs` at a time, `num_stages` loads ahead, with
    `num_warps` warps. `group_blocks` blocks of rows take turns on one tile of weights, so that
    it comes from cache when an expert has several.
    """

    block_outputs: int
    block_inputs: int
    num_warps: int
    num_stages: int
    group_blocks: int

    def __post_init__(self) -> None:
        check_power_of_two("block_outputs", self.block_outputs, 2, 256)
        check_power_of_two("block_inputs", self.block_inputs, 16, 512)
        check_power_of_two("num_warps", self.num_warps, 1, 16)
        for name, value, high in (
            ("num_stages", self.num_stages, 8),
            ("group_blocks", self.group_blocks, 64),
        ):
            if not 1 <= value <= high:
                raise ValueError(f"{name} ({value}) must be 1 to {high}")
