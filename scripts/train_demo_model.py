"""Train the demonstration MoE checkpoints, and the dense model they are compared with.

`python scripts/train_demo_model.py mixtral|deepseek|dense` trains on the sources of the Python
standard library that runs it, saves a bfloat16 checkpoint in the hub's layout, measures it with
transformers' eager code on held-out modules, and writes the model card from what it measured.

Shape letters: `T` tokens, `K` top-k, `E` experts, `D` model dim, `F` ffn dim,
`N = T*K` routed rows, `B` sequences, `H` heads, `S` positions.
"""

import argparse
import ctypes
import hashlib
import itertools
import json
import lzma
import math
import os
import platform
import shutil
import sysconfig
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GenerationConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 2048
CONTEXT = 1024
SHINGLE_LINES = 4
ROW_MULTIPLE = 64
ATTENTION_BLOCK = 128
HELDOUT_BYTES = 1_100_000
MIN_HELDOUT_MODULE_BYTES = 48_000
MIN_SHARE = 0.25
MIN_INFORMATION_RATIO = 10.0
LICENCES = Path("/usr/share/common-licenses")
# Character maps and the like: tables, not modules, and `xz` and any model alike eat them whole.
SKIPPED_FOLDERS = {"site-packages", "__pycache__", "encodings", "pydoc_data"}
REPOSITORY = Path(__file__).resolve().parent.parent
STEPS = {"mixtral": 2400, "deepseek": 2200, "dense": 2400}
OUTPUTS = {
    "mixtral": REPOSITORY / "moe_runtime" / "demo" / "mixtral-stdlib",
    "deepseek": REPOSITORY / "tests" / "data" / "deepseek-stdlib",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What decides a run besides the model's configuration."""

    steps: int
    seed: int
    batch_tokens: int = 4096
    long_context_from: float = 0.7  # fraction of the steps after which sequences double to CONTEXT
    warmup_steps: int = 50
    decay_from: float = 0.4  # fraction of the steps after which the rates fall linearly to zero
    muon_rate: float = 0.02
    adam_rate: float = 6e-3
    weight_decay: float = 0.1
    balance_weight: float = 0.01  # on each layer's own load-balance loss
    bias_rate: float = 1e-3  # DeepSeek-V3's loss-free balancing: step of the selection bias


# Data -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Texts by relative name: for training, held-out modules, held-out second domain."""

    train: dict[str, str]
    heldout: dict[str, str]
    licences_train: dict[str, str]
    licences_heldout: dict[str, str]
    num_dropped: int


def shingles(text: str) -> set[int]:
    """Hashes of every run of SHINGLE_LINES non-blank stripped lines."""
    lines = [line for line in (raw.strip() for raw in text.splitlines()) if line]
    return {
        hash(tuple(lines[i : i + SHINGLE_LINES])) for i in range(len(lines) - SHINGLE_LINES + 1)
    }


def by_hash(names: Sequence[str]) -> list[str]:
    """The names in an order that only their spelling decides: nobody picks the held-out set."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())


def read_texts(root: Path, pattern: str) -> dict[str, str]:
    """Distinct UTF-8 files under `root`, one for each content, by name relative to `root`."""
    texts: dict[str, str] = {}
    seen: set[str] = set()
    for path in sorted(root.rglob(pattern)):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts) or path.is_symlink() or not path.is_file():
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip() and text not in seen:
            seen.add(text)
            texts[relative.as_posix()] = text
    return texts


def load_corpus(smoke: bool) -> Corpus:
    """Split the standard library by name hash; drop from training what resembles held-out text."""
    modules = read_texts(Path(sysconfig.get_path("stdlib")), "*.py")
    order = by_hash(list(modules))
    # Short files would flatter the models: `xz` has nothing to look back on in them.
    enough, shortest = HELDOUT_BYTES, MIN_HELDOUT_MODULE_BYTES
    if smoke:
        order = [name for name in order if len(modules[name]) < 8000][:60]
        enough, shortest = 8000, 0
    heldout: dict[str, str] = {}
    size = 0
    for name in order:
        length = len(modules[name].encode())
        if size < enough and length >= shortest:
            heldout[name] = modules[name]
            size += length
    secret = {name: shingles(text) for name, text in heldout.items()}
    everything_secret = set().union(*secret.values())
    train: dict[str, str] = {}
    for name in order:
        if name in heldout:
            continue
        own = shingles(modules[name])
        common = own & everything_secret
        # A training file that shares a fifth of its lines with held-out text is a near-copy.
        near = len(common) > 0.2 * max(len(own), 1) or any(
            len(common & other) > 0.2 * len(other) for other in secret.values() if other
        )
        if not near:
            train[name] = modules[name]
    licences = read_texts(LICENCES, "*") if LICENCES.is_dir() else {}
    kept_back = by_hash(list(licences))[:1]
    secret_clauses = set().union(*(shingles(licences[k]) for k in kept_back))
    return Corpus(
        train=train,
        heldout=heldout,
        licences_train={
            k: v
            for k, v in licences.items()
            if len(shingles(v) & secret_clauses) <= 0.2 * len(shingles(v)) and k not in kept_back
        },
        licences_heldout={k: licences[k] for k in kept_back},
        num_dropped=len(order) - len(heldout) - len(train),
    )


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every text round-trips exactly, no byte is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    return [e.ids for e in tokenizer.backend_tokenizer.encode_batch(list(texts))]


class Batches:
    """Training rows of `(CONTEXT + 1)` tokens; the step alone decides which, so a run resumes."""

    def __init__(self, documents: list[list[int]], end: int, batch_tokens: int, seed: int) -> None:
        self._documents = [torch.tensor([end, *d], dtype=torch.int32) for d in documents]
        self._rows_per_step = batch_tokens // CONTEXT
        self._seed = seed
        self._epoch = -1
        self._rows = torch.empty(0, dtype=torch.int64)
        self.tokens_per_epoch = sum(len(d) for d in self._documents)
        self._steps_per_epoch = (self.tokens_per_epoch - 2 * CONTEXT) // (
            CONTEXT * self._rows_per_step
        )
        if self._steps_per_epoch < 1:
            raise ValueError(
                f"training text ({self.tokens_per_epoch} tokens) is shorter than one batch "
                f"({batch_tokens} tokens); give more text"
            )

    def __call__(self, step: int) -> Tensor:
        """Rows of tokens `[batch_tokens / CONTEXT, CONTEXT + 1]` for one step."""
        epoch, index = divmod(step, self._steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 1000 + epoch)
            order = torch.randperm(len(self._documents), generator=generator).tolist()
            offset = int(torch.randint(CONTEXT, (1,), generator=generator))
            stream = torch.cat([self._documents[i] for i in order]).long()[offset:]
            self._rows = stream.unfold(0, CONTEXT + 1, CONTEXT)
            self._rows = self._rows[torch.randperm(len(self._rows), generator=generator)]
            self._epoch = epoch
        start = index * self._rows_per_step
        return self._rows[start : start + self._rows_per_step]


# Models ---------------------------------------------------------------------------------------


def model_config(style: str, smoke: bool) -> PreTrainedConfig:
    """The three configurations; about 1.8 M parameters act on a token in each."""
    shared: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 192,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.03,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if smoke:
        shared |= {"hidden_size": 64}
    if style == "mixtral":
        return MixtralConfig(
            **shared,
            num_hidden_layers=6,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=16 if smoke else 144,
            num_local_experts=8,
            num_experts_per_tok=2,
        )
    if style == "deepseek":
        return DeepseekV3Config(
            **shared,
            num_hidden_layers=3 if smoke else 7,
            num_key_value_heads=4,
            first_k_dense_replace=1,
            intermediate_size=64 if smoke else 256,
            moe_intermediate_size=8 if smoke else 32,
            n_routed_experts=32,
            num_experts_per_tok=4,
            n_shared_experts=1,
            n_group=4,
            topk_group=2,
            norm_topk_prob=True,
            routed_scaling_factor=2.0,
            q_lora_rank=None,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            num_mtp_layers=0,
        )
    return LlamaConfig(
        **shared,
        num_hidden_layers=6,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=32 if smoke else 288,
    )


def routers(model: nn.Module) -> list[Any]:
    """The gates, in layer order."""
    return [m for name, m in model.named_modules() if name.endswith("mlp.gate")]


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """All parameters, and those that act on one token (the tied embedding counts once)."""
    total = sum(p.numel() for p in model.parameters())
    idle = 0
    for name, p in model.named_parameters():
        if ".experts." in name:
            idle += p.numel() - p.numel() // p.shape[0] * model.config.num_experts_per_tok
    return total, total - idle


# Training-time arithmetic: bfloat16 products, float32 everything else ---------------------------


class Bfloat16Linear(torch.autograd.Function):
    """`y = x w^T` in bfloat16 with float32 ends: twice the speed of float32 on AVX512-BF16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        low = weight.bfloat16()
        ctx.save_for_backward(rows, low)
        return (rows @ low.t()).float().view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        rows, low = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1]).bfloat16()
        return (g @ low).float().view(*grad.shape[:-1], -1), (g.t() @ rows).float()


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of a linear head, in nats; its gradients are taken on the way forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        rows, low = x.bfloat16(), weight.bfloat16()
        logits = (rows @ low.t()).float()
        peak = logits.amax(-1, keepdim=True)
        picked = logits.gather(1, target[:, None]) - peak
        p = logits.sub_(peak).exp_()
        total = p.sum(-1, keepdim=True)
        loss = (total.log() - picked).mean()
        p.div_(total)
        p.scatter_add_(1, target[:, None], torch.full_like(picked, -1.0))
        g = p.mul_(1.0 / len(rows)).bfloat16()
        ctx.save_for_backward((g @ low).float(), (g.t() @ rows).float())
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        dx, dweight = ctx.saved_tensors
        return grad * dx, grad * dweight, None


