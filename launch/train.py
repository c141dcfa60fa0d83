"""Trains: `python -m launch.train --config configs/pretrain/130m.yaml --resume auto optim.lr=1e-3`."""

import sys

from torch.distributed.elastic.multiprocessing.errors import record

from mamba_pretrain.cli import main
from mamba_pretrain.distributed.env import leave

if __name__ == "__main__":
    # record: torchrun's summary of a failure then shows the traceback of the rank that failed first
    leave(record(main)(["train", *sys.argv[1:]]) or 0)
