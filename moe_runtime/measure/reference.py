"""Unmodified transformers in a process of its own, for comparison: `python reference.py REQUEST`.

Imports nothing of moe_runtime, so nothing of it can change what transformers computes. REQUEST is a
JSON file (see `parity.py`); each prompt's tokens and logits go to a safetensors file beside it.
"""

import json
import sys
from pathlib import Path


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
    model = AutoModelForCausalLM.from_pretrained(
        request["folder"],
        dtype=request["dtype"],
        experts_implementation="eager",
        local_files_only=True,
        trust_remote_code=trust,
    ).to(request["device"])
    arguments = request["generate_arguments"]
    if "stop_strings" in arguments:
        arguments["tokenizer"] = AutoTokenizer.from_pretrained(
            request["folder"], local_files_only=True, trust_remote_code=trust
        )
    for index, prompt in enumerate(request["prompts"]):
        torch.manual_seed(prompt["seed"])
        inputs = torch.tensor([prompt["token_ids"]], device=model.device)
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=prompt["max_new_tokens"],
            return_dict_in_generate=True,
            output_logits=True,
            **arguments,
        )
        token_ids = output.sequences[0, inputs.shape[1] :].cpu().contiguous()
        logits = torch.cat(output.logits).float().cpu()
        answer = request_file.with_name(f"answer-{index}.safetensors")
        save_file({"token_ids": token_ids, "logits": logits}, answer)


def _volunteer_for_the_out_of_memory_killer() -> None:
    """If the unmodified model does not fit, this process must go, not the one that asked."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:  # not Linux
        pass


if __name__ == "__main__":
    main()