class SortedExperts(torch.autograd.Function):
    """Rows sorted by expert, one small product per expert, written into place.

    `x [T, D]`, `gate_up [E, 2F, D]`, `down [E, D, F]`, `index [T, K]`, `scale [T, K]` -> `[T, D]`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, scale: Tensor
    ) -> Tensor:
        num_experts, dim = gate_up.shape[0], x.shape[1]
        flat = index.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=num_experts)
        # oneDNN compiles a kernel for every row count it meets: round the counts up to few values.
        padded = (counts + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
        ends = padded.cumsum(0)
        shift = (ends - padded) - (counts.cumsum(0) - counts)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order)) + shift[flat[order]]
        stops = ends.tolist()
        spans = list(zip([0, *stops[:-1]], stops, range(num_experts), strict=True))
        # Padding rows copy token 0 with weight 0: they add nothing to any result or gradient.
        token = torch.zeros(stops[-1], dtype=torch.int64)
        token[place] = torch.arange(len(flat)) // index.shape[1]
        sorted_scale = torch.zeros(stops[-1], 1)
        sorted_scale[place, 0] = scale.reshape(-1)
        rows = x.bfloat16()[token]
        low_gate_up, low_down = gate_up.bfloat16(), down.bfloat16()
        hidden = rows.new_empty(len(rows), gate_up.shape[1])
        for start, end, e in spans:
            torch.mm(rows[start:end], low_gate_up[e].t(), out=hidden[start:end])
        gate, up = hidden.float().chunk(2, dim=-1)
        active = (F.silu(gate) * up).bfloat16()
        y = rows.new_empty(len(rows), dim)
        for start, end, e in spans:
            torch.mm(active[start:end], low_down[e].t(), out=y[start:end])
        ctx.save_for_backward(
            rows, low_gate_up, low_down, hidden, active, y, sorted_scale, token, place
        )
        ctx.spans = spans
        return (y * sorted_scale)[place].view(*index.shape, dim).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, low_gate_up, low_down, hidden, active, y, scale, token, place = ctx.saved_tensors
        top_k = len(place) // len(grad)
        g = grad.bfloat16()[token]
        dscale = (g * y).sum(-1, dtype=torch.float32)[place].view(-1, top_k)
        g = (g * scale).bfloat16()
        dactive = torch.empty_like(active)
        ddown = torch.empty_like(low_down)
        for start, end, e in ctx.spans:
            torch.mm(g[start:end], low_down[e], out=dactive[start:end])
            torch.mm(g[start:end].t(), active[start:end], out=ddown[e])
        gate, up = hidden.float().chunk(2, dim=-1)
        sigmoid = gate.sigmoid()
        swish = gate * sigmoid
        da = dactive.float()
        dgate = da * up * (sigmoid + swish * (1 - sigmoid))
        dhidden = torch.cat([dgate, da * swish], dim=-1).bfloat16()
        drows = torch.empty_like(rows)
        dgate_up = torch.empty_like(low_gate_up)
        for start, end, e in ctx.spans:
            torch.mm(dhidden[start:end], low_gate_up[e], out=drows[start:end])
            torch.mm(dhidden[start:end].t(), rows[start:end], out=dgate_up[e])
        dx = drows[place].view(len(grad), top_k, -1).sum(1, dtype=torch.float32)
        return dx, dgate_up.float(), ddown.float(), None, dscale


def sorted_experts(module: Any, x: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    return SortedExperts.apply(x, module.gate_up_proj, module.down_proj, index, scale)


class BlockedAttention(torch.autograd.Function):
    """Causal attention by blocks of queries; keys after a block are never touched.

    `query [B, H, S, *]`, `key [B, H / G, S, *]`, `value [B, H / G, S, *]` -> `[B, H, S, *]`.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        batch, heads, length, _ = query.shape
        kv_heads = key.shape[1]
        q = (query * scaling).bfloat16().reshape(batch * kv_heads, heads // kv_heads, length, -1)
        k = key.bfloat16().reshape(batch * kv_heads, length, -1)
        v = value.bfloat16().reshape(batch * kv_heads, length, -1)
        block = min(ATTENTION_BLOCK, length)
        future = torch.full((block, block), float("-inf"), dtype=torch.bfloat16).triu(1)
        out = q.new_empty(*q.shape[:3], v.shape[-1])
        saved = []
        for start in range(0, length, block):
            end = start + block
            score = q[:, :, start:end].flatten(1, 2) @ k[:, :end].transpose(1, 2)
            score.view(len(k), -1, block, end)[..., start:] += future
            probability = score.softmax(-1)
            out[:, :, start:end] = (probability @ v[:, :end]).view(len(k), -1, block, v.shape[-1])
            saved.append(probability)
        ctx.save_for_backward(q, k, v, out, *saved)
        ctx.scaling = scaling
        return out.view(batch, heads, length, -1).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *saved = ctx.saved_tensors
        batch, heads, length, _ = grad.shape
        g = grad.bfloat16().reshape(out.shape)
        delta = (g * out).sum(-1, keepdim=True)
        dq = torch.empty_like(q, dtype=torch.float32)
        dk = torch.zeros_like(k, dtype=torch.float32)
        dv = torch.zeros_like(v, dtype=torch.float32)
        block = length // len(saved)
        for i, probability in enumerate(saved):
            start, end = i * block, (i + 1) * block
            gb = g[:, :, start:end].flatten(1, 2)
            dv[:, :end] += probability.transpose(1, 2) @ gb
            ds = gb @ v[:, :end].transpose(1, 2)
            ds.sub_(delta[:, :, start:end].flatten(1, 2)).mul_(probability)
            dq[:, :, start:end] = (ds @ k[:, :end]).view(len(k), -1, block, k.shape[-1])
            dk[:, :end] += ds.transpose(1, 2) @ q[:, :, start:end].flatten(1, 2)
        return (
            dq.view(batch, heads, length, -1).mul_(ctx.scaling),
            dk.view(batch, -1, length, k.shape[-1]),
            dv.view(batch, -1, length, v.shape[-1]),
            None,
        )


def blocked_attention(
    _module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: None, **kwargs: Any
) -> tuple[Tensor, None]:
    out = BlockedAttention.apply(query, key, value, kwargs["scaling"])
    return out.transpose(1, 2).contiguous(), None


class Normalise(torch.autograd.Function):
    """RMS norm in fewer passes than the eager code takes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.rsqrt(
            (torch.linalg.vector_norm(x, dim=-1, keepdim=True) ** 2) / x.shape[-1] + eps
        )
        unit = x * inverse
        ctx.save_for_backward(unit, inverse, weight)
        return unit * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, inverse, weight = ctx.saved_tensors
        product = grad * unit
        dweight = product.view(-1, product.shape[-1]).sum(0)
        along = (product @ weight).unsqueeze(-1) / unit.shape[-1]
        return (grad * weight).addcmul_(unit, along, value=-1).mul_(inverse), dweight, None


def keep_freed_memory() -> None:
    """Tell glibc to reuse big blocks: without this every large tensor is paged in afresh."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    libc.mallopt(-4, 0)  # M_MMAP_MAX
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    libc.mallopt(-2, 2**26)  # M_TOP_PAD


def prepare_for_training(model: PreTrainedModel) -> None:
    """Swap in the quick arithmetic: same classes, same parameters, same mathematics."""
    keep_freed_memory()
    ALL_ATTENTION_FUNCTIONS.register("blocked", blocked_attention)
    ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts)
    model.config._attn_implementation = "blocked"
    model.config._experts_implementation = "sorted"
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = lambda x, m=module: Bfloat16Linear.apply(x, m.weight)  # type: ignore
        elif type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, m=module: Normalise.apply(x, m.weight, m.variance_epsilon)  # type: ignore
    depth = model.config.num_hidden_layers
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                p.mul_((2 * depth) ** -0.5)


