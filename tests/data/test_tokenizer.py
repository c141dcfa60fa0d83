"""Encoding loses nothing and finds no special tokens; every kind of file is told from a damaged one."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from data_prep.train_tokenizer import train
from mamba_pretrain.data import tokenizer as tokenizer_module
from mamba_pretrain.data.manifest import Manifest
from mamba_pretrain.data.tokenizer import Tokenizer, TokenizerError, dataset_tokenizer, load_tokenizer
from tests.helpers.corpora import make_dataset, make_documents

AWKWARD = [
    "",
    " ",
    "  two  spaces ",
    "\ttabs\t\tand\nnew\r\nlines\n\n",
    "def f(x):\n    return x\n",
    "emoji \U0001f600\U0001f468\u200d\U0001f469 \u00e9 e\u0301 \u4e2d\u6587",
    "\u2581 the mark of SentencePiece \u2581\u2581",
    "nul \x00 and \ufeff \ufffd \u2585 \u2047",
    "<s> </s> <unk> <0x41> <|endoftext|>",
]


def byte_level(specials: list[str], *, use_regex: bool = True) -> tokenizers.Tokenizer:
    """Of GPT-NeoX's make: byte-level BPE, an added token that is not special, and special ones."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(make_documents(50), trainer)
    model.add_tokens(["    "])
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("tokenizers")
    for kind in ("unigram", "bpe"):
        content = train([*make_documents(100), *AWKWARD], kind=kind, vocab_size=320, character_coverage=0.999)
        (directory / f"{kind}.model").write_bytes(content)
    byte_level(["<|endoftext|>", "<|padding|>"]).save(str(directory / "tokenizer.json"))
    return {
        "unigram": directory / "unigram.model",
        "bpe": directory / "bpe.model",
        "neox": directory / "tokenizer.json",
    }


@pytest.fixture(scope="module", params=["bytes", "unigram", "bpe", "neox"])
def tokenizer(request: pytest.FixtureRequest, files: dict[str, Path]) -> Tokenizer:
    return load_tokenizer(files.get(request.param, request.param))


@pytest.mark.parametrize("text", AWKWARD)
def test_decoding_returns_every_byte(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None, max_examples=150)
@given(text=st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t\u2581<>|s/"))))
def test_decoding_returns_any_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_that_spells_a_special_token_is_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<|endoftext|></s><s><unk><|padding|>")
    assert not {tokenizer.eod_id, tokenizer.bos_id} & set(ids)
    assert max(ids) < tokenizer.vocab_size


MIXED = "ab1'!.,)s<|> \n\n\r\t\x1c\u3042\u3099\u4e2d\u3002\u0958\xa0\u0301\u1e9b\u0323\u2003\u3000\U0001f600"


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "PART", 5)
    monkeypatch.setattr(tokenizer_module, "PARTS_AT_ONCE", 2)


@pytest.mark.usefixtures("short_parts")
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.sampled_from(MIXED)), min_size=1))
def test_a_long_text_in_parts_has_the_ids_of_the_whole(tokenizer: Tokenizer, texts: list[str]) -> None:
    texts.append(" ".join(texts) + "    <|endoftext|>  it's    ")
    found = tokenizer.encode_batch(texts, [text.encode() for text in texts])
    assert [ids.tolist() for ids in found] == [tokenizer.encode(text) for text in texts]


def test_a_long_text_goes_to_the_library_in_parts(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, given_sizes = load_tokenizer(files["neox"]), []
    library = tokenizer._encode_lists

    def spy(texts: Sequence[str]) -> Iterator[list[int]]:
        given_sizes.extend(map(len, texts))
        return library(texts)

    monkeypatch.setattr(tokenizer, "_encode_lists", spy)
    text = "\n".join(make_documents(3000))
    (ids,) = tokenizer.encode_batch([text], [text.encode()])
    assert ids.tolist() == tokenizer.encode(text)
    assert sum(given_sizes) == len(text) > 3 * tokenizer_module.PART >= max(given_sizes) * 2


CUTTING_WOULD_CHANGE = {
    "another pattern": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": r"\s*\p{L}+\s?|\s+|[^\s\p{L}]+"},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        }
    },
    "a space before each text": {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    },
    "a normalizer": {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
}


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("what", CUTTING_WOULD_CHANGE)
def test_a_text_is_not_cut_where_that_would_change_its_ids(files: dict[str, Path], tmp_path: Path, what: str) -> None:
    settings_of = json.loads(files["neox"].read_text()) | CUTTING_WOULD_CHANGE[what]
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings_of))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    text = "  the river and the\nsea are one\nriver the  end  "
    (ids,) = tokenizer.encode_batch([text], [text.encode()])
    assert ids.tolist() == tokenizer.encode(text)


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize(
    "added",
    [
        AddedToken("r a"),
        AddedToken("d."),
        AddedToken("river", rstrip=True),
        AddedToken(" river", single_word=True),
        AddedToken(".the", single_word=True),
    ],
)
def test_a_text_is_not_cut_where_an_added_token_may_reach_over_it(tmp_path: Path, added: AddedToken) -> None:
    model = byte_level(["<|endoftext|>"])
    model.add_tokens([added])
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    text = "the river and the river and.the river and the and.the river"
    (ids,) = tokenizer.encode_batch([text], [text.encode()])
    assert ids.tolist() == tokenizer.encode(text)


