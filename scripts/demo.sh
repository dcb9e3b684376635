#!/usr/bin/env bash
# Set up, make a small data set, train a Mask R-CNN on it with two processes under the deepspeed launcher,
# then evaluate and predict with the exported model. About six minutes on 2 cores.
#   scripts/demo.sh [key=value ...]     overrides of ds_configs/demo.json, for example train.steps=50
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup.sh

run=runs/demo
data=$run/data
rm -rf "$run/checkpoints" "$run/metrics.jsonl" "$run/export" "$run/predictions"

if [ ! -f "$data/val.json" ]; then
    echo "demo: making 2000 training and 200 validation images in $data"
    python -m giantdet.cli make-demo-data "$data" --train-images 2000 --val-images 200
fi

if [ "${DS_ACCELERATOR:-}" = cpu ]; then
    processes=2
    # Two processes and the loader's workers share the cores.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(($(nproc) > 1 ? $(nproc) / 2 : 1))}"
    # glibc keeps the memory of a step for the next one, instead of requesting zeroed pages from the system again.
    export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592
else
    gpus=$(nvidia-smi -L | wc -l)
    processes=$((gpus < 2 ? gpus : 2))
fi
echo "demo: training with $processes processes"
python -m deepspeed.launcher.runner --quiet --num_accelerators "$processes" scripts/train.py \
    --deepspeed_config ds_configs/demo.json "$@"

echo "demo: reloading the export, without DeepSpeed"
first=$(python - "$data/val.json" <<'PY'
import json, sys
from collections import Counter
content = json.load(open(sys.argv[1]))
objects = Counter(a["image_id"] for a in content["annotations"])
best = max(content["images"], key=lambda image: (objects[image["id"]] <= 8) * objects[image["id"]])
print(best["file_name"])
PY
)
python -m giantdet.cli predict "$run/export" "$data/val/$first" --output "$run/predictions"
python -m giantdet.cli eval "$run/export" --annotations "$data/val.json" --images "$data/val"

python scripts/demo_picture.py "$run" "$run/predictions/demo.jpg" >/dev/null

echo
echo "model      $run/export/model.safetensors"
echo "overlay    $run/predictions/${first%.*}.png"
echo "report     $run/report.html"
echo "picture    $run/predictions/demo.jpg"
echo "loss plot  $run/losses.png"
echo "scores     $run/scores.json"
echo "metrics    $run/metrics.jsonl"
