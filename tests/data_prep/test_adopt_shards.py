"""Tokens that Megatron-LM, GPT-NeoX and datatrove have written are used where they lie, or refused with the reason."""

from __future__ import annotations

import itertools
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer
from datatrove.pipeline.tokens.tokenizer import DocumentTokenizer, TokenizedFile

from data_prep import adopt_shards, show_shards, verify_shards
from data_prep.train_tokenizer import train_json
from mamba_pretrain.data.dataset import open_split, verify
from mamba_pretrain.data.manifest import Manifest
from mamba_pretrain.data.shards import HEADER, MAGIC
from mamba_pretrain.data.tokenizer import load_tokenizer
from mamba_pretrain.train import run
from tests.helpers.corpora import make_documents
from tests.helpers.runs import small_config

TEXTS = [*make_documents(60), "caf\u00e9 \u4e2d\u6587 \U0001f600", ""]  # the last is an eod alone


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of GPT-NeoX's kind: <|endoftext|> is id 0, and there is no other special token."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(train_json(TEXTS, vocab_size=300))
    return path


@pytest.fixture(scope="module")
def documents(tokenizer: Path) -> list[list[int]]:
    """As GPT-NeoX and datatrove write them: no bos, and the eod at the end."""
    return [[*load_tokenizer(tokenizer).encode(text), 0] for text in TEXTS]


def write_idx(path: Path, code: int, lengths: list[int], index: list[int], size: int, extra: bytes = b"") -> None:
    offsets = [size * total for total in itertools.accumulate([0, *lengths[:-1]])] if lengths else []
    numbers = struct.pack(f"<{len(lengths)}i{len(offsets)}q{len(index)}q", *lengths, *offsets, *index)
    path.write_bytes(HEADER.pack(MAGIC, 1, code, len(lengths), len(index)) + numbers + extra)


def write_neox(prefix: Path, documents: list[list[int]]) -> Path:
    prefix.with_name(prefix.name + ".bin").write_bytes(np.concatenate(documents).astype("<u2").tobytes())
    lengths = [len(tokens) for tokens in documents]
    write_idx(prefix.with_name(prefix.name + ".idx"), 8, lengths, list(range(len(lengths) + 1)), 2)
    return prefix


def write_datatrove(directory: Path, documents: list[list[int]], *, token_size: int = 2, **options: bool) -> Path:
    settings = {"save_final_metadata": True, **options}
    file = TokenizedFile(str(directory), "00000.ds", token_size=token_size, tokenizer_name_or_path="neox", **settings)
    for tokens in documents:
        file.write(tokens, np.ones(len(tokens)) if options.get("save_loss_metadata") else None)
    file.close()
    return directory / "00000.ds"


def adopt(source: Path, tokenizer: Path, output: Path, *options: str) -> int:
    return adopt_shards.main(["--train", str(source), "--tokenizer", str(tokenizer), "--output", str(output), *options])


def require_usable(dataset: Path, documents: list[list[int]], run_dir: Path) -> Manifest:
    """The same documents, sound in all eyes, and a run trains on them."""
    shard, manifest = open_split(dataset, "train")
    found = [shard.tokens(*shard.document_bounds(j)).tolist() for j in range(shard.n_documents)]
    assert found == documents
    assert verify(dataset) == []
    assert run(small_config(dataset, run_dir, "data.validation_split=null", "train.steps=2")) == 0
    return manifest


