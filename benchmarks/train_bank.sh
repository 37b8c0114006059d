#!/usr/bin/env bash
# Trains the shipped bank on one GPU, several processes side by side (one alone leaves it nearly idle).
#   benchmarks/train_bank.sh MODEL OUT RANK ALPHA LR TASK...
set -euo pipefail
model=$1 out=$2 rank=$3 alpha=$4 lr=$5
shift 5
mkdir -p "$out"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
for task in "$@"; do
  python3 -m loralloy train "examples/tasks/$task.yaml" --model "$model" -o "$out/$task" \
    --base-name HuggingFaceTB/SmolLM2-135M-Instruct --rank "$rank" --alpha "$alpha" --lr "$lr" \
    > "$out/$task.log" 2>&1 &
done
wait
