#!/usr/bin/env bash
# Trains one adapter a task on one GPU, all side by side (a single run leaves the GPU nearly idle).
#   benchmarks/train_bank.sh OUT RANK ALPHA LR TASK... [-- EXTRA OPTIONS OF loralloy train]
# TASK: the name of a file in examples/tasks, a task file, or a folder of them. A line of progress now and then on stderr.
set -euo pipefail
model=${MODEL:-.assets/models/SmolLM2-135M-Instruct} python=${PYTHON:-python3}
out=$1 rank=$2 alpha=$3 lr=$4
shift 4
tasks=()
while [[ $# -gt 0 && $1 != -- ]]; do
  if [[ -e $1 ]]; then tasks+=("$1"); else tasks+=("examples/tasks/$1.yaml"); fi
  shift
done
[[ $# -gt 0 ]] && shift
exec "$python" -m loralloy train --bank "${tasks[@]}" --model "$model" -o "$out" \
  --base-name HuggingFaceTB/SmolLM2-135M-Instruct --rank "$rank" --alpha "$alpha" --lr "$lr" "$@"