def test_neox_files_are_linked_not_copied_and_trained_on(
    tokenizer: Path, documents: list[list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write_neox(tmp_path / "pile_text_document", documents)
    assert adopt(prefix, tokenizer, tmp_path / "data") == 0
    assert "documents do not begin with the bos, id 0" in capsys.readouterr().out
    for suffix in (".bin", ".idx"):
        assert (tmp_path / "data" / f"train{suffix}").readlink() == prefix.with_name(prefix.name + suffix)
    manifest = require_usable(tmp_path / "data", documents, tmp_path / "run")
    assert (manifest.origin, manifest.adds_bos, manifest.adds_eod) == ("megatron", False, True)
    assert manifest.splits["train"].text_bytes is None
    assert [source.path for source in manifest.sources] == [f"{prefix}.bin", f"{prefix}.idx"]
    assert verify_shards.main([str(tmp_path / "data")]) == 0
    capsys.readouterr()
    assert show_shards.main([str(tmp_path / "data"), "--document", "60", "--stats"]) == 0
    out = capsys.readouterr().out
    assert TEXTS[60] in out and "duplicates: not counted, the tokens are megatron's" in out


def test_hard_links_outlive_the_originals(tokenizer: Path, documents: list[list[int]], tmp_path: Path) -> None:
    write_neox(tmp_path / "pile", documents)
    held_out = str(write_neox(tmp_path / "held_out", documents[:9]))
    options = ("--link", "hard", "--validation", held_out)
    assert adopt(tmp_path / "pile.bin", tokenizer, tmp_path / "data", *options) == 0
    assert os.path.samefile(tmp_path / "data/train.bin", tmp_path / "pile.bin")
    for suffix in (".bin", ".idx"):
        (tmp_path / f"pile{suffix}").unlink()
    assert verify(tmp_path / "data") == []
    assert list(Manifest.read(tmp_path / "data").splits) == ["train", "validation"]


@pytest.mark.parametrize(("token_size", "dtype"), [(2, "uint16"), (4, "int32")])
def test_datatrove_files_get_an_index_and_are_trained_on(
    tokenizer: Path, documents: list[list[int]], tmp_path: Path, token_size: int, dtype: str
) -> None:
    source = write_datatrove(tmp_path / "ds", documents, token_size=token_size)
    assert adopt(source, tokenizer, tmp_path / "data") == 0
    assert (tmp_path / "data/train.bin").readlink() == source
    manifest = require_usable(tmp_path / "data", documents, tmp_path / "run")
    assert (manifest.origin, manifest.dtype, manifest.adds_bos) == ("datatrove", dtype, False)


@pytest.mark.parametrize("kind", [DocumentTokenizer, MegatronDocumentTokenizer])
def test_what_datatroves_pipeline_writes_is_adopted(
    tokenizer: Path, documents: list[list[int]], tmp_path: Path, kind: type
) -> None:
    options = {"shuffle_documents": False} if kind is DocumentTokenizer else {}
    step = kind(str(tmp_path / "out"), tokenizer_name_or_path=str(tokenizer), eos_token="<|endoftext|>", **options)
    step.run([Document(text=text, id=str(i)) for i, text in enumerate(TEXTS)])
    name = "00000_unshuffled.ds" if kind is DocumentTokenizer else "00000_tokens"
    assert adopt(tmp_path / "out" / name, tokenizer, tmp_path / "data") == 0
    shard, manifest = open_split(tmp_path / "data", "train")
    assert [shard.tokens(*shard.document_bounds(j)).tolist() for j in range(shard.n_documents)] == documents
    assert verify(tmp_path / "data") == [] and manifest.adds_eod


@pytest.mark.slow  # importing megatron.core takes ten seconds
def test_what_megatron_cores_builder_writes_is_adopted(
    tokenizer: Path, documents: list[list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    for multimodal, dtype in ((False, np.uint16), (True, np.int32)):
        builder = IndexedDatasetBuilder(str(tmp_path / f"{multimodal}.bin"), dtype=dtype, multimodal=multimodal)
        for tokens in documents:  # in two sequences, as --split-sentences would
            half = len(tokens) // 2
            builder.add_document(torch.tensor(tokens), [half, len(tokens) - half], [0, 1])
        builder.finalize(str(tmp_path / f"{multimodal}.idx"))
    assert adopt(tmp_path / "False", tokenizer, tmp_path / "data") == 0
    require_usable(tmp_path / "data", documents, tmp_path / "run")
    assert adopt(tmp_path / "True", tokenizer, tmp_path / "more") == 2
    assert "is a multimodal index, with a mode for each sequence" in capsys.readouterr().err


def test_ids_of_four_bytes_beyond_31_bits_are_refused(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_datatrove(tmp_path / "ds", [[5, 2**31 + 7, 0]], token_size=4)
    assert adopt(source, tokenizer, tmp_path / "data") == 2
    error = capsys.readouterr().err
    assert f"{source}: 1 tokens outside the vocabulary of 300, the first is id -2147483641 at position 1" in error
    assert not (tmp_path / "data").exists()


def test_the_size_of_a_token_is_never_guessed(
    tokenizer: Path, documents: list[list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_datatrove(tmp_path / "ds", documents, save_final_metadata=False)
    assert adopt(source, tokenizer, tmp_path / "data") == 2
    assert "pass --token-bytes 2, or 4 where the tokenizer has more" in capsys.readouterr().err
    (tmp_path / "ds/00000.ds.metadata").write_text("gpt2\n5")  # as older versions wrote them
    assert adopt(source, tokenizer, tmp_path / "data") == 2
    assert "--token-bytes 2" in capsys.readouterr().err
    (tmp_path / "ds/00000.ds.metadata").unlink()
    assert adopt(source, tokenizer, tmp_path / "data", "--token-bytes", "4") == 2
    assert "or --token-bytes is wrong" in capsys.readouterr().err
    assert adopt(source, tokenizer, tmp_path / "data", "--token-bytes", "2") == 0
    write_datatrove(tmp_path / "stated", documents)
    assert adopt(tmp_path / "stated/00000.ds", tokenizer, tmp_path / "more", "--token-bytes", "4") == 2
    assert "00000.ds.metadata says 2" in capsys.readouterr().err


def damage(directory: Path, how: str) -> None:
    tokens, ends = directory / "00000.ds", directory / "00000.ds.index"
    if how == "tokens":
        os.truncate(tokens, tokens.stat().st_size - 2)
    elif how == "index":
        os.truncate(ends, ends.stat().st_size - 3)
    elif how == "order":
        ends.write_bytes(ends.read_bytes()[8:16] + ends.read_bytes()[:8] + ends.read_bytes()[16:])
    elif how == "metadata":
        (directory / "00000.ds.metadata").unlink()
        os.truncate(ends, ends.stat().st_size - 8)
    else:
        ends.unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("tokens", "00000.ds.metadata promises"),
        ("index", "has 5 bytes after its last whole number: truncated"),
        ("order", "00000.ds.index: document 1 has -"),
        ("metadata", "00000.ds.index promises"),
        ("none", "where documents end is unknown"),
    ],
)
def test_damaged_datatrove_files_are_refused(
    tokenizer: Path,
    documents: list[list[int]],
    tmp_path: Path,
    how: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = write_datatrove(tmp_path / "ds", documents)
    damage(tmp_path / "ds", how)
    assert adopt(source, tokenizer, tmp_path / "data", *(["--token-bytes", "2"] if how == "metadata" else [])) == 2
    error = capsys.readouterr().err
    assert message in error and "data.tmp" not in error
    assert not list(tmp_path.glob("data*"))


def test_a_loss_mask_is_not_dropped_silently(tokenizer: Path, documents: list[list[int]], tmp_path: Path) -> None:
    source = write_datatrove(tmp_path / "ds", documents, save_loss_metadata=True)
    assert adopt(source, tokenizer, tmp_path / "data") == 2
    assert adopt(source, tokenizer, tmp_path / "data", "--ignore-loss-mask") == 0


@pytest.mark.parametrize(
    ("code", "extra", "message"),
    [
        (7, b"", "dtype code 7 (float32): not the integers token ids are"),
        (4, b"\0", "is a multimodal index"),
        (4, b"\0\0", "its header promises"),
    ],
)
def test_megatron_files_that_hold_no_text_are_refused(
    tokenizer: Path, tmp_path: Path, code: int, extra: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.bin").write_bytes(np.zeros(3, "<i4").tobytes())
    write_idx(tmp_path / "a.idx", code, [3], [0, 1], 4, extra)
    assert adopt(tmp_path / "a", tokenizer, tmp_path / "data") == 2
    error = capsys.readouterr().err
    assert message in error and str(tmp_path / "a.idx") in error


def test_the_older_index_of_neox_is_named(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.bin").write_bytes(b"")
    (tmp_path / "a.idx").write_bytes(b"TNTIDX\0\0" + bytes(64))
    assert adopt(tmp_path / "a", tokenizer, tmp_path / "data") == 2
    assert "preprocess with --dataset-impl mmap" in capsys.readouterr().err


def test_tokens_of_another_tokenizer_are_refused(
    tokenizer: Path, documents: list[list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write_neox(tmp_path / "pile", documents)
    assert adopt(prefix, Path("bytes"), tmp_path / "data") == 2
    assert "pile.bin: " in (error := capsys.readouterr().err) and "outside the vocabulary of 257" in error
    # Ids that are in the vocabulary, but no text: every character of two bytes loses one.
    prefix = write_neox(tmp_path / "other", [[0xC3, 65, 256], [66, 256]])
    assert adopt(prefix, Path("bytes"), tmp_path / "data") == 2
    error = capsys.readouterr().err
    assert "1 of the sampled documents are no text" in error and "Another tokenizer made them" in error
    assert adopt(prefix, Path("bytes"), tmp_path / "data", "--cut-documents") == 0
    assert Manifest.read(tmp_path / "data").splits["train"].not_round_trip == 1
    assert verify(tmp_path / "data") == []


def test_a_bos_is_found_out_from_every_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def found(name: str, documents: list[list[int]], *options: str) -> tuple[bool, bool] | None:
        if adopt(write_neox(tmp_path / name, documents), Path("bytes"), tmp_path / f"{name}.data", *options):
            return None
        manifest = Manifest.read(tmp_path / f"{name}.data")
        assert verify(tmp_path / f"{name}.data") == []
        return manifest.adds_bos, manifest.adds_eod

    many = [[256, 65, 256]] * 500
    assert found("both", [*many, [256]]) == (True, True)  # one token tells nothing, where bos and eod are the same
    assert found("eod", [[65, 256], [256], [66, 67, 256]]) == (False, True)
    assert found("neither", [[65, 66], [67, 68]]) == (False, False)
    assert "warning: 2 of 2 documents do not end with the eod, id 256" in capsys.readouterr().out
    assert found("mixed", [*many, [65, 256]]) is None
    assert "500 of 501 documents begin with the bos, id 256: pass --adds-bos no" in capsys.readouterr().err
    assert found("told", [*many, [65, 256]], "--adds-bos", "no") == (False, True)
    assert found("wrong", [[65, 256], [66, 256]], "--adds-bos", "yes") is None


def test_wrong_uses_are_one_message(
    tokenizer: Path, documents: list[list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    prefix = write_neox(tmp_path / "data/pile", documents)
    for arguments, message in (
        (["--output", "x"], "nothing to adopt: pass --train PREFIX"),
        (["--train", str(tmp_path / "gone"), "--output", "x"], "gone.bin and gone.idx (Megatron-LM, GPT-NeoX), or"),
        (["--train", str(prefix), "--output", str(tmp_path / "data"), "--overwrite"], "which it would replace"),
        (["--train", str(prefix), "--output", "x", "--token-bytes", "2"], "leave it out"),
        (["--train", str(prefix), "--validation", str(prefix), "--output", "x"], "is given as train and as validation"),
    ):
        assert adopt_shards.main([*arguments, "--tokenizer", str(tokenizer)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    with pytest.raises(SystemExit):
        adopt_shards.main(["--train", "s3://bucket/pile", "--tokenizer", "bytes", "--output", "x"])
    assert "is a URL: copy the dataset to a disk of this machine" in capsys.readouterr().err
