"""Unmodified transformers in a process of its own, for comparison: `python reference.py REQUEST`.

Imports nothing of moe_runtime, so nothing of it can change what transformers computes. REQUEST is a
JSON file (see `parity.py`); tokens and logits of each prompt, and of each given sequence, of each
of its runs go to a safetensors file beside it.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    request_file = Path(sys.argv[1])
    request = json.loads(request_file.read_text())
    _volunteer_for_the_out_of_memory_killer()

    import torch
    import transformers
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(request["num_threads"])
    trust = request["trust_remote_code"]
    dequantised = _dequantised(request["quantisation"])
    for number, run in enumerate(request["runs"]):
        model = AutoModelForCausalLM.from_pretrained(
            request["folder"],
            dtype=run["dtype"],
            experts_implementation="eager",
            local_files_only=True,
            trust_remote_code=trust,
            **dequantised,
        ).to(request["device"])
        if dequantised and run["dtype"] == "float32":
            model.float()  # transformers 5.23 leaves as they are what is not quantised
        answers = []
        for prompt in run["prompts"]:
            arguments = dict(run["generate_arguments"])
            if "stop_strings" in arguments:
                arguments["tokenizer"] = AutoTokenizer.from_pretrained(
                    request["folder"], local_files_only=True, trust_remote_code=trust
                )
            torch.manual_seed(prompt["seed"])
            answers.append(
                _generate(model, prompt["token_ids"], prompt["max_new_tokens"], arguments)
            )
        for sequence in run["forced"]:
            token_ids, begin = sequence["token_ids"], sequence["num_prompt_tokens"]
            follow = _Follow(token_ids)
            arguments = {"do_sample": False, "num_beams": 1, "logits_processor": [follow]}
            num_new = len(token_ids) - begin
            answers.append(_generate(model, token_ids[:begin], num_new, arguments))
        for index, answer in enumerate(answers):
            save_file(answer, request_file.with_name(f"answer-{number}-{index}.safetensors"))
        del model  # before the next one needs its memory


def _dequantised(quantisation: str | None) -> dict[str, Any]:
    """Arguments that make `from_pretrained` dequantise on any machine, with a GPU or without."""
    if quantisation is None:
        return {}
    from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

    if quantisation == "fp8":
        _mend_cut_squares()
        return {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    return {"quantization_config": Mxfp4Config(dequantize=True)}


def _mend_cut_squares() -> None:
    """Let transformers 5.23 read fp8 weights whose sides 128 does not divide.

    It takes the side of a square to be the weight's over the number of scales: an error, or other
    weights, where the last square is cut. All others it reads itself.
    """
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    unmodified = Fp8Dequantize._dequantize_one

    def dequantize(self: Any, values: Any, scales: Any, output_dtype: Any = None) -> Any:
        rows, columns = values.shape
        if all(side % 128 == 0 or side < 128 for side in (rows, columns)):
            return unmodified(self, values, scales, output_dtype)
        by_row = scales.float().repeat_interleave(128, 0)[:rows]
        by_weight = by_row.repeat_interleave(128, 1)[:, :columns]
        return (values.float() * by_weight).to(output_dtype)

    Fp8Dequantize._dequantize_one = dequantize  # type: ignore[method-assign, assignment]


def _generate(
    model: Any, token_ids: list[int], max_new_tokens: int, arguments: dict[str, Any]
) -> dict[str, Any]:
    """New tokens, and the logits that they were chosen from, before any processor."""
    import torch

    inputs = torch.tensor([token_ids], device=model.device)
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=True,
        output_logits=True,
        **arguments,
    )
    return {
        "token_ids": output.sequences[0, inputs.shape[1] :].cpu().contiguous(),
        "logits": torch.cat(output.logits).float().cpu(),
    }


class _Follow:
    """Lets `generate()` choose the tokens that are given, so that only its logits are its own."""

    def __init__(self, token_ids: list[int]) -> None:
        self._token_ids = token_ids

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores = scores.new_full(scores.shape, float("-inf"))
        scores[:, self._token_ids[input_ids.shape[1]]] = 0.0
        return scores


def _volunteer_for_the_out_of_memory_killer() -> None:
    """If the unmodified model does not fit, this process must go, not the one that asked."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:  # not Linux
        pass


if __name__ == "__main__":
    main()
