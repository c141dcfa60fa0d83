"""The `mamba-pretrain` command: each subcommand parses its words and calls one function."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mamba_pretrain.checkpoint import CheckpointError
from mamba_pretrain.config import PRECISIONS, Config, ConfigError, DataConfig, load
from mamba_pretrain.data.loader import LoaderError
from mamba_pretrain.data.packing import n_windows
from mamba_pretrain.data.shards import ShardError, open_split, verify_up_to
from mamba_pretrain.data.tokenizer import TokenizerError, dataset_tokenizer, load_tokenizer
from mamba_pretrain.distributed.env import EXIT_PREEMPTED, autocast, keep_freed_memory, resolve_device
from mamba_pretrain.doctor import examine
from mamba_pretrain.evaluate.perplexity import EvaluationError, PerplexityResult, evaluate_documents, evaluate_windows
from mamba_pretrain.evaluate.report import ReportError, plot_run
from mamba_pretrain.export.convert import export_checkpoint, import_pretrained
from mamba_pretrain.export.formats import FormatError
from mamba_pretrain.export.pretrained import build_model, read_pretrained
from mamba_pretrain.model.describe import describe
from mamba_pretrain.model.generate import GenerationError, generate
from mamba_pretrain.model.law import LawError
from mamba_pretrain.ops.call import KernelError
from mamba_pretrain.plan.memory import peak
from mamba_pretrain.plan.report import add_arguments, plan
from mamba_pretrain.train import NonFiniteError, run

EXIT_UNHEALTHY, EXIT_USER, EXIT_NONFINITE, EXIT_INTERRUPTED = 1, 2, 3, 130
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
    """Exit codes: 0 done, 2 a mistake in the input (one message, no traceback), 3 training diverged, 75 preempted."""
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
    except NonFiniteError as error:
        print(f"mamba-pretrain {arguments.command}: training diverged\n{error}", file=sys.stderr)
        return EXIT_NONFINITE


def _train(arguments: argparse.Namespace) -> int:
    if arguments.resume is not None:
        arguments.overrides.append(f"checkpoint.resume={arguments.resume}")
    return run(_config(arguments))


def _describe(arguments: argparse.Namespace) -> None:
    config = _shaped_config(arguments)
    print(describe(config, peak(config, 1, "native")[1]))


def _plan(arguments: argparse.Namespace) -> None:
    print(plan(_shaped_config(arguments), arguments))


def _shaped_config(arguments: argparse.Namespace) -> Config:
    """With the shape of the weights to start from, and the dataset's vocabulary."""
    config = _config(arguments)
    if config.train.init_from is not None:
        config.model = read_pretrained(Path(config.train.init_from)).config
    if config.model.vocab_size is None and config.data.path is not None and Path(config.data.path).is_dir():
        _, manifest = open_split(config.data.path, config.data.train_split)
        config.model.vocab_size = manifest.tokenizer.vocab_size
    return config


def _eval_perplexity(arguments: argparse.Namespace) -> None:
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise EvaluationError(f"--json {arguments.json}: there is no directory {arguments.json.parent}")
    source = read_pretrained(arguments.model)
    keep_freed_memory()
    device = resolve_device(arguments.device)
    model = build_model(source).to(device)
    wanted = None if source.tokenizer_file is None else load_tokenizer(source.tokenizer_file).sha256
    shard, manifest = open_split(arguments.data, arguments.split, tokenizer_sha256=wanted)
    trained_on = source.run.data if source.run else DataConfig()
    verify_up_to(arguments.data, [arguments.split], trained_on.verify_gib)
    protocols = ["documents", "windows"] if arguments.protocol == "both" else [arguments.protocol]
    seq_len = trained_on.seq_len if arguments.window is None else arguments.window
    if "windows" in protocols and n_windows(shard, seq_len) == 0:
        reason = f"{shard.path} has {shard.n_tokens:,} tokens: no window of {seq_len:,} and one more to predict"
        if arguments.protocol == "windows":
            raise EvaluationError(f"{reason}. Choose a smaller --window, or --protocol documents")
        log.warning("%s; fixed windows are left out", reason)
        protocols.remove("windows")
    results = []
    if "documents" in protocols:
        results.append(
            evaluate_documents(
                model,
                shard,
                adds_bos=manifest.adds_bos,
                tokenizer=dataset_tokenizer(arguments.data, manifest),
                not_round_trip=manifest.not_round_trip,
                max_documents=arguments.max_documents,
                precision=arguments.precision,
                progress=True,
            )
        )
    if "windows" in protocols:
        results.append(
            evaluate_windows(
                model,
                shard,
                seq_len=seq_len,
                reset_documents=trained_on.reset_documents,
                batch=arguments.batch,
                max_windows=None,
                precision=arguments.precision,
            )
        )
    names = {"checkpoint": str(arguments.model), "config_hash": source.run.digest() if source.run else "-"}
    print(PerplexityResult.markdown_header())
    for result in results:
        print(result.markdown_row(**names))
    for reason in filter(None, [result.missing for result in results]):
        log.warning("%s", reason)
    if arguments.json is not None:
        arguments.json.write_text("[" + ",\n".join(result.to_json(**names) for result in results) + "]\n")


def _plot(arguments: argparse.Namespace) -> None:
    for path in plot_run(arguments.run, arguments.output or arguments.run):
        print(path)


def _export(arguments: argparse.Namespace) -> None:
    export_checkpoint(
        arguments.source, arguments.target, to=arguments.to, dtype=arguments.dtype, overwrite=arguments.overwrite
    )
    print(arguments.target)