@pytest.mark.usefixtures("short_parts")
def test_a_text_is_not_cut_where_its_words_are_not_apart(tmp_path: Path) -> None:
    byte_level(["<|endoftext|>"], use_regex=False).save(str(tmp_path / "tokenizer.json"))
    tokenizer, text = load_tokenizer(tmp_path / "tokenizer.json"), " ".join(make_documents(5))
    (ids,) = tokenizer.encode_batch([text], [text.encode()])
    assert ids.tolist() == tokenizer.encode(text)


def test_special_tokens_decode_to_nothing(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode("the river"), tokenizer.eod_id]
    assert tokenizer.decode(ids) == "the river"


def test_pieces_of_a_character_join(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("\U0001f600")
    assert tokenizer.decode_bytes(ids[:2]) + tokenizer.decode_bytes(ids[2:]) == b"\xf0\x9f\x98\x80"
    assert "\ufffd" in tokenizer.decode(ids[:1])


def test_ids_outside_the_vocabulary_are_named(tokenizer: Tokenizer) -> None:
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(TokenizerError, match=f"token id {wrong} is outside"):
            tokenizer.decode([5, wrong])


def test_saved_tokenizers_are_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.kind, again.sha256, again.bos_id, again.eod_id) == (
        tokenizer.kind,
        tokenizer.sha256,
        tokenizer.bos_id,
        tokenizer.eod_id,
    )
    assert again.encode(AWKWARD[4]) == tokenizer.encode(AWKWARD[4])


def test_neox_has_one_token_for_begin_and_end_and_uses_added_whitespace(files: dict[str, Path]) -> None:
    neox = load_tokenizer(files["neox"])
    assert (neox.eod_id, neox.bos_id) == (0, 0)
    assert neox.vocab_size - 1 in neox.encode("a    b")


def test_sentencepiece_ids_are_fixed(files: dict[str, Path]) -> None:
    model = load_tokenizer(files["unigram"])
    assert (model.bos_id, model.eod_id, model.vocab_size) == (1, 2, 320)


def test_an_unclear_end_of_document_lists_candidates_and_takes_an_answer(tmp_path: Path) -> None:
    byte_level(["</s>", "<|endoftext|>"]).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        TokenizerError, match=r"candidates are \['<\|endoftext\|>', '</s>'\]; pass the right one to build_shards"
    ):
        load_tokenizer(tmp_path)
    chosen = load_tokenizer(tmp_path, eod="</s>")
    assert chosen.eod_id == 0
    (tmp_path / "saved").mkdir()
    chosen.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").eod_id == 0
    for wrong in ("<nope>", "the"):
        with pytest.raises(TokenizerError, match=f"has no special token '{wrong}'; it has"):
            load_tokenizer(tmp_path, eod=wrong)


def test_the_end_of_a_document_is_the_files_own_where_it_has_one(files: dict[str, Path], tmp_path: Path) -> None:
    assert load_tokenizer(files["bpe"], eod="</s>").eod_id == 2
    for wrong in ("<s>", "e"):
        with pytest.raises(TokenizerError, match=f"ends documents with '</s>', not '{wrong}': leave out --eod"):
            load_tokenizer(files["bpe"], eod=wrong)
    with pytest.raises(TokenizerError, match="byte tokenizer ends documents with its own token 256, not '</s>'"):
        load_tokenizer("bytes", eod="</s>")
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_documents(50)), model_writer=content, vocab_size=40, eos_id=-1, minloglevel=2
    )
    (tmp_path / "endless.model").write_bytes(content.getvalue())
    for eod in (None, "<s>"):
        with pytest.raises(TokenizerError, match="has no eos piece, and documents need an end"):
            load_tokenizer(tmp_path / "endless.model", eod=eod)


