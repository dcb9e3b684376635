"""Check the hosts of a run and the network between them: `giantdet doctor` under any launcher.

deepspeed --hostfile hosts scripts/doctor.py [--output FOLDER]
torchrun --nproc_per_node 8 scripts/doctor.py
srun python scripts/doctor.py
"""

import sys

from giantdet.cli import main

if __name__ == "__main__":
    sys.exit(main(["doctor", *sys.argv[1:]]))
