"""What ranks do in tests: load a checkpoint together and continue prompts of their own."""

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import moe_runtime
from moe_runtime.expert import ExpertKey
from moe_runtime.integrations.transformers.ep_implementation import RankExperts
from moe_runtime.measure.completion import complete
from moe_runtime.measure.decoding import Decoding
from moe_runtime.measure.prompt import Prompt, load_tokenizer
from moe_runtime.parallel.ledger import MIGRATION
from moe_runtime.placement_map import Placement

Batch = list[list[int]]  # prompts that are equally long, and run together


def continue_greedily(model: Any, batches: list[Batch], new_tokens: int) -> list[list[int]]:
    """New tokens of every prompt."""
    found = []
    for batch in batches:
        inputs = torch.tensor(batch)
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=new_tokens,
            do_sample=False,
        )
        found += output[:, inputs.shape[1] :].tolist()
    return found


def generate_on_ranks(
    mesh: DeviceMesh,
    folder: str,
    batches_by_rank: list[list[Batch]],
    new_tokens: int,
    dispatch: str,
    placement: Placement | None,
    expert_memory: str,
    payload: str = "exact",
    pipeline: Any = 1,
) -> dict[str, Any]:
    """Tokens of this rank's prompts, its report, and keys that it should never have read."""
    model = moe_runtime.load(
        folder,
        mesh=mesh,
        dispatch=dispatch,
        placement=placement,
        expert_memory=expert_memory,
        payload=payload,
        pipeline=pipeline,
        dtype=torch.float32,
    )
    handle = moe_runtime.handle(model)
    assert handle.parallel is not None
    tokens = continue_greedily(model, batches_by_rank[mesh.get_local_rank()], new_tokens)
    handle.parallel.finish()
    held = handle.parallel.plan.held
    strangers = [
        (layer, expert)
        for layer, expert in zip(*(~held).nonzero(), strict=True)
        if ExpertKey(int(layer), int(expert)) in handle.engine.cache
    ]
    report = handle.report()
    handle.close()
    return {"tokens": tokens, "report": report, "strangers": strangers}


def migrate_while_generating(
    mesh: DeviceMesh,
    folder: str,
    batches_by_rank: list[list[Batch]],
    new_tokens: int,
    dispatch: str,
    to: list[Placement],
    expert_memory: str,
) -> dict[str, Any]:
    """What `generate_on_ranks` does, but rank 0 asks for the next of `to` at every other forward.

    From linear placement. `refused` is what it is told when it asks.
    """
    model = moe_runtime.load(
        folder, mesh=mesh, dispatch=dispatch, expert_memory=expert_memory, dtype=torch.float32
    )
    handle = moe_runtime.handle(model)
    parallel = handle.parallel
    assert parallel is not None
    is_first = mesh.get_local_rank() == 0
    waiting, refused, forwards = list(to), "", 0

    def before_forward(*_: Any) -> None:
        nonlocal forwards
        forwards += 1
        if is_first and waiting and forwards % 2 == 0:
            parallel.ask_to_migrate(waiting.pop(0))

    model.register_forward_pre_hook(before_forward)
    tokens = continue_greedily(model, batches_by_rank[mesh.get_local_rank()], new_tokens)
    if is_first and waiting:
        try:
            parallel.ask_to_migrate(waiting.pop(0))
        except ValueError as error:
            refused = f"{type(error).__name__}: {error}"
    parallel.finish()
    held = parallel.plan.held
    strangers = [
        (layer, expert)
        for layer, expert in zip(*(~held).nonzero(), strict=True)
        if ExpertKey(int(layer), int(expert)) in handle.engine.cache
    ]
    report = handle.report()
    books = parallel.world.ledger.sent().get(MIGRATION)
    handle.close()
    return {
        "tokens": tokens,
        "report": report,
        "strangers": strangers,
        "refused": refused,
        "migration_predicted": 0 if books is None else sum(books.predicted_bytes),
    }