def test_a_datasets_tokenizer_is_the_one_it_was_made_with(tmp_path: Path) -> None:
    byte_level(["</s>", "<|endoftext|>"]).save(str(tmp_path / "tokenizer.json"))
    data = tmp_path / "data"
    with pytest.raises(TokenizerError, match="as --eod"):
        make_dataset(data, tokenizer=tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    manifest = Manifest.read(make_dataset(data, tokenizer=tmp_path))
    assert dataset_tokenizer(data, manifest).eod_id == 0
    (data / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "bos_token": "</s>"}')
    with pytest.raises(TokenizerError, match="its eod_id is 1, the dataset was made with 0: it, or a tokenizer_config"):
        dataset_tokenizer(data, manifest)


def test_a_piece_outside_the_byte_alphabet_is_damage(files: dict[str, Path], tmp_path: Path) -> None:
    settings = json.loads(files["neox"].read_text())
    settings["model"]["vocab"]["\u4e2d"] = 500
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(TokenizerError, match="is damaged: its decoder is byte-level, and piece 500, '\u4e2d', is not"):
        load_tokenizer(tmp_path)


def test_token_names_beside_the_file_are_believed(tmp_path: Path) -> None:
    byte_level(["</s>", "<|endoftext|>", "<s>"]).save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": {"content": "</s>", "lstrip": False}, "bos_token": "<s>", "model_max_length": 5}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = load_tokenizer(tmp_path)
    assert (found.eod_id, found.bos_id) == (0, 2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.model", b"rubbish", "not a SentencePiece model"),
        ("a.model", b"", "model without pieces"),
        ("a.json", b"{}", "not a tokenizer.json"),
        ("a.json", b"\xff", "not a tokenizer.json"),
        ("a.bin", b"x", "no tokenizer this program knows"),
        ("tokenizer.bytes", b"x", "no tokenizer this program knows"),
    ],
)
def test_files_that_are_no_tokenizer_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path / name)


def test_missing_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="gone.model does not exist"):
        load_tokenizer(tmp_path / "gone.model")
    with pytest.raises(TokenizerError, match="holds no tokenizer; expected one of"):
        load_tokenizer(tmp_path)


def with_dummy_prefix(directory: Path, kind: str) -> Path:
    """A tokenizer that puts a space before every text, as Llama's and T5's do, with bytes for rare characters."""
    texts = [*make_documents(100), "\U0001f600"]
    if kind == "sentencepiece":
        content = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=content,
            vocab_size=300,
            byte_fallback=True,
            character_coverage=0.99,
            minloglevel=2,
        )
        (directory / "tokenizer.model").write_bytes(content.getvalue())
    else:
        byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
        model = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        model.pre_tokenizer = pre_tokenizers.Metaspace()
        model.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
        trainer = trainers.BpeTrainer(
            vocab_size=360, special_tokens=["<unk>", "</s>", *byte_pieces], limit_alphabet=40, show_progress=False
        )
        model.train_from_iterator(texts, trainer)
        settings = json.loads(model.to_str())
        settings["added_tokens"] = [token for token in settings["added_tokens"] if token["id"] < 2]
        (directory / "tokenizer.json").write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize("kind", ["sentencepiece", "metaspace"])
def test_a_stream_keeps_the_spaces_between_words_and_drops_the_first_of_a_document(tmp_path: Path, kind: str) -> None:
    found = load_tokenizer(with_dummy_prefix(tmp_path, kind))
    text = (
        "the river  and \U0001f600 the \u4e2d hill"
        if kind == "metaspace"
        else "the river and \U0001f600 the \u4e2d hill"
    )
    ids = found.encode(text)
    assert len(ids) > 10
    assert "".join(found.stream(ids)) == text
    assert "".join(found.stream(ids, [found.bos_id])) == text
    prompt = found.encode("the river")
    assert ids[: len(prompt)] == prompt
    assert "".join(found.stream(ids[len(prompt) :], [found.bos_id, *prompt])) == text.removeprefix("the river")
    assert not any("\ufffd" in part for part in found.stream(ids))


@settings(deadline=None, max_examples=100)
@given(text=st.text(st.sampled_from("ab e\n\u00e9\u4e2d\U0001f600\u2581\ufffd"), max_size=12), cut=st.integers(0, 40))
def test_a_stream_adds_up_to_the_whole_text_wherever_it_begins(tokenizer: Tokenizer, text: str, cut: int) -> None:
    ids = tokenizer.encode(text)
    known = tokenizer.decode_bytes(ids[:cut]).decode(errors="ignore")
    assert known + "".join(tokenizer.stream(iter(ids[cut:]), ids[:cut])) == text


def test_a_stream_shows_text_as_it_comes_and_a_cut_character_at_its_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a b \U0001f600")
    parts = tokenizer.stream(iter(ids[:-1]))
    assert next(parts).startswith("a")
    assert "".join(parts).endswith("\ufffd")


def test_a_decoder_that_does_more_than_join_bytes_is_the_librarys(tmp_path: Path) -> None:
    model = byte_level(["<|endoftext|>"])
    for then, text in (([], " a b"), ([decoders.Strip(" ", 1, 0)], "a b")):
        model.decoder = decoders.Sequence([decoders.ByteLevel(), *then])
        model.save(str(tmp_path / "tokenizer.json"))
        tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
        assert (tokenizer.pieces is None) == bool(then)
        assert tokenizer.decode(tokenizer.encode(" a b")) == text
