"""`moe-runtime demo`: the bundled model, in a third of its experts' memory, checked."""

from pathlib import Path
from typing import Annotated

import typer

from moe_runtime.cli.options import Json, MaxNewTokens
from moe_runtime.cli.terminal import Terminal
from moe_runtime.errors import CheckpointError

CHECKPOINT = Path(__file__).resolve().parents[1] / "demo" / "mixtral-stdlib"
EXPERT_MEMORY = "33%"
# Greedy decoding of so small a model soon repeats itself.
TEMPERATURE = 0.7
SEED = 3
PROMPTS = (
    'def read_lines(path, encoding="utf-8"):\n',
    "class Queue:\n    def __init__(self, maxsize=0):\n",
)

EPILOG = """Example:

moe-runtime demo --max-new-tokens 100
"""


def demo(
    max_new_tokens: MaxNewTokens = 80,
    check: Annotated[
        bool, typer.Option(help="Compare with the unmodified model, in a process of its own.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Run the bundled model with a third of its experts in memory, and compare its output.

    It was trained on the sources of Python's standard library, and has 10 MB.
    """
    if not (CHECKPOINT / "config.json").is_file():
        raise CheckpointError(
            f"the bundled model is missing from {CHECKPOINT}; install moe-runtime again"
        )
    terminal = Terminal(as_json=as_json)
    with terminal.waiting("starting"):
        from moe_runtime.cli.generation_view import generate_and_show
        from moe_runtime.measure.decoding import Decoding
        from moe_runtime.measure.generation_request import GenerationRequest
    request = GenerationRequest(
        model=str(CHECKPOINT),
        prompts=PROMPTS,
        decoding=Decoding(max_new_tokens=max_new_tokens, temperature=TEMPERATURE, seed=SEED),
        expert_memory=EXPERT_MEMORY,
        warm_start=False,  # the same figures at every run
        check=check,
    )
    generate_and_show(request, terminal)
