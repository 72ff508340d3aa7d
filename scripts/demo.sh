#!/usr/bin/env bash
# The whole product on the embedded data set: a few minutes on two cores. `make demo` installs first.
# Replaces runs/demo.
set -euo pipefail
cd "$(dirname "$0")/.."

run=runs/demo
rm -rf "$run"
SECONDS=0

step() {
    printf '\n$ ssod-edge %s\n' "$*"
    ssod-edge "$@"
}

step train demo --name demo --backbone test_resnet --weights none --size 64 --epochs 9 --batch-size 64 --lr 3e-3
step export "$run" --fp32 --fp16
step eval "$run" --id demo:test --ood near=demo:near --ood photos=demo:photos --ood shapes=demo:shapes --json "$run/eval.json"
step bench "$run" --quick --ood photos=demo:photos --ood shapes=demo:shapes --json "$run/bench.json"

python -c "from ssod_edge.data.demo import write_demo_images; write_demo_images('$run/images')"
step predict "$run" "$run/images"

python scripts/demo_summary.py "$run" "$SECONDS"
