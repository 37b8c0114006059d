#!/usr/bin/env bash
# The benchmarks that want GPUs, one after the other on all GPUs of one machine, until the time is over; run it again to go on.
#
#   benchmarks/gpu.sh SECONDS JOBS PART...     PART: adaptive:BENCH[+BENCH], beside:BENCH[+BENCH], growth:BENCH, tada, serving, learning, shift
#   benchmarks/gpu.sh 1500 26 beside:sentiment4+emoji4 growth:text20
#
# adaptive:BENCH computes a bench whole, several part by part; beside:BENCH what its page in docs/results lacks, on the same adapters trained again
# (then `report.py PAGE --write --add`). growth:BENCH trains a bench's adapters and times its growth. tada trains, chooses its designs by the development pairs and goes on to the final ones.
# growth, serving, learning and shift are timed or small: they have the last GPU to themselves. JOBS: processes side by side; 13 a GPU of
# 140 GB were found to keep it busy. Output goes to .assets/gpu/PART.log.
set -uo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 3 ] || { sed -n '2,5p' "$0" >&2; exit 2; }
end=$(( $(date +%s) + $1 )); jobs=$2; shift 2
python=${PYTHON:-python3}; logs=.assets/gpu; mkdir -p "$logs"
gpus=$($python -c 'import torch; print(torch.cuda.device_count())')
[ "$gpus" -gt 0 ] || { echo "no GPU is seen by torch" >&2; exit 1; }
nvidia-cuda-mps-control -d 2>/dev/null && trap 'echo quit | nvidia-cuda-mps-control' EXIT  # processes of a GPU side by side

left() { echo $(( end - $(date +%s) - 15 )); }
told() { echo "$1: $(tail -n 1 "$logs/$1.log")"; }
alone() { # alone NAME COMMAND...: on the last GPU, beside nothing
  CUDA_VISIBLE_DEVICES=$(( gpus - 1 )) CUDA_MPS_PIPE_DIRECTORY=/nonexistent OMP_NUM_THREADS=4 \
    timeout "$(left)" "$python" "${@:2}" > "$logs/$1.log" 2>&1; told "$1"
}
tada() { "$python" benchmarks/tada/run.py --jobs "$jobs" --until "$(left)" "$@" > "$logs/tada.log" 2>&1; told tada; }

for part in "$@"; do
  [ "$(left)" -gt 30 ] || { echo "no time left for $part"; continue; }
  case $part in
    adaptive:*|beside:*)
      bench=${part#*:}; more=(); [ "${part%%:*}" = beside ] && more=(--beside docs/results)
      # shellcheck disable=SC2086  # several benches are several words
      "$python" benchmarks/adaptive/run.py --bench ${bench//+/ } "${more[@]}" --jobs "$jobs" --until "$(left)" > "$logs/$bench.log" 2>&1
      told "$bench" ;;
    growth:*)
      bench=${part#*:}
      "$python" benchmarks/adaptive/run.py --bench "$bench" --parts own --jobs "$jobs" --until "$(left)" > "$logs/$bench-own.log" 2>&1
      told "$bench-own"
      [ "$(left)" -gt 30 ] || { echo "no time left to time $bench"; continue; }
      alone "$bench" benchmarks/adaptive/run.py --bench "$bench" --parts f --jobs 1 --until "$(left)" ;;
    tada)
      export CUBLAS_WORKSPACE_CONFIG=:4096:8  # trainings that repeat themselves, as far as they do
      tada --parts task domain own screen develop
      "$python" benchmarks/tada/choose.py --write > "$logs/choose.log" 2>&1; told choose
      tada
      unset CUBLAS_WORKSPACE_CONFIG ;;
    serving) alone serving benchmarks/serving.py decode logits --device cuda --tokens 32 --limit "$(left)" --write ;;
    learning) alone learning benchmarks/learning.py --write ;;
    shift) alone shift benchmarks/tada/shift.py --write ;;
    *) echo "part '$part' is not known: adaptive:BENCH, beside:BENCH, growth:BENCH, tada, serving, learning, shift" >&2; exit 2 ;;
  esac
done
