"""What each subcommand of `mamba-pretrain` does with its parsed words; `cli` parses them."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import sys
from pathlib import Path

from mamba_pretrain.adopt import import_deepspeed
from mamba_pretrain.config import Config, ConfigError, DataConfig, load
from mamba_pretrain.data.dataset import open_split, verify_up_to
from mamba_pretrain.data.packing import n_windows
from mamba_pretrain.data.tokenizer import dataset_tokenizer, load_tokenizer
from mamba_pretrain.distributed.env import autocast, keep_freed_memory, resolve_device
from mamba_pretrain.distributed.ranks import PeerError, find_ranks
from mamba_pretrain.distributed.zero import deepspeed_config
from mamba_pretrain.doctor import examine
from mamba_pretrain.evaluate.perplexity import EvaluationError, PerplexityResult, evaluate_documents, evaluate_windows
from mamba_pretrain.evaluate.report import plot_run
from mamba_pretrain.export.convert import export_checkpoint, import_pretrained
from mamba_pretrain.export.deepspeed import DEEPSPEED
from mamba_pretrain.export.pretrained import build_model, read_pretrained
from mamba_pretrain.model.describe import describe
from mamba_pretrain.model.generate import GenerationError, generate
from mamba_pretrain.plan.memory import peak
from mamba_pretrain.plan.report import plan
from mamba_pretrain.preview import preview, text
from mamba_pretrain.train import run

EXIT_UNHEALTHY = 1

log = logging.getLogger("mamba_pretrain")


def run_train(arguments: argparse.Namespace) -> int:
    if arguments.resume is not None:
        arguments.overrides.append(f"checkpoint.resume={arguments.resume}")
    ranks = find_ranks()
    if not ranks.first:
        log.setLevel(logging.ERROR)  # rank 0 speaks for all
    try:
        config = resolved(arguments, ranks.world)
    except ConfigError as error:
        if ranks.local_rank == 0:
            raise
        raise PeerError(str(error)) from error  # the first rank of this host has read the same, and says so
    return run(config)


def run_describe(arguments: argparse.Namespace) -> None:
    if arguments.deepspeed is not None:
        config = resolved(arguments, arguments.deepspeed)
        if config.train.engine != "zero":
            raise ConfigError([f"train.engine is {config.train.engine}: only train.engine=zero uses DeepSpeed"])
        print(json.dumps(deepspeed_config(config, arguments.deepspeed), indent=1))
        return
    config = _shaped_config(arguments)
    print(describe(config, peak(config, 1, "native")[1]))


def run_plan(arguments: argparse.Namespace) -> None:
    print(plan(_shaped_config(arguments), arguments))


def run_data(arguments: argparse.Namespace) -> None:
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise ConfigError([f"--json {arguments.json}: there is no directory {arguments.json.parent}"])
    figures = preview(resolved(arguments), arguments.rows)
    print(text(figures))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def _shaped_config(arguments: argparse.Namespace) -> Config:
    """With the shape of the weights to start from, and the dataset's vocabulary."""
    config = resolved(arguments)
    if config.train.init_from is not None:
        config.model = read_pretrained(Path(config.train.init_from)).config
    paths = [str(source.path) for source in config.data.named_sources if Path(str(source.path)).is_dir()]
    if config.model.vocab_size is None and paths:
        _, manifest = open_split(paths[0], config.data.train_split)
        config.model.vocab_size = manifest.tokenizer.vocab_size
    return config


def run_eval_perplexity(arguments: argparse.Namespace) -> None:
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
    seq_len = trained_on.longest_seq_len if arguments.window is None else arguments.window
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
                not_round_trip=manifest.splits[arguments.split].not_round_trip,
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


def run_plot(arguments: argparse.Namespace) -> None:
    for path in plot_run(arguments.run, arguments.output or arguments.run):
        print(path)


def run_export(arguments: argparse.Namespace) -> None:
    export_checkpoint(
        arguments.source, arguments.target, to=arguments.to, dtype=arguments.dtype, overwrite=arguments.overwrite
    )
    print(arguments.target)


def run_import(arguments: argparse.Namespace) -> None:
    configured = {"paths": arguments.config, "words": arguments.overrides, "samples": arguments.samples}
    if arguments.from_format == DEEPSPEED:
        print(import_deepspeed(arguments.source, arguments.target, **configured, overwrite=arguments.overwrite))
        return
    if arguments.config or arguments.overrides or arguments.samples is not None:
        raise ConfigError(["--config, key=value and --samples are for --from deepspeed: other forms tell all of it"])
    import_pretrained(
        arguments.source, arguments.target, from_format=arguments.from_format, overwrite=arguments.overwrite
    )
    print(arguments.target)


def run_generate(arguments: argparse.Namespace) -> None:
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


def run_doctor(arguments: argparse.Namespace) -> int:
    report = examine()
    print(json.dumps(report.to_json(), indent=1) if arguments.json else report)
    failures = report.failures(tuple(arguments.require))
    for failure in failures:
        log.error("%s", failure)
    return EXIT_UNHEALTHY if failures else 0


def resolved(arguments: argparse.Namespace, world: int | None = None) -> Config:
    return load(arguments.config, arguments.overrides, world=world)
