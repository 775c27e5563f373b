"""A model whose attention looks into our pages, so that any sequences can share a pass.

T tokens of a pass, H query heads, G key-value heads, d their width, v the width of values, V
vocabulary.
"""

import inspect
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moe_runtime.errors import UnsupportedModelError
from moe_runtime.integrations.transformers.handle import Handle, handle
from moe_runtime.integrations.transformers.sites import ExpertSite
from moe_runtime.offline.grouped_forward import Attend
from moe_runtime.offline.kv_pages import KVPages, LayerShape, PassLayout
from moe_runtime.offline.page_table import PageTable, pages_for
from moe_runtime.offline.pass_attention import AttentionRule, attend, prompt_attention
from moe_runtime.offline.pass_scheduler import PassPlan

# Prompts of the trial: of unlike lengths, and one of them longer than a page.
_TRIAL_TOKENS = (7, 37)
# Of the reference's logits, in the Euclidean norm: another order of the same sums stays far below,
# and a token that is seen too much or too little far above.
_TOLERANCE = {torch.float32: 1e-3}
_HALF_TOLERANCE = 0.1
# What transformers' attention functions may be told that changes nothing here.
_HARMLESS = frozenset({"dropout", "position_ids", "use_cache", "output_attentions", "is_causal"})


@dataclass(slots=True)
class _Call:
    """A forward under way, in the thread that it runs in."""

    layout: PassLayout
    attend: Attend
    num_layers: int = 0  # that attended so far


