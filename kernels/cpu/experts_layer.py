"""One layer's shapes, and its rows under way through the experts' library."""

import ctypes
import itertools
from collections.abc import Callable, Sequence

import torch

from moe_runtime.kernels.cpu.matrix import Matrix, Weight
from moe_runtime.kernels.cpu.operation import KernelGate, Operation, Stage, TorchGate

# T tokens, D model dim, F ffn dim, U rows of the up matrix (2F with a gate, else F),
# R rows: (token, expert) pairs sorted by expert

# Of up and down, for each expert.
Biases = Sequence[tuple[torch.Tensor, torch.Tensor]]

# Plain numbers: joining flags takes microseconds, at each step of each layer.
_ALL_STAGES = int(Stage.UP | Stage.GATE | Stage.DOWN)
_SUM = int(Stage.SUM)


class CpuLayer:
    """The shapes of one layer, from which steps begin."""

    def __init__(
        self,
        template: Operation,
        call: Callable[[Operation], None],
        dtype: torch.dtype,
        dim: int,
        ffn: int,
        num_up: int,
        gate: KernelGate | TorchGate,
        is_interleaved: bool,
    ) -> None:
        self.template, self.call, self.dtype = template, call, dtype
        self.up_shape, self.down_shape = (num_up, dim), (dim, ffn)
        template.dim, template.ffn, template.up_rows = dim, ffn, num_up
        template.is_interleaved = is_interleaved
        self.torch_gate = None
        if isinstance(gate, KernelGate):
            template.set_gate(gate)
        else:
            self.torch_gate = gate

    def begin(
        self, x_TD: torch.Tensor, token_R: torch.Tensor, weight_R: torch.Tensor
    ) -> "ExpertsStep":
        """Begin work on `x_TD`, whose row `token_R[r]` goes to the expert of row r.

        `token_R` int64 below T and `weight_R` float32 `[R]`, contiguous on the CPU as `x_TD`.
        """
        return ExpertsStep(self, x_TD, token_R, weight_R)


