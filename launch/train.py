"""Trains: `python -m launch.train --config configs/pretrain/130m.yaml --resume auto optim.lr=1e-3`."""

import sys

from mamba_pretrain.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