class PagedModel:
    """Runs passes of `PassPlan`s on a model. A context manager: leaving it undoes the change.

    transformers lets an attention function be registered by name; each model gets one of its own.
    Raises UnsupportedModelError where a trial shows that the model's attention is not served by it:
    it has a state, masks of its own, or attends in another way.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._handle: Handle = handle(model)
        self._name = f"moe_runtime_paged_{id(self)}"
        self._accepts = frozenset(inspect.signature(model.forward).parameters)
        self._configs = {id(config): config for config in _configs(model)}.values()
        self._before = [config._attn_implementation for config in self._configs]
        self._pages: KVPages | None = None
        self._shapes: list[LayerShape] = []  # seen in the trial
        self._under_way = threading.local()  # groups of a pass run in threads of their own
        self.attention_seconds = 0.0
        ALL_ATTENTION_FUNCTIONS.register(self._name, self._attend)
        try:
            self._try()
        except BaseException:
            self.close()
            raise

    @property
    def shapes(self) -> list[LayerShape]:
        """What each attention layer keeps of a token."""
        return list(self._shapes)

    def open_pages(self, num_pages: int) -> KVPages:
        """A store of so many pages for the passes to come."""
        self._pages = KVPages(self._shapes, num_pages)
        return self._pages

    def run(self, plan: PassPlan) -> torch.Tensor:
        """Logits `[sequences, V]` behind the last token of each of `plan.sequences`."""
        with self.passing():
            return self.run_group(plan, _at_once)

    @torch.no_grad()
    def run_group(self, plan: PassPlan, attend: Attend) -> torch.Tensor:
        """As `run`, while `passing`; `attend` is called with the attention of each layer.

        Several may be under way in threads of their own, if one at a time does anything but attend
        and one at a time attends.
        """
        assert self._pages is not None
        layout = PassLayout.of(
            self._pages.table,
            [(one.number, one.num_tokens) for one in plan.decoding],
            [(one.number, one.num_tokens) for one in plan.prompts],
        )
        ids = [one.written[-1] for one in plan.decoding]
        positions = [one.num_tokens - 1 for one in plan.decoding]
        for one in plan.prompts:
            ids += one.token_ids
            positions += range(one.num_tokens)
        return self._forward(layout, ids, positions, attend)

    def close(self) -> None:
        """Take the attention function out again. Safe to call twice."""
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop(self._name, None)
        self._pages = None

    def __enter__(self) -> "PagedModel":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @contextmanager
    def passing(self) -> Iterator[None]:
        """The model calls our attention while this is entered, and its own one otherwise."""
        try:
            for config in self._configs:
                config._attn_implementation_internal = self._name
            yield
        finally:
            for config, before in zip(self._configs, self._before, strict=True):
                config._attn_implementation_internal = before

    def _forward(
        self,
        layout: PassLayout,
        ids: Sequence[int],
        positions: Sequence[int],
        attend: Attend,
    ) -> torch.Tensor:
        """One row of all tokens; logits behind decoding sequences and at the ends of prompts."""
        ends = [*range(layout.num_decoding), *(prompt.end - 1 for prompt in layout.prompts)]
        optional: dict[str, Any] = {
            "position_ids": torch.tensor([positions]),
            "logits_to_keep": torch.tensor(ends),
        }
        self._under_way.call = _Call(layout, attend)
        output = self._model(
            input_ids=torch.tensor([ids]),
            use_cache=False,
            **{name: value for name, value in optional.items() if name in self._accepts},
        )
        logits: torch.Tensor = output.logits[0]
        return logits if "logits_to_keep" in self._accepts else logits[ends]

    def _attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        s_aux: torch.Tensor | None = None,
        softcap: float | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        """What transformers calls in each layer: `[1, H, T, d]` in, `[1, T, H, v]` out."""
        call: _Call = self._under_way.call
        layout, layer = call.layout, call.num_layers
        call.num_layers += 1
        if attention_mask is not None:
            raise UnsupportedModelError("its attention has a mask of its own")
        if key.shape[0] != 1 or key.shape[2] != query.shape[2]:
            raise UnsupportedModelError("its attention sees other keys than its tokens'")
        rule = AttentionRule(
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            window=sliding_window,
            sink_H=s_aux,
            softcap=softcap,
        )
        if self._pages is not None:
            pages = self._pages

            @torch.no_grad()  # which the thread that attends does not inherit
            def attention() -> torch.Tensor:
                started = time.perf_counter()
                out = attend(pages, layer, layout, rule, query[0], key[0], value[0])
                self.attention_seconds += time.perf_counter() - started
                return out

            return call.attend(attention)[None], None
        # The trial's first pass, which is of prompts alone: nothing is kept.
        for name in (name for name, given in others.items() if given is not None):
            if name not in _HARMLESS and not name.endswith("_router_logits"):
                raise UnsupportedModelError(f"its attention asks for {name}")
        _, num_heads, _, width = key.shape
        shape = LayerShape(
            num_heads=num_heads,
            key_width=width,
            value_width=value.shape[-1],
            dtype=key.dtype,
        )
        self._shapes.append(shape)
        parts = [
            prompt_attention(query[0][:, rows], key[0][:, rows], value[0][:, rows], rule)
            for rows in (slice(prompt.begin, prompt.end) for prompt in layout.prompts)
        ]
        return torch.cat(parts, 1).transpose(0, 1).contiguous()[None], None

    @torch.no_grad()
    def _try(self) -> None:
        """Two sequences run apart by the model, and together by us, as prompts and decoding."""
        vocabulary = int(self._model.config.get_text_config().vocab_size)
        draw = torch.Generator().manual_seed(0)
        first, other, last = (
            torch.randint(vocabulary, (length,), generator=draw).tolist()
            for length in (_TRIAL_TOKENS[0], *_TRIAL_TOKENS)
        )
        with _cheap_experts(self._handle.sites):
            expected = torch.stack([self._alone(ids) for ids in (first, last)])
            try:
                whole, behind, beside = self._together([first, last], [other, last])
            except UnsupportedModelError:
                raise
            except Exception as error:  # a forward that is not written for this, in many ways
                raise UnsupportedModelError(
                    f"it does not run without a cache ({type(error).__name__}: {error})"
                ) from error
            finally:
                self._pages = None
        if not torch.equal(whole[1], beside[1]):
            raise UnsupportedModelError("its tokens see those of other sequences")
        for logits in (whole, behind):
            distance = float((logits - expected).float().norm() / expected.float().norm())
            if not distance < _TOLERANCE.get(expected.dtype, _HALF_TOLERANCE):
                raise UnsupportedModelError(
                    f"its attention computes something else (logits are {distance:.1g} apart)"
                )

    def _alone(self, ids: list[int]) -> torch.Tensor:
        logits: torch.Tensor = self._model(input_ids=torch.tensor([ids]), use_cache=False).logits
        return logits[0, -1]

    def _together(
        self, prompts: list[list[int]], others: list[list[int]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits of `prompts` in one pass, of their last tokens behind all others, of `others`."""
        lengths = list(enumerate(map(len, prompts)))
        table = PageTable(sum(pages_for(length) for _, length in lengths))
        for sequence, length in lengths:
            table.hold(sequence, length)
        with self.passing():
            whole = self._prompt_pass(table, prompts)
            num_layers = int(self._model.config.get_text_config().num_hidden_layers)
            if len(self._shapes) != num_layers:
                raise UnsupportedModelError(
                    f"{len(self._shapes)} of its {num_layers} layers attend as we can"
                )
            pages = self.open_pages(table.num_pages)
            for sequence, length in lengths:
                pages.table.hold(sequence, length)
            beside = self._prompt_pass(pages.table, others)
            self._prompt_pass(pages.table, [ids[:-1] for ids in prompts])
            behind = self._forward(
                PassLayout.of(pages.table, lengths, []),
                [ids[-1] for ids in prompts],
                [length - 1 for _, length in lengths],
                _at_once,
            )
        return whole, behind, beside

    def _prompt_pass(self, table: PageTable, prompts: list[list[int]]) -> torch.Tensor:
        layout = PassLayout.of(table, [], [(n, len(ids)) for n, ids in enumerate(prompts)])
        ids = [token for prompt in prompts for token in prompt]
        positions = [i for prompt in prompts for i in range(len(prompt))]
        return self._forward(layout, ids, positions, _at_once)


def _at_once(attention: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Attend as one group does."""
    return attention()


def _configs(model: PreTrainedModel) -> Iterator[Any]:
    """Those that attention modules may ask for the name of their function."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            yield config


@contextmanager
def _cheap_experts(sites: Sequence[ExpertSite]) -> Iterator[None]:
    """Experts pass on what they get while this is entered: a trial of attention reads none."""
    modules = [site.module for site in sites if site.is_fused]
    try:
        for module in modules:
            module.__dict__["forward"] = lambda hidden, *_, **__: hidden
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)