def generate_with(
    mesh: DeviceMesh,
    folder: str,
    batches_by_rank: list[list[Batch]],
    new_tokens: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Tokens of this rank's prompts and its report; `options` are of `load`."""
    model = moe_runtime.load(folder, mesh=mesh, dtype=torch.float32, **options)
    handle = moe_runtime.handle(model)
    assert handle.parallel is not None
    tokens = continue_greedily(model, batches_by_rank[mesh.get_local_rank()], new_tokens)
    handle.parallel.finish()
    report = handle.report()
    handle.close()
    return {"tokens": tokens, "report": report}


def exact_logits(
    mesh: DeviceMesh,
    folder: str,
    prompts_by_rank: list[list[list[int]]],
    new_tokens: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Logits of this rank's prompts in the checkpoint's dtype, and what was sent for them."""
    model = moe_runtime.load(folder, mesh=mesh, exact=True, **options)
    handle = moe_runtime.handle(model)
    assert handle.parallel is not None
    logits = generate_logits(model, prompts_by_rank[mesh.get_local_rank()], new_tokens)
    handle.parallel.finish()
    report = handle.report()
    handle.close()
    return {"logits": logits, "parallel": report["parallel"]}


def prompt_logits(
    mesh: DeviceMesh, folder: str, prompts: list[list[int]], options: dict[str, Any]
) -> list[torch.Tensor]:
    """`[tokens, vocab]` of every G-th prompt, from this rank on, in the checkpoint's dtype.

    With tensor-parallel attention of every prompt.
    """
    model = moe_runtime.load(folder, mesh=mesh, expert_memory="100%", **options)
    handle = moe_runtime.handle(model)
    assert handle.parallel is not None
    step = 1 if options.get("attention") == "tensor" else mesh.size()
    mine = prompts[mesh.get_local_rank() % step :: step]
    with torch.no_grad():
        logits = [model(torch.tensor([prompt]), use_cache=True).logits[0] for prompt in mine]
    handle.parallel.finish()
    handle.close()
    return logits


def generate_logits(model: Any, prompts: list[list[int]], new_tokens: int) -> list[torch.Tensor]:
    """`[new tokens, vocab]` of each prompt, which runs alone."""
    found = []
    for prompt in prompts:
        inputs = torch.tensor([prompt])
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        found.append(torch.cat(output.logits))
    return found


def continue_padded(
    mesh: DeviceMesh | None, folder: str, prompts: list[list[int]], new_tokens: int
) -> Any:
    """New tokens of a batch that is padded on the left, by rank 0 alone; None is one process."""
    length = max(map(len, prompts))
    inputs = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    arguments = {"attention_mask": mask, "max_new_tokens": new_tokens, "do_sample": False}
    if mesh is None:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, experts_implementation="eager"
        )
        return model.generate(inputs, **arguments)[:, length:].tolist()
    model = moe_runtime.load(folder, mesh=mesh, dispatch="coherent", dtype=torch.float32)
    handle = moe_runtime.handle(model)
    found = None
    if mesh.get_local_rank() == 0:
        found = model.generate(inputs, **arguments)[:, length:].tolist()
    assert handle.parallel is not None
    handle.parallel.finish()
    handle.close()
    return found


def error_of(
    mesh: DeviceMesh, folder: str, options: dict[str, Any], arguments: dict[str, Any]
) -> str:
    """What loading, or generating with `arguments`, raises on this rank."""
    inputs = torch.tensor([[5, 6, 7]])
    try:
        model = moe_runtime.load(folder, mesh=mesh, dtype=torch.float32, **options)
        model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=3,
            do_sample=False,
            **arguments,
        )
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def stop_early(mesh: DeviceMesh, folder: str, prompt: list[int]) -> list[str]:
    """Finish reasons, where rank 1 is asked to stop and rank 0 has two prompts to run."""
    tokenizer = load_tokenizer(folder)  # type: ignore[arg-type]
    model = moe_runtime.load(folder, mesh=mesh, dispatch="alltoall", dtype=torch.float32)
    handle = moe_runtime.handle(model)
    parallel = handle.parallel
    assert parallel is not None
    reasons = []
    if mesh.get_local_rank() == 1:
        parallel.ask_to_stop()
    else:
        while len(reasons) < 2 and not parallel.is_stop_asked:
            one = Prompt(index=0, text="", token_ids=prompt, max_new_tokens=50)
            done = complete(
                model,
                tokenizer,
                one,
                Decoding(max_new_tokens=50),
                is_stop_asked=lambda: parallel.is_stop_asked,
            )
            reasons += [done.finish_reason, str(len(done.token_ids))]
    parallel.finish()
    handle.close()
    return reasons


def generate_by_transformers(
    mesh: DeviceMesh, folder: str, batches: list[Batch], new_tokens: int, implementation: str
) -> dict[str, Any]:
    """Tokens by transformers' own expert parallelism on all ranks, and bytes by our ledger."""
    size = mesh.size()
    config = DistributedConfig(tp_size=size, ep_size=size, ep_implementation=implementation)
    moe_runtime.register()
    model = AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=config, dtype=torch.float32, experts_implementation="eager"
    )
    tokens = continue_greedily(model, batches, new_tokens)
    made = [
        cell.cell_contents
        for module in model.modules()
        for cell in getattr(module.__dict__.get("forward"), "__closure__", None) or ()
        if isinstance(cell.cell_contents, RankExperts)
    ]
    books = [line for one in made if one.ledger is not None for line in one.ledger.sent().values()]
    return {
        "tokens": tokens,
        "modules": len(made),
        "bytes": sum(sum(line.num_bytes) for line in books),
        "predicted": sum(sum(line.predicted_bytes) for line in books),
    }
