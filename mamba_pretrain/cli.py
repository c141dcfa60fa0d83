"""The `mamba-pretrain` command: parses the words of each subcommand, and turns errors into exit codes."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mamba_pretrain import commands
from mamba_pretrain.checkpoint import CheckpointError
from mamba_pretrain.config import PRECISIONS, ConfigError
from mamba_pretrain.data.loader import LoaderError
from mamba_pretrain.data.shards import ShardError
from mamba_pretrain.data.tokenizer import TokenizerError
from mamba_pretrain.distributed.env import EXIT_PREEMPTED, leave
from mamba_pretrain.distributed.ranks import PeerError, find_ranks, lost_contact
from mamba_pretrain.evaluate.perplexity import EvaluationError
from mamba_pretrain.evaluate.report import ReportError
from mamba_pretrain.export.formats import FormatError
from mamba_pretrain.model.generate import GenerationError
from mamba_pretrain.model.law import LawError
from mamba_pretrain.ops.call import KernelError
from mamba_pretrain.plan.report import add_arguments
from mamba_pretrain.train import NonFiniteError

EXIT_LOST, EXIT_USER, EXIT_NONFINITE, EXIT_INTERRUPTED = 1, 2, 3, 130
FOLLOW_S = 2.0  # torchrun calls the earliest end the root cause, by clocks of whole seconds
USER_ERRORS = (
    ConfigError,
    ShardError,
    TokenizerError,
    CheckpointError,
    FormatError,
    LawError,
    LoaderError,
    EvaluationError,
    GenerationError,
    KernelError,
    ReportError,
    ImportError,  # of an optional package; the message names the extra that holds it
)

log = logging.getLogger("mamba_pretrain")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a mistake in the input (one message, no traceback), 3 training diverged, 75 preempted.

    1 an error of ours, with its traceback, or another rank's end; 4 no progress (see `distributed.watch`).
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse gives up on key=value words that come after an option; they mean the same there.
    if hasattr(arguments, "overrides") and all("=" in word and not word.startswith("-") for word in rest):
        arguments.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # No remarks about kernels in the midst of a text.
    log.setLevel(logging.WARNING if arguments.command == "generate" else logging.NOTSET)
    try:
        return int(arguments.function(arguments) or 0)
    except PeerError as error:  # the rank that failed says why; rank 0's output is what many look at
        if find_ranks().first:
            print(f"mamba-pretrain {arguments.command}: error\n{error}", file=sys.stderr)
        return EXIT_USER
    except USER_ERRORS as error:
        print(f"mamba-pretrain {arguments.command}: error\n{error}", file=sys.stderr)
        return EXIT_USER
    except BrokenPipeError:  # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"mamba-pretrain {arguments.command}: error\n{where}{error.strerror or error}", file=sys.stderr)
        return EXIT_USER
    except KeyboardInterrupt:
        print(f"mamba-pretrain {arguments.command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except NonFiniteError as error:  # which all ranks raise
        if find_ranks().first:
            print(f"mamba-pretrain {arguments.command}: training diverged\n{error}", file=sys.stderr)
        return EXIT_NONFINITE
    except RuntimeError as error:
        if not lost_contact(error):
            raise
        reason = str(error).splitlines()[0]
        print(
            f"rank {find_ranks().rank} ends, because another rank has: the first traceback or message above is the "
            f"cause, or that rank was killed ({reason})",
            file=sys.stderr,
        )
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(FOLLOW_S)
        return EXIT_LOST


def _count(text: str) -> int:
    """An argument of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mamba-pretrain", description="Pretrains Mamba-1 language models.")
    subcommands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, function: Callable[[argparse.Namespace], int | None], text: str, example: str) -> Any:
        sub = subcommands.add_parser(
            name, help=text, description=text, epilog=f"example:\n  {example}", formatter_class=_Help
        )
        sub.set_defaults(function=function)
        return sub

    def configured(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--config", action="append", default=[], metavar="YAML", help="may be repeated; later files win"
        )
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="options above the files: optim.lr=1e-3")

    def modelled(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--model",
            type=Path,
            required=True,
            help="a checkpoint, or a model in native, Hugging Face or mamba_ssm form",
        )
        sub.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
        sub.add_argument("--precision", default="fp32", choices=PRECISIONS, help="of matrix products")

    train = command(
        "train",
        commands.run_train,
        "Train, evaluate and checkpoint. On SIGTERM, SIGINT or SIGUSR1 the run saves itself and leaves with exit code "
        f"{EXIT_PREEMPTED}; start it again with --resume auto.",
        "mamba-pretrain train --config configs/pretrain/130m.yaml --resume auto data.path=data/pile optim.lr=1e-3",
    )
    configured(train)
    train.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed CLI adds it; the environment says it too
    train.add_argument(
        "--resume",
        metavar="auto|never|DIR",
        help="go on from the newest checkpoint, none, or this one (default: never)",
    )

    data = command(
        "data",
        commands.run_data,
        "What a run would read: tokens, epochs and repeats of each stage and source, what is masked or padding, the "
        "lengths of documents. Nothing is trained or written.",
        "mamba-pretrain data --dry-run --config configs/pretrain/130m.yaml data.path=data/pile --json reading.json",
    )
    configured(data)
    data.add_argument(
        "--dry-run", action="store_true", help="only look: the command does nothing else, so it may be left out"
    )
    data.add_argument("--rows", type=_count, default=4096, help="of the run's rows, drawn at random, to measure")
    data.add_argument("--json", type=Path, help="also write every figure here")

    described = command(
        "describe",
        commands.run_describe,
        "Print the resolved run: parameters, FLOPs and memory by part, steps, tokens, the law of each parameter.",
        "mamba-pretrain describe --config configs/pretrain/2.8b.yaml train.micro_batch_size=1",
    )
    configured(described)
    described.add_argument(
        "--deepspeed",
        type=_count,
        metavar="RANKS",
        help="print only DeepSpeed's configuration, as derived for so many ranks",
    )

    planned = command(
        "plan",
        commands.run_plan,
        "What a run needs on N GPUs with each engine: memory by part, traffic, time, cost, and the cheapest that fits.",
        "mamba-pretrain plan --config configs/pretrain/1.4b.yaml --gpus 16 --gpu h100 --json plan.json",
    )
    configured(planned)
    add_arguments(planned)

    perplexity = command(
        "eval",
        commands.run_eval_perplexity,
        "Measure a model: perplexity per token and word, bits per byte.",
        "mamba-pretrain eval perplexity --model runs/x/checkpoints/step_00001000 --data data/pile --json ppl.json",
    )
    perplexity.add_argument("what", choices=("perplexity",))
    modelled(perplexity)
    perplexity.add_argument("--data", type=Path, required=True, help="a dataset made by data_prep.build_shards")
    perplexity.add_argument("--split", default="validation", help="of the dataset")
    perplexity.add_argument(
        "--protocol",
        default="both",
        choices=("documents", "windows", "both"),
        help="whole documents with the state carried on, or fixed windows from an empty state as in training",
    )
    perplexity.add_argument("--max-documents", type=_count, help="of the documents protocol: only the first so many")
    perplexity.add_argument(
        "--window",
        type=_count,
        help="tokens of a fixed window (default: the length the model was trained at, else 2048)",
    )
    perplexity.add_argument("--batch", type=_count, default=8, help="fixed windows in one forward pass")
    perplexity.add_argument("--json", type=Path, help="also write every figure here")

    plot = command(
        "plot",
        commands.run_plot,
        "Draw a run's loss and validation perplexity as PNG.",
        "mamba-pretrain plot runs/quickstart",
    )
    plot.add_argument("run", type=Path, help="a run directory")
    plot.add_argument("--output", type=Path, help="directory of the PNGs (default: the run's)")

    export = command(
        "export",
        commands.run_export,
        "Write a checkpoint for transformers or for mamba_ssm: safetensors, config.json, tokenizer.",
        "mamba-pretrain export runs/x/checkpoints/step_00001000 exported --to hf",
    )
    export.add_argument("source", type=Path)
    export.add_argument("target", type=Path)
    export.add_argument("--to", required=True, choices=("hf", "mamba_ssm"))
    export.add_argument("--dtype", default="fp32", choices=PRECISIONS, help="of matrices; the rest stays fp32")

    imported = command(
        "import",
        commands.run_import,
        "Read a Hugging Face or mamba_ssm directory into ours. (To train from one, train.init_from takes it as it is.) "
        "Or a DeepSpeed checkpoint, ZeRO-1 to 3: as a model, or, with data.path and the other options of the run that "
        "is to go on from it, as a checkpoint with optimizer state in the run directory TARGET.",
        "mamba-pretrain import zero3 runs/x --from deepspeed --config configs/pretrain/130m.yaml data.path=data/pile",
    )
    imported.add_argument("source", type=Path)
    imported.add_argument("target", type=Path)
    imported.add_argument(
        "--from",
        dest="from_format",
        choices=("hf", "mamba_ssm", "deepspeed"),
        help="default: hf or mamba_ssm, found out",
    )
    imported.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="deepspeed: sequences consumed (default: as many as our steps take)",
    )
    configured(imported)
    for sub in (export, imported):
        sub.add_argument("--overwrite", action="store_true", help="replace the target once the new one is complete")

    doctor = command(
        "doctor",
        commands.run_doctor,
        "Which kernels work on this machine, for each that does not the reason and the command that mends it, "
        "versions, CPU and GPU, and a check of parity and speed. "
        f"Exit code {commands.EXIT_UNHEALTHY} if a device has no fast kernels.",
        "mamba-pretrain doctor --require cuda || exit 1",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument(
        "--require", action="append", default=[], choices=("native", "cuda", "triton"), help="fail unless these work"
    )

    text = command(
        "generate",
        commands.run_generate,
        "Continue a text. Every token costs the same time and memory, however long the text is.",
        "mamba-pretrain generate --model runs/x/checkpoints/step_00001000 --prompt 'My fellow' --temperature 0.8",
    )
    modelled(text)
    text.add_argument("--prompt", default="", help="default: the start of a document")
    text.add_argument("--tokenizer", help="default: the one beside the model")
    text.add_argument("--max-tokens", type=int, default=200)
    text.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest token")
    text.add_argument("--top-k", type=int, default=0, help="only the k likeliest tokens (0: all)")
    text.add_argument("--top-p", type=float, default=1.0, help="only the fewest tokens that hold this probability")
    text.add_argument("--seed", type=int, default=0)
    return parser


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the example's line as it is, and names defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def command() -> NoReturn:
    leave(main())


if __name__ == "__main__":
    command()
