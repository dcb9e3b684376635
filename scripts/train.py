"""Train a detector: the entry point for every launcher.

deepspeed scripts/train.py --deepspeed_config ds_configs/X.json [key=value ...]
torchrun --nproc_per_node 8 scripts/train.py --deepspeed_config ds_configs/X.json
python scripts/train.py --deepspeed_config ds_configs/X.json
"""

import sys

from giantdet.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
