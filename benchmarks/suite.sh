#!/usr/bin/env bash
# The whole table on one GPU: every method of a suite by every task, in several processes, then its cells packed into $OUT.
#   benchmarks/suite.sh [SUITE] [JOBS] [EXTRA OPTIONS OF loralloy evaluate]
# A run that is stopped goes on where it was, as long as its folder of cells is there.
set -euo pipefail
python=${PYTHON:-python3}
suite=${1:-examples/suite/suite.yaml} jobs=${2:-6}
shift $(( $# < 2 ? $# : 2 ))
cells=${CELLS:-.assets/suite/out}
export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
start=$(date +%s)
"$python" -m loralloy evaluate "$suite" --jobs "$jobs" --out "$cells" "$@"
echo "took $(( $(date +%s) - start )) s in $jobs processes"
if [[ -n ${OUT:-} ]]; then
  tar -C "$cells" -cf - cells | xz -T0 -6 > "$OUT/cells.tar.xz"
  ls -l "$OUT/cells.tar.xz"
fi
