"""An exported tokenizer gives the ids the model was trained with, in transformers too."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mamba_pretrain.data.tokenizer import BytesTokenizer, load_tokenizer
from mamba_pretrain.export import formats, tokenizer_files
from mamba_pretrain.export.formats import FormatError
from mamba_pretrain.files import sha256_of
from tests.helpers import hf
from tests.helpers.native import sentencepiece_model, tokenizer_facts

TEXTS = [
    "",
    " ",
    "a dog  eats\tthe  bone.\n\n  The end",
    "na\u00efve \u4e2d\u6587 \U0001f600 e\u0301 \x00",
    "nested <0x41> and <unk> stay text",
    Path(formats.__file__).read_text(),
]


def as_transformers_loads(directory: Path) -> Any:
    (directory / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    return hf.AutoTokenizer.from_pretrained(directory)


def export(directory: Path, content: bytes) -> Path:
    """A SentencePiece model written for transformers, in `directory`/out."""
    (directory / "out").mkdir()
    (directory / "tokenizer.model").write_bytes(content)
    tokenizer_files.write_for_transformers(directory / "tokenizer.model", tokenizer_facts(content), directory / "out")
    return directory / "out"


@pytest.mark.parametrize("prefix", [False, True], ids=["plain", "dummy prefix"])
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_transformers_tokenises_like_sentencepiece(tmp_path: Path, kind: str, prefix: bool) -> None:
    content = sentencepiece_model(kind, add_dummy_prefix=prefix)
    original = sentencepiece.SentencePieceProcessor(model_proto=content)
    out = export(tmp_path, content)
    loaded = as_transformers_loads(out)
    for text in TEXTS:
        ids = original.encode(text)
        assert loaded(text)["input_ids"] == ids
        assert loaded.decode(ids) == text
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1, 2, 2)
    assert (out / "tokenizer.model").read_bytes() == content
    assert json.loads((out / "special_tokens_map.json").read_bytes())["eos_token"] == "</s>"


def test_special_tokens_in_a_text_can_be_read_as_text(tmp_path: Path) -> None:
    content = sentencepiece_model()
    original = sentencepiece.SentencePieceProcessor(model_proto=content)
    directory = export(tmp_path, content)
    as_transformers_loads(directory)
    loaded = hf.AutoTokenizer.from_pretrained(directory, split_special_tokens=True)
    assert loaded("go on</s>now")["input_ids"] == original.encode("go on</s>now")


def test_a_model_that_cannot_be_converted_is_copied_with_a_warning(tmp_path: Path) -> None:
    content = sentencepiece_model(normalization_rule_name="nmt_nfkc")
    with pytest.warns(UserWarning, match=r"no tokenizer.json was written: .* gives other ids"):
        out = export(tmp_path, content)
    assert [path.name for path in out.iterdir()] == ["tokenizer.model"]


def test_bytes_become_a_tokenizer_that_transformers_loads(tmp_path: Path) -> None:
    original = BytesTokenizer()
    facts = {"kind": "bytes", "file": "tokenizer.bytes", "vocab_size": 257, "bos_id": 256, "eod_id": 256}
    tokenizer_files.write_for_transformers(None, facts, tmp_path)
    loaded = as_transformers_loads(tmp_path)
    for text in TEXTS:
        assert loaded(text)["input_ids"] == original.encode(text)
        assert loaded.decode(original.encode(text)) == text
    assert loaded.eos_token_id == 256


def byte_level(directory: Path) -> Path:
    """A tokenizer.json with two special tokens, of which the settings beside it name the second as the end."""
    made = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(tokenizer_alphabet()))}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    made.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    return directory / "tokenizer.json"


def tokenizer_alphabet() -> list[str]:
    alphabet: list[str] = pre_tokenizers.ByteLevel.alphabet()
    return alphabet


def test_a_tokenizer_json_travels_with_the_settings_that_name_its_end(tmp_path: Path) -> None:
    source = byte_level(tmp_path)
    path, facts = tokenizer_files.find(tmp_path, None)
    assert path == source
    assert facts == {
        "kind": "huggingface",
        "file": "tokenizer.json",
        "sha256": sha256_of(source),
        "vocab_size": 258,
        "bos_id": 257,
        "eod_id": 257,
    }
    target = tmp_path / "copy"
    target.mkdir()
    tokenizer_files.copy(source, target)
    ours, theirs = load_tokenizer(source), load_tokenizer(target)
    assert (ours.sha256, ours.eod_id) == (theirs.sha256, theirs.eod_id)


def test_what_is_described_equals_what_the_data_room_says(tmp_path: Path) -> None:
    load_tokenizer("bytes").save(tmp_path)
    contents = {
        "tokenizer.model": sentencepiece_model(),
        "tokenizer.bytes": (tmp_path / "tokenizer.bytes").read_bytes(),
    }
    for i, (name, content) in enumerate(contents.items()):
        directory = tmp_path / str(i)
        directory.mkdir()
        (directory / name).write_bytes(content)
        expected = load_tokenizer(directory)
        _, facts = tokenizer_files.find(directory, None)
        names = ("kind", "file", "sha256", "vocab_size", "bos_id", "eod_id")
        assert facts == {name: getattr(expected, name) for name in names}


def test_facts_of_another_file_are_not_believed(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    true = tokenizer_facts(sentencepiece_model())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer_files.find(tmp_path, true | {"eod_id": 5})[1] == true | {"eod_id": 5}
    with pytest.warns(UserWarning, match="is not the tokenizer that the model was trained with: its sha256 is .* 0000"):
        assert tokenizer_files.find(tmp_path, true | {"eod_id": 5, "sha256": "0" * 64})[1] == true
    (tmp_path / "tokenizer.bytes").touch()  # comes before, where nothing is known
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer_files.find(tmp_path, true) == (tmp_path / "tokenizer.model", true)
        assert tokenizer_files.find(tmp_path, None)[0] == tmp_path / "tokenizer.bytes"


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_damaged_tokenizer_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(FormatError, match=name):
        tokenizer_files.find(tmp_path, None)
