"""python -m torch.distributed.run --nproc-per-node N tests/ranks_driver.py FILE

Runs train.py several times in one group of processes, as starting a group takes longer than a short run. FILE
is a JSON list of command lines.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    for words in json.loads(Path(sys.argv[1]).read_text()):
        sys.argv = ["train.py", *words]
        train.main()