# Optimiser ------------------------------------------------------------------------------------


def orthogonalise(matrices: Tensor) -> Tensor:
    """Newton-Schulz iteration of Muon on `[n, rows, columns]`, in bfloat16."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16()
    x = x.transpose(1, 2) if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(
            x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445
        )
    return x.transpose(1, 2) if tall else x


class Muon:
    """Muon (Jordan, 2024) over matrices; every expert's own matrix is orthogonalised by itself."""

    def __init__(self, named: list[tuple[str, nn.Parameter]], weight_decay: float) -> None:
        self._decay = weight_decay
        self._groups: dict[tuple[int, int], list[nn.Parameter]] = {}
        for name, p in named:
            # Experts keep gate and up stacked in one tensor: two matrices, not one.
            rows = p.shape[-2] // 2 if "gate_up_proj" in name else p.shape[-2]
            self._groups.setdefault((rows, p.shape[-1]), []).append(p)
        self.momentum = {
            shape: torch.zeros(sum(p.numel() for p in members) // math.prod(shape), *shape)
            for shape, members in self._groups.items()
        }

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for shape, members in self._groups.items():
            grad = torch.cat([p.grad.reshape(-1, *shape) for p in members])  # type: ignore[union-attr]
            momentum = self.momentum[shape].lerp_(grad, 0.05)
            update = orthogonalise(grad.lerp_(momentum, 0.95)).float()
            scale = rate * math.sqrt(max(1.0, shape[0] / shape[1]))
            for p, piece in zip(
                members, update.split([p.numel() // math.prod(shape) for p in members]), strict=True
            ):
                p.mul_(1 - rate * self._decay).add_(piece.reshape(p.shape), alpha=-scale)


def rate_factor(step: int, recipe: Recipe) -> float:
    """Warm up, hold, fall linearly to zero."""
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    left = (recipe.steps - step) / (recipe.steps * (1 - recipe.decay_from))
    return min(warm, left, 1.0)


# Balance --------------------------------------------------------------------------------------


class Balancer:
    """Watches every gate; balances each layer by itself, by loss (softmax) or by bias (sigmoid)."""

    def __init__(self, model: PreTrainedModel, recipe: Recipe) -> None:
        self._gates = routers(model)
        self._recipe = recipe
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        width = len(self._gates[0].weight) if self._gates else 1
        self.load = torch.zeros(len(self._gates), width)  # smoothed, in units of a fair share
        for layer, gate in enumerate(self._gates):
            gate.register_forward_hook(
                lambda _m, _i, out, layer=layer: self._seen.__setitem__(layer, (out[0], out[2]))
            )

    def loss(self) -> Tensor:
        """Sum over layers of `E * sum_e share_e * probability_e`, less its minimum of one."""
        total = torch.zeros(())
        for layer, (logits, index) in self._seen.items():
            num_experts = logits.shape[-1]
            share = torch.bincount(index.reshape(-1), minlength=num_experts) / index.numel()
            self.load[layer] = 0.95 * self.load[layer] + 0.05 * share * num_experts
            gate = self._gates[layer]
            if hasattr(gate, "e_score_correction_bias"):
                score = logits.sigmoid()
                probability = (score / score.sum(-1, keepdim=True)).mean(0)
                step = self._recipe.bias_rate * (1 / num_experts - share).sign()
                gate.e_score_correction_bias += step
                weight = 0.1 * self._recipe.balance_weight
            else:
                probability = logits.softmax(-1).mean(0)
                weight = self._recipe.balance_weight
            total = total + weight * ((share * probability).sum() * num_experts - 1)
        return total


# Training -------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Progress:
    """Where a run stands; everything a resumed run needs besides the weights."""

    step: int = 0
    cpu_seconds: float = 0.0
    loss: float = math.nan


def save_state(path: Path, payload: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(payload, temporary)
    temporary.replace(path)


def train(
    model: PreTrainedModel, batches: Batches, recipe: Recipe, state_file: Path, resume: bool
) -> Progress:
    """Train in place. The state file is rewritten every few minutes of CPU time."""
    prepare_for_training(model)
    model.train()
    matrices = [
        (n, p)
        for n, p in model.named_parameters()
        if p.ndim >= 2 and "embed" not in n and not n.endswith("mlp.gate.weight")
    ]
    taken = {id(p) for _, p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    muon = Muon(matrices, recipe.weight_decay)
    adam = torch.optim.AdamW(
        rest, lr=recipe.adam_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    balancer = Balancer(model, recipe)
    progress = Progress()
    if resume and state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        adam.load_state_dict(state["adam"])
        for shape, value in state["muon"].items():
            muon.momentum[shape].copy_(value)
        progress = Progress(**state["progress"])
    before = progress.cpu_seconds - time.process_time()
    saved_at = logged_at = progress.cpu_seconds
    logged_step = progress.step
    smooth = progress.loss
    for step in range(progress.step, recipe.steps):
        rows = batches(step)
        length = CONTEXT if step >= recipe.long_context_from * recipe.steps else CONTEXT // 2
        inputs = rows[:, :-1].reshape(-1, length)
        target = rows[:, 1:].reshape(-1)
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
        head = model.get_output_embeddings().weight
        loss = HeadLoss.apply(hidden.reshape(len(target), -1), head, target)
        (loss + balancer.loss()).backward()
        factor = rate_factor(step, recipe)
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for group in adam.param_groups:
            group["lr"] = recipe.adam_rate * factor
        adam.step()
        muon.step(recipe.muon_rate * factor)
        model.zero_grad(set_to_none=True)
        value = loss.item()
        smooth = value if math.isnan(smooth) else 0.98 * smooth + 0.02 * value
        progress = Progress(step=step + 1, cpu_seconds=before + time.process_time(), loss=smooth)
        last = progress.step == recipe.steps
        if progress.cpu_seconds - logged_at > 20 or last:
            elapsed = max(progress.cpu_seconds - logged_at, 1e-9)
            speed = (progress.step - logged_step) * target.numel() / elapsed
            lowest = " ".join(f"{x:.2f}" for x in balancer.load.amin(1).tolist())
            print(
                f"{time.strftime('%H:%M:%S')} step {progress.step}/{recipe.steps} "
                f"loss {smooth:.4f} nats/token, {speed:.0f} tokens/s of CPU, "
                f"{progress.cpu_seconds / 60:.1f} CPU min, rate x{factor:.2f}, "
                f"min share [{lowest}]",
                flush=True,
            )
            logged_at, logged_step = progress.cpu_seconds, progress.step
        if progress.cpu_seconds - saved_at > 240 or last:
            save_state(
                state_file,
                {
                    "model": model.state_dict(),
                    "adam": adam.state_dict(),
                    "muon": muon.momentum,
                    "progress": asdict(progress),
                },
            )
            saved_at = progress.cpu_seconds
    return progress


# Checkpoints ----------------------------------------------------------------------------------


def save_checkpoint(
    weights: dict[str, Tensor],
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
) -> None:
    """Write the hub's layout in bfloat16 beside `folder`, then swap it in."""
    config.dtype = torch.bfloat16
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(weights)
    for p in model.parameters():  # buffers stay float32: the selection bias moves by 1e-3
        p.data = p.data.bfloat16()
    model.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=0, pad_token_id=0, do_sample=False, max_new_tokens=128
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    fresh.chmod(0o755)
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    for file in fresh.iterdir():
        file.chmod(0o644)
    swap_in(fresh, folder)


def swap_in(fresh: Path, folder: Path) -> None:
    """Replace `folder` by `fresh`, keeping its README until a new one is written."""
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        readme = folder / "README.md"
        if readme.exists():
            shutil.copy2(readme, fresh / "README.md")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


# Measurement ----------------------------------------------------------------------------------


def xz_bits_per_byte(texts: Sequence[str]) -> float:
    """What `xz -9e` needs for the texts, each compressed by itself."""
    raw = [text.encode() for text in texts]
    packed = sum(len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) for data in raw)
    return 8 * packed / sum(map(len, raw))


def windows(documents: list[list[int]], end: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """`(input, target, counted)` rows of CONTEXT tokens with half a context of overlap.

    Every token, and the end of every text, is counted once: with all of the text before it in the
    first window, with at least CONTEXT / 2 tokens of it later.
    """
    for document in documents:
        tokens = torch.tensor([end, *document, end])
        done = 1
        for start in range(0, max(len(tokens) - 1 - CONTEXT // 2, 1), CONTEXT // 2):
            piece = tokens[start : start + CONTEXT + 1]
            counted = torch.zeros(CONTEXT, dtype=torch.bool)
            counted[done - start - 1 : len(piece) - 1] = True
            done = start + len(piece)
            piece = F.pad(piece, (0, CONTEXT + 1 - len(piece)), value=end)
            yield piece[:-1], piece[1:], counted


@torch.no_grad()
def measure(folder: Path, documents: list[list[int]]) -> tuple[float, Tensor]:
    """Total nats over `documents`, and the experts of every counted token, best first.

    Runs the saved checkpoint through transformers' eager code, in float32 arithmetic on the
    bfloat16 weights. The experts are `[layers, tokens, K]`, empty for a dense model.
    """
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="eager"
    ).eval()
    chosen: list[list[Tensor]] = [[] for _ in routers(model)]
    counted_now = torch.empty(0)

    def watch(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, out: tuple[Tensor, ...]) -> None:
            weights, index = out[1], out[2]
            ranked = index.gather(1, weights.argsort(dim=1, descending=True))
            chosen[layer].append(ranked[counted_now].to(torch.int16))

        return hook

    for layer, gate in enumerate(routers(model)):
        gate.register_forward_hook(watch(layer))
    rows = list(windows(documents, 0))
    nats = 0.0
    for start in range(0, len(rows), 4):
        inputs, target, counted = (
            torch.stack(x) for x in zip(*rows[start : start + 4], strict=True)
        )
        counted_now = counted.reshape(-1)
        logits = model(input_ids=inputs, use_cache=False).logits.float().reshape(-1, VOCAB_SIZE)
        loss = F.cross_entropy(logits, target.reshape(-1), reduction="none")
        nats += float(loss[counted_now].double().sum())
    experts = torch.stack([torch.cat(x) for x in chosen]) if chosen else torch.empty(0)
    return nats, experts


def mutual_information(a: Tensor, b: Tensor, num_experts: int) -> float:
    """In bits, from counts, of two sequences of expert ids."""
    joint = torch.bincount(a * num_experts + b, minlength=num_experts**2).double()
    joint = joint.view(num_experts, num_experts) / len(a)
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    present = joint > 0
    return float((joint[present] * (joint[present] / independent[present]).log2()).sum())


def routing_report(experts: Tensor, num_experts: int) -> dict[str, Any]:
    """Least and greatest share per layer (fair is 1), and neighbours' mutual information."""
    flat = experts.flatten(1).long()
    share = torch.stack([torch.bincount(x, minlength=num_experts) for x in flat]).double()
    share *= num_experts / flat.shape[1]
    first = experts[:, :, 0].long()
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for a, b in itertools.pairwise(first):
        shuffled = [
            mutual_information(a, b[torch.randperm(len(b), generator=generator)], num_experts)
            for _ in range(20)
        ]
        bits, control = mutual_information(a, b, num_experts), sum(shuffled) / len(shuffled)
        pairs.append({"bits": bits, "control": control, "ratio": bits / control})
    return {
        "min_share": share.amin(1).tolist(),
        "max_share": share.amax(1).tolist(),
        "neighbours": pairs,
    }


def report_on(
    style: str, folder: Path, corpus: Corpus, tokenizer: PreTrainedTokenizerFast
) -> dict[str, Any]:
    """Everything the card says about quality, measured on the saved files."""
    texts = list(corpus.heldout.values())
    documents = encode(tokenizer, texts)
    size = sum(len(text.encode()) for text in texts)
    nats, experts = measure(folder, documents)
    tokens = sum(map(len, documents)) + len(documents)
    report: dict[str, Any] = {
        "style": style,
        "heldout_files": len(texts),
        "heldout_bytes": size,
        "heldout_tokens": tokens,
        "nats_per_token": nats / tokens,
        "bits_per_byte": nats / math.log(2) / size,
        "xz_per_file": xz_bits_per_byte(texts),
        "xz_one_stream": xz_bits_per_byte(["".join(texts)]),
        "weight_bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
    }
    if corpus.licences_heldout:
        prose = list(corpus.licences_heldout.values())
        nats, _ = measure(folder, encode(tokenizer, prose))
        report["licence_bits_per_byte"] = nats / math.log(2) / sum(len(t.encode()) for t in prose)
        report["licence_xz_per_file"] = xz_bits_per_byte(prose)
    if experts.numel():
        config = AutoModelForCausalLM.from_pretrained(folder).config
        report |= routing_report(experts, config.num_local_experts)
    return report


# The card -------------------------------------------------------------------------------------

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: [en]
tags: [moe, {model_type}, python]
---

# {title}

{summary}
It exists to try `moe_runtime` on routing that was learnt, not drawn at random; it writes what looks
like Python and is good for nothing else. Trained from scratch, from a random start, by
`python scripts/train_demo_model.py {style}`.

| | |
|---|---|
| Parameters | {total:,}, of which {active:,} act on a token |
| Weights | {weight_megabytes:.2f} MB, bfloat16, one tensor per expert |
| Layers | {layers} |
| Experts | {experts} |
| Tokenizer | byte-level BPE, {vocab_size} tokens, `{end_of_text}` between files |
| Context | {context} tokens ({half} for the first {short_percent:.0f} % of the steps) |

## Training

- **Data.** {train_files} modules ({train_megabytes:.1f} MB) of the standard library of CPython
  {python}, `Lib/test` included; without `site-packages`, without the tables in `encodings` and
  `pydoc_data`, without files that are not UTF-8, and each content once. Second domain:
  {licence_files} licence texts of `/usr/share/common-licenses` ({licence_kilobytes:.0f} kB),
  taken twice.
- **Licence of the data.** The standard library: PSF License Version 2. The licence texts may be
  copied verbatim by their own terms. These weights: Apache-2.0, as the rest of `moe_runtime`.
- **Held out.** {heldout_files} whole modules of at least {min_module:,} bytes, {heldout_bytes:,}
  bytes in all, chosen by the SHA-256 of their names and listed below. The least size was set from
  the figures of `xz` alone: short files, on which it does much worse, would flatter the models.
  Training files that share more than a fifth of their four-line
  runs with held-out text were dropped ({dropped}). The tokenizer saw training text only.
- **Steps.** {steps:,} of {batch_tokens:,} tokens: {tokens_millions:.1f} M tokens, {epochs:.2f}
  passes. Seed {seed}.
- **Optimiser.** Muon on matrices (each expert's by itself; rate {muon_rate}, decay
  {weight_decay}), AdamW on embeddings, gates and norms (rate {adam_rate}); linear fall to zero
  over the last {decay_percent:.0f} % of the steps. The rates come from four Mixtral runs of 0.7 M
  tokens, compared on an earlier draw of held-out modules that shares some with this one.
- **Balance.** {balance}
- **Machine.** {cores} CPU cores, shared; {threads} thread(s) of this run took {hours:.2f} hours
  of CPU time. bfloat16 products, float32 elsewhere. torch {torch}, transformers {transformers}.

## Measured on the held-out modules

The saved bfloat16 weights in transformers' eager code with float32 arithmetic; windows of {context}
tokens with half a window of overlap, each file by itself, its end counted too.

| Bits per byte, held-out modules | |
|---|---|
| this model | **{bits_per_byte:.3f}** |
{dense_row}
| `xz -9e`, file by file | {xz_per_file:.3f} |
| `xz -9e`, all files in one stream | {xz_one_stream:.3f} |
{licence_rows}
Held-out loss: {nats_per_token:.4f} nats per token over {heldout_tokens:,} tokens.

{heldout_list}
{routing}"""

ROUTING = """
Routing on the same tokens. Share: what the least and the most used expert of the layer get, in
units of a fair share. Mutual information: between the first choices of this layer and of the next,
beside the mean of 20 permuted controls.

| MoE layer | least share | greatest share | bits shared with next | control | ratio |
|---|---|---|---|---|---|
{rows}
"""

TITLES = {
    "mixtral": (
        "A small Mixtral of the Python standard library",
        "A Mixtral-style language model: softmax gates, 8 experts, 2 for each token.",
        "One load-balance loss for each layer, of weight {balance_weight}; not pooled over layers.",
    ),
    "deepseek": (
        "A small DeepSeek-V3 of the Python standard library",
        "A DeepSeek-V3-style language model: latent attention, sigmoid gates limited to 2 of 4\n"
        "groups, 32 fine-grained experts, 4 for each token, and one shared.",
        "DeepSeek-V3's selection bias, moved by {bias_rate} a step in each layer, and a\n"
        "  load-balance loss for each layer, of a tenth of {balance_weight}.",
    ),
}


def write_card(folder: Path, facts: dict[str, Any], dense: dict[str, Any] | None) -> None:
    """The README of a checkpoint, every figure from `facts`."""
    title, summary, balance = TITLES[facts["style"]]
    config = json.loads((folder / "config.json").read_text())
    layers = config["num_hidden_layers"]
    if facts["style"] == "mixtral":
        layer_text, expert_text = f"{layers}, all MoE", "8, top-2"
    else:
        layer_text = f"{layers}: 1 dense, {layers - 1} MoE"
        expert_text = "32 in 4 groups, top-4 within the best 2 groups, and 1 shared"
    dense_row = "| dense model of as many active parameters | not measured |"
    if dense is not None:
        dense_row = (
            f"| dense Llama-style model of {dense['active']:,} parameters, "
            f"{dense['tokens_millions']:.1f} M tokens | {dense['bits_per_byte']:.3f} |"
        )
    licence_rows = ""
    if "licence_bits_per_byte" in facts:
        licence_rows = (
            f"| second domain, one licence held out: this model | "
            f"{facts['licence_bits_per_byte']:.3f} |\n"
            f"| second domain, one licence held out: `xz -9e` | "
            f"{facts['licence_xz_per_file']:.3f} |\n"
        )
    rows = []
    for layer, (least, most) in enumerate(
        zip(facts["min_share"], facts["max_share"], strict=True),
        start=layers - len(facts["min_share"]),
    ):
        pair = layer - layers + len(facts["min_share"])
        tail = "| | | |"
        if pair < len(facts["neighbours"]):
            n = facts["neighbours"][pair]
            tail = f"| {n['bits']:.4f} | {n['control']:.6f} | {n['ratio']:.0f} |"
        rows.append(f"| {layer} | {least:.2f} | {most:.2f} {tail}")
    text = CARD.format(
        **facts,
        title=title,
        summary=summary,
        balance=balance.format(**facts),
        model_type=config["model_type"],
        layers=layer_text,
        experts=expert_text,
        vocab_size=VOCAB_SIZE,
        end_of_text=END_OF_TEXT,
        context=CONTEXT,
        half=CONTEXT // 2,
        weight_megabytes=facts["weight_bytes"] / 1e6,
        short_percent=100 * facts["long_context_from"],
        decay_percent=100 * (1 - facts["decay_from"]),
        min_module=MIN_HELDOUT_MODULE_BYTES,
        heldout_list=textwrap.fill(f"The modules: {facts['heldout_names']}.", 100),
        dense_row=dense_row,
        licence_rows=licence_rows,
        routing=ROUTING.format(rows="\n".join(rows)),
    )
    (folder / "README.md").write_text(text)


def print_report(facts: dict[str, Any], dense: dict[str, Any] | None) -> None:
    print(f"bits per byte, {facts['style']}: {facts['bits_per_byte']:.4f}")
    if dense is not None and facts["style"] != "dense":
        print(f"bits per byte, dense: {dense['bits_per_byte']:.4f}")
    print(f"bits per byte, xz -9e file by file: {facts['xz_per_file']:.4f}")
    print(f"bits per byte, xz -9e one stream: {facts['xz_one_stream']:.4f}")
    if "min_share" in facts:
        print("least share per layer:", " ".join(f"{x:.3f}" for x in facts["min_share"]))
        ratios = [n["ratio"] for n in facts["neighbours"]]
        print("mutual information over control:", " ".join(f"{x:.0f}" for x in ratios))
        verdict = min(facts["min_share"]) >= MIN_SHARE and min(ratios) >= MIN_INFORMATION_RATIO
        verdict = verdict and facts["bits_per_byte"] < facts["xz_per_file"]
        print("meets its targets" if verdict else "MISSES a target")


# Command line ---------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("style", choices=["mixtral", "deepseek", "dense"])
    parser.add_argument(
        "--output", type=Path, help="checkpoint folder (default: its place in here)"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "moe_runtime_training",
        help="where the resumable state and the reports are kept (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=None, help="optimiser steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="go on from the saved state")
    parser.add_argument("--evaluate-only", action="store_true", help="measure what is saved")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny model, few steps; needs --output; under a minute"
    )
    arguments = parser.parse_args()
    if arguments.smoke and arguments.output is None:
        parser.error("--smoke needs --output DIR, so that it never overwrites a trained checkpoint")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    style, smoke = arguments.style, arguments.smoke
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(arguments.seed)
    work = (Path(tempfile.mkdtemp()) if smoke else arguments.work) / style
    work.mkdir(parents=True, exist_ok=True)
    folder = arguments.output or OUTPUTS.get(style, work / "checkpoint")
    recipe = Recipe(
        steps=arguments.steps or (4 if smoke else STEPS[style]),
        seed=arguments.seed,
        **({"batch_tokens": CONTEXT, "warmup_steps": 1} if smoke else {}),
    )
    corpus = load_corpus(smoke)
    texts = [*corpus.train.values(), *corpus.licences_train.values()]
    tokenizer = train_tokenizer(texts, VOCAB_SIZE)
    batches = Batches(
        encode(tokenizer, [*texts, *corpus.licences_train.values()]),
        0,
        recipe.batch_tokens,
        recipe.seed,
    )
    config = model_config(style, smoke)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    total, active = count_parameters(model)
    print(f"{style}: {total:,} parameters, {active:,} active, {batches.tokens_per_epoch:,} tokens")
    report_file = work / "report.json"
    if arguments.evaluate_only:
        # Without the report of the run its card cannot be rewritten; the figures still print.
        facts = json.loads(report_file.read_text()) if report_file.exists() else {}
    else:
        progress = train(model, batches, recipe, work / "state.pt", arguments.resume)
        save_checkpoint(model.state_dict(), model_config(style, smoke), tokenizer, folder)
        facts = asdict(recipe) | {
            "total": total,
            "active": active,
            "cores": os.cpu_count(),
            "threads": arguments.threads,
            "hours": progress.cpu_seconds / 3600,
            "train_files": len(corpus.train),
            "train_megabytes": sum(len(t.encode()) for t in corpus.train.values()) / 1e6,
            "licence_files": len(corpus.licences_train),
            "licence_kilobytes": sum(len(t) for t in corpus.licences_train.values()) / 1e3,
            "heldout_names": ", ".join(f"`{name}`" for name in corpus.heldout),
            "dropped": corpus.num_dropped,
            "tokens_millions": recipe.steps * recipe.batch_tokens / 1e6,
            "epochs": recipe.steps * recipe.batch_tokens / batches.tokens_per_epoch,
            "python": platform.python_version(),
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
        }
        report_file.write_text(json.dumps(facts, indent=1))
    trained_here = bool(facts)
    facts |= report_on(style, folder, corpus, tokenizer)
    if trained_here:
        report_file.write_text(json.dumps(facts, indent=1))
        finish_cards(work.parent, {style: folder})
    print_report(facts, read_report(work.parent, "dense"))


def read_report(work: Path, style: str) -> dict[str, Any] | None:
    file = work / style / "report.json"
    if not file.exists():
        return None
    facts: dict[str, Any] = json.loads(file.read_text())
    return facts if "bits_per_byte" in facts else None


def finish_cards(work: Path, folders: dict[str, Path]) -> None:
    """Rewrite the cards of the run that ended, or of both MoE models if it was the dense one."""
    if "dense" in folders:
        folders = OUTPUTS
    dense = read_report(work, "dense")
    for style, folder in folders.items():
        facts = read_report(work, style)
        if facts is not None and folder.exists():
            write_card(folder, facts, dense)


if __name__ == "__main__":
    main()
