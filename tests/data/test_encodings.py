"""What is stored of an encoding and known of its text is the same in C++ and in Python, and right."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_pretrain.compiled import BuildError, Library
from mamba_pretrain.data import encodings
from mamba_pretrain.data.encodings import Encodings, OutsideError
from mamba_pretrain.data.tokenizer import BytesTokenizer, SentencePieceTokenizer, Tokenizer
from tests.helpers.corpora import make_documents

SPACES = "".join(chr(c) for c in range(0x110000) if chr(c).isspace())
U16, I32 = np.dtype("<u2"), np.dtype("<i4")


class Table(Tokenizer):
    """Any pieces at all."""

    def __init__(self, pieces: list[bytes], *, drops_space: bool = False) -> None:
        self.pieces, self.vocab_size, self.drops_space = pieces, len(pieces), drops_space


class Opaque(BytesTokenizer):
    """What each id stands for, only the library knows."""

    pieces = None

    def _join(self, ids: Sequence[int]) -> bytes:
        return bytes(ids)


@pytest.fixture(params=[True, False], ids=["compiled", "python"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(encodings, "compiled", lambda: None)
    else:
        assert encodings.compiled() is not None, "there is a compiler: sources that do not build are no reason to skip"


@settings(max_examples=300, deadline=None)  # the first one may build the library
@given(
    pieces=st.lists(st.one_of(st.binary(max_size=12), st.sampled_from([b"", b" ", b" a", b"  "])), min_size=1),
    drops_space=st.booleans(),
    wide=st.booleans(),
    data=st.data(),
)
def test_an_encoding_gives_its_text_back_where_its_pieces_join_to_it(
    pieces: list[bytes], drops_space: bool, wide: bool, data: st.DataObject
) -> None:
    tokenizer = Table(pieces, drops_space=drops_space)
    ids = np.array(data.draw(st.lists(st.integers(0, len(pieces) - 1), max_size=30)), np.int32)
    text = tokenizer.decode_bytes(ids.tolist())
    cut = data.draw(st.integers(0, len(text)))
    others = [text[:cut], text + b"x", text[:cut] + b"\xff" + text[cut + 1 :], b" " + text]
    dtype = I32 if wide else U16
    encodings = Encodings(tokenizer, dtype)
    for candidate in (text, *others):
        stored = bytearray(b"before")
        assert encodings.append(ids, candidate, stored) == (candidate == text)
        assert stored == b"before" + ids.astype(dtype).tobytes()


@pytest.mark.usefixtures("either")
def test_ids_are_stored_in_either_width_and_known_to_give_the_text_back() -> None:
    utf8 = "a\u00e9\u4e2d".encode()
    ids = next(BytesTokenizer().encode_batch([utf8.decode()], [utf8]))
    assert ids.dtype == np.uint8
    for tokenizer in (BytesTokenizer(), Opaque()):
        for dtype in (U16, I32):
            for given_ids in (ids, ids.astype(np.int32)):
                stored = bytearray()
                assert Encodings(tokenizer, dtype).append(given_ids, utf8, stored)
                assert stored == ids.astype(dtype).tobytes()
                assert not Encodings(tokenizer, dtype).append(given_ids[:-1], utf8, stored)
    assert Encodings(BytesTokenizer(), U16).append(np.empty(0, np.int32), b"", bytearray())


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("wrong", [-1, 257, 70_000, np.iinfo(np.int32).min])
def test_an_id_outside_the_vocabulary_is_named(wrong: int) -> None:
    for dtype in (U16, I32):
        for before in (1, 1000):
            for after in ([], [300]):
                ids, stored = np.array([1] * before + [wrong, *after], np.int32), bytearray()
                with pytest.raises(OutsideError, match=f"gives id {wrong}, its vocabulary has 257"):
                    Encodings(BytesTokenizer(), dtype).append(ids, b"abc", stored)
                assert not stored


@pytest.mark.usefixtures("either")
def test_long_documents_and_long_pieces_are_checked_to_the_end() -> None:
    """They are compared a block at a time."""
    pieces = [b"x" * 14, b"y" * 15, b"z" * 16, b"", b"w" * 400]
    ids = np.random.default_rng(0).integers(0, len(pieces), 200_000, np.int32)
    text = b"".join(pieces[i] for i in ids)
    encodings, stored = Encodings(Table(pieces), U16), bytearray()
    assert encodings.append(ids, text, stored) and stored == ids.astype(U16).tobytes()
    for place in (0, len(text) // 2, len(text) - 1):
        assert not encodings.append(ids, text[:place] + b"?" + text[place + 1 :], bytearray())
    assert not encodings.append(ids, text + b"x", bytearray()) and not encodings.append(ids, text[:-1], bytearray())


@pytest.mark.usefixtures("either")
def test_a_space_that_decoding_drops_is_no_loss(tmp_path: Path) -> None:
    """SentencePiece's default puts one before every text, and takes it away again."""
    model = tmp_path / "tokenizer.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_documents(50)),
        model_prefix=str(model.with_suffix("")),
        vocab_size=45,
        minloglevel=2,
    )
    tokenizer = SentencePieceTokenizer(model)
    assert tokenizer.drops_space
    encoded = Encodings(tokenizer, U16)
    for text, exact in (("two words", True), (" two words", False), ("two  words", False)):
        (ids,) = tokenizer.encode_batch([text], [text.encode()])
        assert encoded.append(ids, text.encode(), bytearray()) == exact


@settings(max_examples=300, deadline=None)  # the first one may build the library
@given(st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(SPACES + "\u200b\ufeff\u2007"))))
def test_words_are_those_of_str_split(text: str) -> None:
    assert Encodings(BytesTokenizer(), U16).words(text.encode()) == len(text.split())


def test_every_space_separates_words() -> None:
    counts = Encodings(BytesTokenizer(), U16).words
    for character in map(chr, (*range(0xD800), *range(0xE000, 0x3400), *range(0xFE00, 0x10100))):
        text = f"a{character}b{character}"
        assert counts(text.encode()) == len(text.split()), hex(ord(character))


def test_without_a_compiler_python_does_the_same_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(_: Library) -> None:
        raise BuildError("no C++ compiler", "apt-get install g++")

    monkeypatch.setattr(encodings, "compiled", cache(encodings.compiled.__wrapped__))
    monkeypatch.setattr(Library, "load", fails)
    encoded = Encodings(BytesTokenizer(), U16)
    with caplog.at_level(logging.WARNING):
        assert encoded.append(np.array([97, 98], np.int32), b"ab", bytearray()) and encoded.words(b"a b") == 2
    (record,) = caplog.records
    assert "encodings are checked by Python" in record.getMessage() and "apt-get install g++" in record.getMessage()
