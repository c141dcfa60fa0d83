"""DeepSpeed's converter, kept from running what a file holds: `python -m mamba_pretrain.export.deepspeed_convert`.

deepspeed.checkpoint.ds_to_universal (0.19) unpickles every file of the checkpoint it is given, so the file decides what
runs. Here its `torch.load` is our `load_safely`, with the two classes of DeepSpeed's own that the converter works with.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from mamba_pretrain.export.deepspeed_files import load_safely
from mamba_pretrain.export.formats import FormatError

USED = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": ZeroStageEnum,
    "deepspeed.utils.tensor_fragment.fragment_address": fragment_address,
}


def load(path: Any, *_: Any, **__: Any) -> Any:
    return load_safely(path, USED)


if __name__ == "__main__":
    torch.load = load  # type: ignore[assignment]
    try:
        ds_to_universal.main(ds_to_universal.parse_arguments())
    except FormatError as error:
        sys.exit(" ".join(str(error).split()))  # one line, which is all that `convert` repeats