class ExpertsStep:
    """One layer's rows under way: `run` or `put` each expert once, in any order, then `sum`."""

    def __init__(
        self,
        layer: CpuLayer,
        x_TD: torch.Tensor,
        token_R: torch.Tensor,
        weight_R: torch.Tensor,
    ) -> None:
        dtype = layer.dtype
        (num_up, dim), ffn = layer.up_shape, layer.down_shape[1]
        num_rows = token_R.shape[0]
        _check("x", x_TD, dtype, (x_TD.shape[0], dim))
        _check("token", token_R, torch.int64, (num_rows,))
        _check("weight", weight_R, torch.float32, (num_rows,))
        num_tokens = x_TD.shape[0]
        self._layer = layer
        self._inputs = (x_TD, token_R, weight_R)
        # One allocation for all: up_y, y and the sums in float32, then h in the layer's dtype.
        sizes = (num_rows * num_up, num_rows * dim, num_tokens * dim, num_rows * ffn)
        self._sizes = sizes
        self._scratch = torch.empty(sum(sizes))
        begin = self._scratch.data_ptr()
        operation = self._operation = Operation.from_buffer_copy(layer.template)
        operation.x = x_TD.data_ptr()
        operation.token = token_R.data_ptr()
        operation.weight = weight_R.data_ptr()
        operation.up_y = begin
        operation.y = begin + 4 * sizes[0]
        operation.total = begin + 4 * (sizes[0] + sizes[1])
        operation.h = begin + 4 * (sizes[0] + sizes[1] + sizes[2])
        operation.num_all_rows = num_rows
        operation.num_tokens = num_tokens

    def run(
        self,
        up: Sequence[Weight],
        down: Sequence[Weight],
        rows: Sequence[tuple[int, int]],
        *,
        biases: Biases = (),
        is_last: bool,
    ) -> torch.Tensor | None:
        """Compute experts: `up[i] [U, D]` and `down[i] [D, F]` for the rows `rows[i]` (begin, end).

        Tensors are contiguous, at any address; matrices have as many rows and columns, and packed
        and mxfp4 ones give the bits of tensors. All of a call are the one or the other, and are
        read once. `biases[i]`, if there are any, are `[U]` and `[D]`, added before anything is
        rounded. With `is_last` every other row must be there, and the result is that of `sum`.
        """
        assert len(up) == len(down) == len(rows)
        assert len(biases) in (0, len(rows))
        layer = self._layer
        num_experts = len(rows)
        columns = [
            _addresses("up", up, layer.dtype, layer.up_shape),
            _addresses("down", down, layer.dtype, layer.down_shape),
            [begin for begin, _ in rows],
            [end - begin for begin, end in rows],
        ]
        if biases:
            columns.append(_vectors("up_bias", [b for b, _ in biases], layer.dtype, layer.up_shape))
            columns.append(
                _vectors("down_bias", [b for _, b in biases], layer.dtype, layer.down_shape)
            )
        # One array for all, as each costs a microsecond.
        table = (ctypes.c_int64 * (len(columns) * num_experts))(*itertools.chain(*columns))
        begin, step = ctypes.addressof(table), 8 * num_experts
        operation = self._operation
        operation.up = begin
        operation.down = begin + step
        operation.first_row = begin + 2 * step
        operation.num_rows = begin + 3 * step
        operation.up_bias = begin + 4 * step if biases else None
        operation.down_bias = begin + 5 * step if biases else None
        operation.num_experts = num_experts
        operation.is_in_parts = isinstance(up[0], Matrix) if up else False
        assert all(isinstance(w, Matrix) == bool(operation.is_in_parts) for w in (*up, *down))
        stages = _ALL_STAGES
        if layer.torch_gate is not None:
            self._call(int(Stage.UP))
            self._gate_in_torch(layer.torch_gate, rows)
            stages = int(Stage.DOWN)
        if is_last:
            return self._call_sum(stages)
        self._call(stages)
        return None

    def put(self, begin: int, y_nD: torch.Tensor) -> None:
        """The rows from `begin` on, computed elsewhere; not weighted."""
        self._part(1).view(-1, y_nD.shape[1])[begin : begin + len(y_nD)] = y_nD

    def sum(self) -> torch.Tensor:
        """`out[t]`: the weighted rows of token t, added up in the order of rows; `[T, D]`."""
        self._operation.num_experts = 0
        return self._call_sum(0)

    def _gate_in_torch(self, gate: TorchGate, rows: Sequence[tuple[int, int]]) -> None:
        num_up, ffn = self._layer.up_shape[0], self._layer.down_shape[1]
        dtype = self._layer.dtype
        up_y_RU = self._part(0).view(-1, num_up)
        h_RF = self._part(3).view(dtype)[: len(up_y_RU) * ffn].view(-1, ffn)
        for begin, end in rows:
            if begin < end:
                h_RF[begin:end] = gate(up_y_RU[begin:end].to(dtype))

    def _part(self, number: int) -> torch.Tensor:
        """One of the four parts of the scratch memory."""
        begin = sum(self._sizes[:number])
        return self._scratch[begin : begin + self._sizes[number]]

    def _call_sum(self, stages: int) -> torch.Tensor:
        out_TD = torch.empty_like(self._inputs[0])
        self._operation.out = out_TD.data_ptr()
        self._call(stages | _SUM)
        return out_TD

    def _call(self, stages: int) -> None:
        operation = self._operation
        operation.stages, operation.next_up, operation.next_down = stages, 0, 0
        self._layer.call(operation)


def _addresses(
    name: str, weights: Sequence[Weight], dtype: torch.dtype, shape: tuple[int, int]
) -> list[int]:
    for w in weights:
        if not isinstance(w, Matrix):
            _check(name, w, dtype, shape)
        elif w.shape != shape or dtype is not torch.bfloat16:
            raise ValueError(
                f"{name} must be a bfloat16 matrix {list(shape)}, got {list(w.shape)} for {dtype}"
            )
    return [w.address if isinstance(w, Matrix) else w.data_ptr() for w in weights]


def _vectors(
    name: str, vectors: Sequence[torch.Tensor], dtype: torch.dtype, shape: tuple[int, int]
) -> list[int]:
    """Addresses of one number for each row of a matrix of `shape`."""
    for vector in vectors:
        _check(name, vector, dtype, shape[:1])
    return [vector.data_ptr() for vector in vectors]


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise ValueError for a tensor with which the library would read what is not its own."""
    if tensor.dtype is dtype and tensor.shape == shape and tensor.is_contiguous() and tensor.is_cpu:
        return
    raise ValueError(
        f"{name} must be a contiguous {dtype} CPU tensor {list(shape)}, got {list(tensor.shape)} "
        f"{tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
    )
