"""From raw text to a trained, evaluated, exported Mamba on this machine: what `make quickstart` runs.

Every step is a command that works by itself; this script runs them in order and shows them. It trains on State of the
Union addresses (corpora/README.md), stops its own training with SIGTERM half way and resumes it, and compares the model
with compressors on the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from mamba_pretrain.checkpoint import MODEL, checkpoints
from mamba_pretrain.config import load
from mamba_pretrain.data.dataset import open_split
from mamba_pretrain.data.tokenizer import load_tokenizer
from mamba_pretrain.distributed.env import EXIT_PREEMPTED
from mamba_pretrain.evaluate.baselines import measure, texts
from mamba_pretrain.evaluate.report import comparison_table, read_metrics
from mamba_pretrain.export.pretrained import build_model, read_pretrained

ROOT = Path(__file__).parent.parent
CORPUS, CONFIG = ROOT / "corpora/sotu.jsonl.gz", ROOT / "configs/pretrain/quickstart.yaml"
SPLIT = ("--split-fractions", 0.9, 0.1, 0)
EXIT_WORSE_THAN_XZ = 4
PROMPT = "My fellow Americans,"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs/quickstart", help="a directory to make")
    parser.add_argument("--tokens", type=int, help="train on so many instead of the configuration's")
    arguments = parser.parse_args(argv)
    output: Path = arguments.output.resolve()
    if output.exists():
        print(f"{output} exists: remove it to start over, or choose another --output", file=sys.stderr)
        return 2
    began = time.monotonic()
    data, run = output / "data", output / "run"
    output.mkdir(parents=True)

    title("1. Tokenizer and shards, from the training split of the corpus")
    python("data_prep.train_tokenizer", CORPUS, "--vocab-size", 4096, "--output", output / "sotu.model", *SPLIT)
    python("data_prep.build_shards", CORPUS, "--tokenizer", output / "sotu.model", "--output", data, *SPLIT)
    python("data_prep.verify_shards", data)

    title("2. Training, with an interruption")
    overrides = [f"data.path={data}", f"run_dir={run}"]
    overrides += [f"train.tokens={arguments.tokens}"] if arguments.tokens else []
    train_with_interruption(run, overrides)
    last = checkpoints(run / "checkpoints")[-1]

    title("3. Perplexity and bits per byte, beside compressors on the same bytes")
    python("mamba_pretrain.cli", "eval", "perplexity", "--model", last, "--data", data, "--json", output / "eval.json")
    bits = compare(output, data)
    python("mamba_pretrain.cli", "plot", run, "--output", output)

    title("4. Export, and the export read back by transformers")
    for form in ("hf", "mamba_ssm"):
        python("mamba_pretrain.cli", "export", last, output / form, "--to", form)
    check_exports(output, last, data)

    title("5. A sample")
    sampling = ("--prompt", PROMPT, "--max-tokens", 120, "--temperature", 0.8, "--top-p", 0.95)
    python("mamba_pretrain.cli", "generate", "--model", last, *sampling)
    print(f"\nAll of it is in {output}. {(time.monotonic() - began) / 60:.1f} minutes.")
    if bits["this model"] > bits["xz -9"]:
        print("The model does not beat xz on these bytes: it has seen too few tokens.", file=sys.stderr)
        return EXIT_WORSE_THAN_XZ
    return 0


def train_with_interruption(run: Path, overrides: list[str]) -> None:
    """Trains to about half way, ends the process with SIGTERM, and goes on from what it saved."""
    words = ("train", "--config", CONFIG, "--resume", "auto", *overrides)
    config = load([CONFIG], overrides)
    process = start("mamba_pretrain.cli", *words)
    try:
        while process.poll() is None and last_step(run) < max(1, config.steps // 2):
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    finally:
        process.kill()
    if code != EXIT_PREEMPTED:
        sys.exit(f"the interrupted training should leave with exit code {EXIT_PREEMPTED}, it left with {code}")
    stopped = read_state(run)
    print(f"\nStopped by SIGTERM with exit code {code} after step {stopped['step']}. The same command again:\n")
    python("mamba_pretrain.cli", *words)

    ended, records = read_state(run), read_metrics(run)["train"]
    logged = sum(record["averaged_steps"] + record["skipped_steps"] for record in records)
    if logged != config.steps or ended["samples"] != config.steps * config.sequences_per_step:
        sys.exit(
            f"something was lost: {logged} of {config.steps} steps are logged, {ended['samples']} samples consumed"
        )
    print(
        f"Nothing was lost: {ended['samples']:,} samples in {ended['step']} steps, each once, across the stop after "
        f"step {stopped['step']}."
    )


def compare(output: Path, data: Path) -> dict[str, float]:
    """Bits per byte of the model and of each compressor, by name; printed, and written as comparison.md."""
    documents = json.loads((output / "eval.json").read_text())[0]
    training, _ = open_split(data, "train")
    evaluation, _ = open_split(data, "validation")
    how = f"{documents['text_bytes']:,} bytes and the end of each document, weights from the training text"
    found = [("this model", documents["bits_per_byte"], how)]
    for baseline in measure(*texts(evaluation, training, load_tokenizer(data))):
        found.append((baseline.name, baseline.bits_per_byte, baseline.how))
    found.sort(key=lambda row: -row[1])
    table = comparison_table([{"what": w, "bits per byte": b, "measured on": h} for w, b, h in found])
    (output / "comparison.md").write_text(table + "\n")
    print(table)
    return {what: bits for what, bits, _ in found}


@torch.no_grad()
def check_exports(output: Path, checkpoint: Path, data: Path) -> None:
    """transformers' logits of the export against ours, and both exports' weights against the checkpoint's."""
    for package in ("mamba_ssm", "causal_conv1d"):
        sys.modules[package] = None  # type: ignore[assignment]  # transformers would call CUDA kernels on CPU tensors
    from transformers import MambaForCausalLM

    validation, _ = open_split(data, "validation")
    ids = torch.from_numpy(validation.tokens(0, 128))[None]
    ours = build_model(read_pretrained(checkpoint))(ids).logits
    theirs = MambaForCausalLM.from_pretrained(output / "hf", dtype=torch.float32)(ids).logits
    difference = (ours - theirs).abs().max().item()
    weights = load_file(checkpoint / MODEL)
    for form in ("hf", "mamba_ssm"):
        exported = read_pretrained(output / form).weights
        if exported.keys() != weights.keys() or any(not torch.equal(exported[k], weights[k]) for k in weights):
            sys.exit(f"the weights in {output / form} differ from the checkpoint's")
    if not difference < 2e-6 * ours.abs().max().item():
        sys.exit(f"logits differ by {difference:.2e} between transformers and this model")
    print(f"Both exports hold the checkpoint's weights to the bit; transformers' logits differ by {difference:.1e}.")


def title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def start(module: str, *words: object) -> subprocess.Popen[bytes]:
    """A Python module as a process, its command shown."""
    arguments = [str(word) for word in words]
    print(f"$ python -m {module} {' '.join(arguments)}", flush=True)
    # OpenMP threads that spin while they wait cost other programs on the machine, and this one, dearly: with one more
    # busy process on two cores the default is 1.6 times slower than this; alone both are equally fast.
    environment = {"GOMP_SPINCOUNT": "1000", **os.environ}
    return subprocess.Popen([sys.executable, "-m", module, *arguments], cwd=ROOT, env=environment)


def python(module: str, *words: object) -> None:
    code = start(module, *words).wait()
    if code:
        sys.exit(f"{module} left with exit code {code}")


def last_step(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return max((r["step"] for r in read_metrics(run).get("train", [])), default=0) if metrics.exists() else 0


def read_state(run: Path) -> dict[str, int]:
    state: dict[str, int] = json.loads((checkpoints(run / "checkpoints")[-1] / "state.json").read_text())
    return state


if __name__ == "__main__":
    sys.exit(main())
