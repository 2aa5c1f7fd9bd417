#!/usr/bin/env bash
# Measure what only a GPU can show, in at most eight minutes on one card, in the order of its value:
#
#   scripts/research/gpu_minutes.sh [OUTPUT]      (results/bench/gpu)
#
# Each group of rows is written as soon as it is measured, so that a run which is cut short keeps what it has.
#   MINUTES=8       of the whole run
#   STAND_IN=1      the same steps on a CPU with small models, to see that the script works; the figures mean nothing
set -euo pipefail
cd "$(dirname "$0")/../.."

output=${1:-results/bench/gpu}
python=${PYTHON:-python}
end=$((SECONDS + 60 * ${MINUTES:-8}))
missed=0

# run a command within the time that is left; what fails does not keep the next one from running
within_time() {
    local left=$((end - SECONDS))
    echo "== ${left} s left: $*"
    if [ "$left" -lt 5 ]; then missed=$((missed + 1)); return; fi
    timeout "$left" "$@" || { echo "== failed or cut short: $*"; missed=$((missed + 1)); }
}

# rows MODE GROUP: one group of the suite, with all calls run in one mode
rows() {
    local suite=(--suite gpu --only "$2" --mode "$1" --seconds 8)
    if [ -n "${STAND_IN:-}" ]; then suite=(--suite quick --only "${3:-ViT*}" --layers 1 --rounds 2 --seconds 1); fi
    within_time "$python" -m hf_hardattn bench "${suite[@]}" --no-fixed-allocator --output "$output"
}

rows cuda_graphs "ViT-B/16 384 px batch 64, bfloat16"
rows cuda_graphs "ViT-B/16 384 px batch 1, bfloat16"
rows eager "ViT-B/16 384 px batch 64, bfloat16"
rows eager "ViT-B/16 384 px batch 1, bfloat16"
# nothing waits for the device at fixed budgets, and outputs on it are those of the CPU
within_time "$python" -m pytest -q -p no:cacheprovider tests/test_devices.py
rows cuda_graphs "T5-base encoder 2048*" "T5*"
rows eager "T5-base encoder 2048*" "T5*"
rows eager "T5-base decoding*" "T5*"
rows cuda_graphs "ViT-B/16 224 px batch 256*"
rows compiled "ViT-B/16 384 px batch 64, bfloat16"
rows eager "BLIP-base vision*"
rows eager "BLIP-base caption*"
rows eager "ViT-B/16 1024*"
rows eager "ViT-B/16 384 px batch 64, float32"

echo "== results: $output ($missed of 14 steps missed)"
