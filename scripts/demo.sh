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
# By name: what `export` would choose here by itself might not be teachable.
step export "$run" --fp32 --fp16 --features pooled --score gen+mahalanobispp
step eval "$run" --id demo:test --ood near=demo:near --ood photos=demo:photos --ood shapes=demo:shapes --json "$run/eval.json"
step bench "$run" --quick --ood photos=demo:photos --ood shapes=demo:shapes --json "$run/bench.json"

step report "$run" --id demo:test --ood near=demo:near --ood photos=demo:photos --ood shapes=demo:shapes \
    --bench "$run/bench.json" -o "$run/report.html"

python -c "from ssod_edge.data.demo import write_demo_images; write_demo_images('$run/images')"
step predict "$run" "$run/images"

# From unknown to known: what a camera meets is collected, looked at and taught; then training goes on from there.
printf '\n'
python scripts/demo_lesson.py meet "$run/field"
step predict "$run" "$run/field" --collect "$run/unknown" | grep -v "^$run/field"
step review "$run/unknown" --folders
python scripts/demo_lesson.py look "$run/unknown"
step review "$run/unknown" --folders --done
step teach "$run" "$run/unknown/classes" -o "$run/taught" --max-drop 2
printf '\n'
python scripts/demo_lesson.py photos "$run/photos" "$run/unknown"
step train "$run/photos" --from "$run/taught" -o "$run" --name desk --tune all --epochs 3 --batch-size 32 --lr 2e-3 --hflip 0
step export "$run/desk" --fp32 --target onnx --score gen+mahalanobispp
python scripts/demo_lesson.py compare "$run" "$run/taught" "$run/desk"

python scripts/demo_summary.py "$run" "$SECONDS"
