#!/usr/bin/env bash
# Two machines: run this on both, NODE=0 on the one whose address HEAD is, NODE=1 on the other.
# usage: HEAD=10.0.0.1 NODE=0 RANKS=4 scripts/torchrun_two_nodes.sh MODEL --placement p.json --prompts FILE
#        (RANKS on each; solve the placement with --nodes 2; model and files lie at the same path)
set -euo pipefail

: "${HEAD:?set HEAD to the address of node 0}"
: "${NODE:?set NODE to 0 on the machine of HEAD and to 1 on the other}"
# gloo and NCCL take the interface of the host's name unless told: GLOO_SOCKET_IFNAME=eth0
exec torchrun --nnodes 2 --node-rank "$NODE" --nproc-per-node "${RANKS:-2}" \
    --master-addr "$HEAD" --master-port "${PORT:-29500}" \
    -m moe_runtime generate "$@"
