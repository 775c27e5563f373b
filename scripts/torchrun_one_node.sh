#!/usr/bin/env bash
# One machine: a rank for each of RANKS processes (or GPUs), which share the experts of a model.
# usage: RANKS=4 scripts/torchrun_one_node.sh MODEL --placement placement.json --prompts FILE --json
#        (arguments go on to `moe-runtime generate`; without --placement add --dispatch auto)
set -euo pipefail

ranks=${RANKS:-2}
cores=$(nproc)
# Ranks that each took all cores would wait for one another.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
exec torchrun --standalone --nproc-per-node "$ranks" -m moe_runtime generate "$@"
