#!/usr/bin/env bash
# Trains one adapter a task on one GPU, all side by side (a single run leaves the GPU nearly idle).
#   benchmarks/train_bank.sh OUT RANK ALPHA LR TASK... [-- EXTRA OPTIONS OF loralloy train]
set -euo pipefail
model=${MODEL:-.assets/models/SmolLM2-135M-Instruct} python=${PYTHON:-python3}
out=$1 rank=$2 alpha=$3 lr=$4
shift 4
tasks=()
while [[ $# -gt 0 && $1 != -- ]]; do tasks+=("$1"); shift; done
[[ $# -gt 0 ]] && shift
mkdir -p "$out" logs
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
for task in "${tasks[@]}"; do
  "$python" -m loralloy train "examples/tasks/$task.yaml" --model "$model" -o "$out/$task" \
    --base-name HuggingFaceTB/SmolLM2-135M-Instruct --rank "$rank" --alpha "$alpha" --lr "$lr" "$@" \
    > "logs/$task.log" 2>&1 &
done
wait
