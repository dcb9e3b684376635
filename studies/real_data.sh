#!/usr/bin/env bash
# Run the experiments of docs/real-data.md, from data that is already on this disk.
#   studies/real_data.sh DATA fruits_nuts|coco_panoptic200 [key=value ...]
# DATA holds fruits_nuts/, coco_panoptic200/ (annotations/instances_{train,val}.json, images/) and
# weights/resnet50_msra/resnet50_msra_stride1x1_fp16.safetensors.
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,5p' "$0" >&2
    exit 2
fi
data=$(cd "$1" && pwd) set=$2
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/setup.sh
[ "${DS_ACCELERATOR:-}" != cpu ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

overrides=(
    "data.train.annotations=$data/$set/annotations/instances_train.json"
    "data.val.annotations=$data/$set/annotations/instances_val.json"
    "data.train.images=$data/$set/images"
    "data.val.images=$data/$set/images"
    "model.backbone.init_weights=$data/weights/resnet50_msra/resnet50_msra_stride1x1_fp16.safetensors"
    "model.backbone.stride_in_1x1=true"
    "train.output=runs/$set"
)
if [ "$set" = coco_panoptic200 ]; then
    overrides+=("train.epochs=1")
fi
python -m deepspeed.launcher.runner --num_accelerators 2 scripts/train.py \
    --deepspeed_config ds_configs/mask_rcnn_resnet50_finetune_adamw.json "${overrides[@]}" "$@"
mapfile -t pictures < <(python - "$data/$set" <<'PY'
import json, pathlib, sys
root = pathlib.Path(sys.argv[1])
for image in json.loads((root / "annotations/instances_val.json").read_text())["images"][:4]:
    print(root / "images" / image["file_name"])
PY
)
python -m giantdet.cli predict "runs/$set/export" "${pictures[@]}" --output "runs/$set/predictions"