def _import(arguments: argparse.Namespace) -> None:
    import_pretrained(
        arguments.source, arguments.target, from_format=arguments.from_format, overwrite=arguments.overwrite
    )
    print(arguments.target)


def _generate(arguments: argparse.Namespace) -> None:
    source = read_pretrained(arguments.model)
    device = resolve_device(arguments.device)
    model = build_model(source).to(device).eval()
    tokenizer = load_tokenizer(arguments.tokenizer or source.tokenizer_file or arguments.model)
    try:
        arguments.prompt.encode()
    except UnicodeEncodeError as error:
        raise GenerationError("--prompt is not UTF-8: give its bytes in that encoding") from error
    prompt_ids = tokenizer.encode(arguments.prompt)
    if source.facts.get("adds_bos", True):  # as the documents it was trained on; other formats do not tell
        prompt_ids = [tokenizer.bos_id, *prompt_ids]
    elif not prompt_ids:
        prompt_ids = [tokenizer.eod_id]  # a document begins where the last one ended
    tokens = generate(
        model,
        prompt_ids,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        stop_ids=(tokenizer.eod_id,),
        vocab_size=min(tokenizer.vocab_size, source.config.need("vocab_size")),
    )
    with autocast(arguments.precision, device):
        pieces = tokenizer.stream(tokens, context=prompt_ids)
        first = next(pieces, "")  # before anything is printed: here the model works for the first time
        for text in itertools.chain([arguments.prompt, first], pieces):
            sys.stdout.write(text)
            sys.stdout.flush()
    sys.stdout.write("\n")


def _doctor(arguments: argparse.Namespace) -> int:
    report = examine()
    print(json.dumps(report.to_json(), indent=1) if arguments.json else report)
    failures = report.failures(tuple(arguments.require))
    for failure in failures:
        log.error("%s", failure)
    return EXIT_UNHEALTHY if failures else 0


def _config(arguments: argparse.Namespace) -> Config:
    return load(arguments.config, arguments.overrides)


def _count(text: str) -> int:
    """An argument of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mamba-pretrain", description="Pretrains Mamba-1 language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, function: Callable[[argparse.Namespace], int | None], text: str, example: str) -> Any:
        sub = commands.add_parser(
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
        _train,
        "Train, evaluate and checkpoint. On SIGTERM, SIGINT or SIGUSR1 the run saves itself and leaves with exit code "
        f"{EXIT_PREEMPTED}; start it again with --resume auto.",
        "mamba-pretrain train --config configs/pretrain/130m.yaml --resume auto data.path=data/pile optim.lr=1e-3",
    )
    configured(train)
    train.add_argument(
        "--resume",
        metavar="auto|never|DIR",
        help="go on from the newest checkpoint, none, or this one (default: never)",
    )

    configured(
        command(
            "describe",
            _describe,
            "Print the resolved run: parameters, FLOPs and memory by part, steps, tokens, the law of each parameter.",
            "mamba-pretrain describe --config configs/pretrain/2.8b.yaml train.micro_batch_size=1",
        )
    )

    planned = command(
        "plan",
        _plan,
        "What a run needs on N GPUs with each engine: memory by part, traffic, time, cost, and the cheapest that fits.",
        "mamba-pretrain plan --config configs/pretrain/1.4b.yaml --gpus 16 --gpu h100 --json plan.json",
    )
    configured(planned)
    add_arguments(planned)

    perplexity = command(
        "eval",
        _eval_perplexity,
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
        "plot", _plot, "Draw a run's loss and validation perplexity as PNG.", "mamba-pretrain plot runs/quickstart"
    )
    plot.add_argument("run", type=Path, help="a run directory")
    plot.add_argument("--output", type=Path, help="directory of the PNGs (default: the run's)")

    export = command(
        "export",
        _export,
        "Write a checkpoint for transformers or for mamba_ssm: safetensors, config.json, tokenizer.",
        "mamba-pretrain export runs/x/checkpoints/step_00001000 exported --to hf",
    )
    export.add_argument("source", type=Path)
    export.add_argument("target", type=Path)
    export.add_argument("--to", required=True, choices=("hf", "mamba_ssm"))
    export.add_argument("--dtype", default="fp32", choices=PRECISIONS, help="of matrices; the rest stays fp32")

    imported = command(
        "import",
        _import,
        "Read a Hugging Face or mamba_ssm directory into ours. (To train from one, train.init_from takes it as it is.)",
        "mamba-pretrain import mamba-130m-hf models/mamba-130m --from hf",
    )
    imported.add_argument("source", type=Path)
    imported.add_argument("target", type=Path)
    imported.add_argument("--from", dest="from_format", choices=("hf", "mamba_ssm"), help="default: found out")
    for sub in (export, imported):
        sub.add_argument("--overwrite", action="store_true", help="replace the target once the new one is complete")

    doctor = command(
        "doctor",
        _doctor,
        "Which kernels work on this machine, for each that does not the reason and the command that mends it, "
        "versions, CPU and GPU, and a check of parity and speed. "
        f"Exit code {EXIT_UNHEALTHY} if a device has no fast kernels.",
        "mamba-pretrain doctor --require cuda || exit 1",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument(
        "--require", action="append", default=[], choices=("native", "cuda", "triton"), help="fail unless these work"
    )

    text = command(
        "generate",
        _generate,
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


if __name__ == "__main__":
    sys.exit(main())
