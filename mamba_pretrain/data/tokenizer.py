"""Text to token ids and back: SentencePiece models, Hugging Face tokenizer.json files, and plain bytes.

Encoding never adds a special token and never finds one: the text "<|endoftext|>" or "</s>" is text. Decoding goes
through a table of each id's bytes, so that pieces of a character join up and a prefix of a document decodes too.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import sentencepiece
import tokenizers
from numpy.typing import NDArray

from mamba_pretrain.data.manifest import Manifest, TokenizerInfo

SPACE_MARK: Final = "\u2581"  # SentencePiece writes a space as this character
REPLACEMENT: Final = "\ufffd".encode()  # what the tokenizers library shows for a part of a character
SETTINGS: Final = "tokenizer_config.json"  # beside a tokenizer.json: the names of its special tokens
KNOWN_EOD: Final = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>", "[EOS]")
KNOWN_BOS: Final = ("<|begin_of_text|>", "<|startoftext|>", "<s>", "<bos>", "<|bos|>", "[BOS]")
BYTES_FILE: Final = b"Byte tokenizer: ids 0 to 255 are the bytes of UTF-8, 256 begins and ends a document.\n"
PART: Final = 1 << 16  # characters of a long text that are encoded at a time
PARTS_AT_ONCE: Final = 8  # for as many threads
# Before whitespace that follows something else, or punctuation that follows a letter or a digit. Only characters that
# everybody counts as such, and that no normalization to NFC takes apart.
CUT: Final = re.compile(
    r"(?<=\S)[ \t\n\r\u3000]"
    r"|(?<=[A-Za-z0-9\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff])[,.;:!?)\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f]"
)

Ids = NDArray[np.int32] | NDArray[np.uint8]


class TokenizerError(ValueError):
    """A tokenizer file is missing, damaged or ambiguous, or an id is outside its vocabulary."""


class Tokenizer(Protocol):
    """What every kind offers. `sha256` is that of the file, which is what makes two tokenizers the same."""

    kind: str
    file: str  # the name `save` gives the file
    content: bytes
    vocab_size: int  # one more than the largest id
    bos_id: int  # eod_id where the tokenizer has no bos
    eod_id: int
    pieces: Sequence[bytes] | None = None  # what each id stands for, anywhere; None: only the library knows
    drops_space: bool = False  # decoding leaves out a space that all begins with

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without bos and eod."""

    def encode_batch(self, texts: Sequence[str], utf8: Sequence[bytes]) -> Iterator[Ids]:
        """`encode` of each, at the least cost a text: for many documents. `utf8` holds the same texts."""
        # By way of an array: of a list, numpy asks each number for its type.
        return (np.frombuffer(array("i", ids), np.int32) for ids in self._encode_lists(texts))

    def _encode_lists(self, texts: Sequence[str]) -> Iterator[list[int]]:
        return map(self.encode, texts)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of `ids`; special tokens have none. Raises TokenizerError for an id outside the vocabulary."""
        if len(ids) and (min(ids) < 0 or max(ids) >= self.vocab_size):
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise TokenizerError(f"token id {wrong} is outside the tokenizer's vocabulary of {self.vocab_size:,}")
        return self._join(ids)

    def _join(self, ids: Sequence[int]) -> bytes:
        assert self.pieces is not None
        pieces = self.pieces
        joined = b"".join([pieces[i] for i in ids])
        return joined.removeprefix(b" ") if self.drops_space else joined

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, with U+FFFD where they stop inside a character."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream(self, ids: Iterable[int], context: Sequence[int] = ()) -> Iterator[str]:
        """The text of `ids` in increments, as they come: what `decode` of context and ids adds to that of the context.

        A character is held until it is whole, and a token's space is kept unless it begins the document.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        window, known = list(context), self.decode_bytes(context)
        n_known = len(window)
        decoder.decode(known)
        for i in ids:
            window.append(i)
            joined = self.decode_bytes(window)
            if len(joined) <= len(known) or joined.endswith(REPLACEMENT):
                continue
            if text := decoder.decode(joined[len(known) :]):
                yield text
            # How a piece decodes depends on whether text precedes it, not on how much.
            window = window[n_known:]
            n_known, known = len(window), self.decode_bytes(window)
        if text := decoder.decode(self.decode_bytes(window)[len(known) :], final=True):
            yield text

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def info(self) -> TokenizerInfo:
        """How a manifest knows it."""
        return TokenizerInfo(self.kind, self.sha256, self.vocab_size, self.bos_id, self.eod_id, self.file)

    def save(self, directory: Path) -> None:
        """Writes what `load_tokenizer(directory)` needs to return this tokenizer."""
        (directory / self.file).write_bytes(self.content)


class BytesTokenizer(Tokenizer):
    """One id a byte; nothing to train, nothing to load."""

    kind, file, content = "bytes", "tokenizer.bytes", BYTES_FILE
    vocab_size, bos_id, eod_id = 257, 256, 256
    pieces = (*(bytes([i]) for i in range(256)), b"")

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str], utf8: Sequence[bytes]) -> Iterator[Ids]:
        return (np.frombuffer(text, np.uint8) for text in utf8)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece .model. Lossless if it has byte pieces, no normalisation, no dummy prefix (train_tokenizer's).

    The end of a document is its eos piece, and nothing else: the file has no room for another choice.
    """

    kind, file = "sentencepiece", "tokenizer.model"

    def __init__(self, path: Path, *, eod: str | None = None) -> None:
        self.content = path.read_bytes()
        try:
            self._model = model = sentencepiece.SentencePieceProcessor(model_proto=self.content)
        except RuntimeError as error:
            raise TokenizerError(f"{path} is not a SentencePiece model: it is damaged or of another kind") from error
        self.vocab_size = int(model.get_piece_size())
        if self.vocab_size == 0:
            raise TokenizerError(f"{path} is a SentencePiece model without pieces: an empty or truncated file")
        self.eod_id = int(model.eos_id())
        if self.eod_id < 0:
            raise TokenizerError(
                f"{path} has no eos piece, and documents need an end: train one with an eos, or convert it to a "
                "tokenizer.json, for which --eod of build_shards names a special token"
            )
        if eod not in (None, name := model.id_to_piece(self.eod_id)):
            raise TokenizerError(f"{path} ends documents with {name!r}, not {eod!r}: leave out --eod")
        self.bos_id = int(model.bos_id()) if model.bos_id() >= 0 else self.eod_id
        self.drops_space = model.normalize("a") != "a"
        # The model cannot tell this character in a text from a space. In byte pieces it comes back as itself.
        bytes_of_mark = [model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._mark = bytes_of_mark if all(map(model.is_byte, bytes_of_mark)) and not self.drops_space else None

    @cached_property
    def pieces(self) -> list[bytes]:  # type: ignore[override]
        # When they are asked for: it takes a tenth of a second, and a build loads the tokenizer three times.
        return [self._bytes_of(i, self._model.id_to_piece(i)) for i in range(self.vocab_size)]

    def _bytes_of(self, i: int, piece: str) -> bytes:
        if self._model.is_control(i):
            return b""
        if self._model.is_unknown(i):
            return " \u2047 ".encode()  # what SentencePiece itself shows for it
        return bytes([int(piece[3:5], 16)]) if self._model.is_byte(i) else piece.replace(SPACE_MARK, " ").encode()

    def encode(self, text: str) -> list[int]:
        if self._mark is None or SPACE_MARK not in text:
            ids: list[int] = self._model.encode(text)
            return ids
        first, *rest = text.split(SPACE_MARK)
        return self.encode(first) + [i for part in rest for i in (*self._mark, *self._model.encode(part))]

    def encode_batch(self, texts: Sequence[str], utf8: Sequence[bytes]) -> Iterator[Ids]:
        if self._mark is not None and any(SPACE_MARK in text for text in texts):
            return super().encode_batch(texts, utf8)
        return (self._model.encode(text, return_type="numpy") for text in utf8)  # a tenth faster than lists


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json of the `tokenizers` library, such as GPT-NeoX-20B's (Mamba's own).

    The end of a document is `eod`, else the eos_token of a tokenizer_config.json beside the file, else the only special
    token of a known name (KNOWN_EOD).
    """

    kind, file = "huggingface", "tokenizer.json"

    def __init__(self, path: Path, *, eod: str | None = None) -> None:
        self.content = path.read_bytes()
        try:
            self._model = model = tokenizers.Tokenizer.from_buffer(self.content)
            settings: dict[str, Any] = json.loads(self.content)
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{path} is not a tokenizer.json of the tokenizers library: {error}") from error
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = True  # that is, encode their text as text
        vocab = model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        added = dict(model.get_added_tokens_decoder())
        specials = {token.content: i for i, token in added.items() if token.special}
        config = _config_beside(path)
        if eod is not None and eod not in specials:
            raise TokenizerError(f"{path} has no special token {eod!r}; it has {sorted(specials)}")
        eod = eod or config.get("eos_token")
        if eod is None:
            candidates = [name for name in KNOWN_EOD if name in specials]
            if len(candidates) != 1:
                raise TokenizerError(
                    f"{path}: which special token ends a document is unclear, candidates are "
                    f"{candidates or sorted(specials)}; pass the right one to build_shards as --eod, or name it as "
                    "eos_token in a tokenizer_config.json beside the file"
                )
            eod = candidates[0]
        self.eod_id = _id_of(eod, vocab, path)
        bos = config.get("bos_token") or next((name for name in KNOWN_BOS if name in specials), eod)
        self.bos_id = _id_of(bos, vocab, path)
        self._names = {"eos_token": eod, "bos_token": bos}
        self._cuts = _can_be_cut(settings, added.values())
        if _decodes_bytes(settings.get("decoder")):
            pieces = [b""] * self.vocab_size
            self.pieces = pieces
            for piece, i in vocab.items():
                if i in added:
                    pieces[i] = b"" if added[i].special else piece.encode()
                elif BYTE_OF.keys() >= set(piece):
                    pieces[i] = bytes(BYTE_OF[c] for c in piece)
                else:
                    raise TokenizerError(
                        f"{path} is damaged: its decoder is byte-level, and piece {i}, {piece!r}, is not"
                    )

    def encode(self, text: str) -> list[int]:
        return list(self._model.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str], utf8: Sequence[bytes]) -> Iterator[Ids]:
        if not self._cuts or max(map(len, texts), default=0) <= PART:
            return super().encode_batch(texts, utf8)
        return map(self._encode_long, texts)

    def _encode_long(self, text: str) -> Ids:
        """`encode`, in memory that grows by 4 bytes an id. The library takes 125 times the text it is given at once."""
        ids, parts = array("i"), _parts(text)
        while several := list(islice(parts, PARTS_AT_ONCE)):
            for encoded in self._encode_lists(several):
                ids.extend(encoded)
        return np.frombuffer(ids, np.int32)

    def _encode_lists(self, texts: Sequence[str]) -> Iterator[list[int]]:
        # "fast" leaves out the offsets of the tokens in the text, which nobody asks for here
        return (encoding.ids for encoding in self._model.encode_batch_fast(list(texts), add_special_tokens=False))

    def _join(self, ids: Sequence[int]) -> bytes:
        if self.pieces is not None:
            return super()._join(ids)
        return str(self._model.decode(list(ids), skip_special_tokens=True)).encode()

    def save(self, directory: Path) -> None:
        super().save(directory)
        # The eod may have been the caller's choice; this is where Hugging Face's own loaders look for it, too.
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._names}
        (directory / SETTINGS).write_text(json.dumps(config, indent=2) + "\n")


def load_tokenizer(spec: str | Path, *, eod: str | None = None) -> Tokenizer:
    """`spec`: the word "bytes", a .model file, a tokenizer.json file, or a directory that holds one of the three.

    `eod` names the token that ends a document, where the file leaves it open. Raises TokenizerError.
    """
    if spec == "bytes":
        return _bytes_tokenizer(eod)
    path = Path(spec)
    if path.is_dir():
        # An export may hold two: then the tokenizer.json was made from the other, for programs that read nothing else.
        names = (BytesTokenizer.file, SentencePieceTokenizer.file, HuggingFaceTokenizer.file)
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise TokenizerError(f"{path} holds no tokenizer; expected one of {', '.join(names)}")
        path = found[0]
    if not path.is_file():
        raise TokenizerError(
            f"tokenizer {spec} does not exist; expected `bytes`, a file .model or .json, or a directory"
        )
    if path.suffix == ".model":
        return SentencePieceTokenizer(path, eod=eod)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, eod=eod)
    if path.name == BytesTokenizer.file and path.read_bytes() == BYTES_FILE:
        return _bytes_tokenizer(eod)
    raise TokenizerError(f"{path} is no tokenizer this program knows: expected a .model (SentencePiece) or .json file")


def dataset_tokenizer(directory: str | Path, manifest: Manifest) -> Tokenizer:
    """The tokenizer in a dataset's directory. Raises TokenizerError unless it is what the dataset was made with."""
    expected = manifest.tokenizer
    path = Path(directory) / expected.file
    tokenizer = load_tokenizer(path)
    for name in ("kind", "sha256", "vocab_size", "bos_id", "eod_id"):
        if getattr(tokenizer, name) != getattr(expected, name):
            raise TokenizerError(
                f"{path}: its {name} is {getattr(tokenizer, name)}, the dataset was made with "
                f"{getattr(expected, name)}: it, or a tokenizer_config.json beside it, changed; copy the dataset again"
            )
    return tokenizer


def _bytes_tokenizer(eod: str | None) -> Tokenizer:
    if eod is not None:
        raise TokenizerError(f"the byte tokenizer ends documents with its own token 256, not {eod!r}: leave out --eod")
    return BytesTokenizer()


def _decodes_bytes(decoder: Any) -> bool:
    """Whether it joins the bytes that pieces stand for, and does nothing else."""
    match decoder:
        case {"type": "ByteLevel"} | {"type": "Sequence", "decoders": [{"type": "ByteLevel"}]}:
            return True
    return False


def _can_be_cut(settings: dict[str, Any], added: Iterable[Any]) -> bool:
    """Whether the ids of a text are those of its `_parts`, one after the other.

    So it is where GPT-2's pattern makes the words, each of which is encoded by itself: none of them goes over a CUT,
    and what the pattern finds from there on does not depend on what was before; and where no added token, which are
    looked for first, goes over one or takes it for the edge of a word that it is not. NFC changes nothing across a CUT.
    """
    words, model = settings.get("pre_tokenizer") or {}, settings.get("model") or {}
    return (
        words.get("type") == "ByteLevel"
        and words.get("use_regex", True)
        and not words.get("add_prefix_space", True)
        and (settings.get("normalizer") or {"type": "NFC"}).get("type") == "NFC"
        and not model.get("dropout")
        and not any(
            token.rstrip or CUT.search(token.content) or (token.single_word and not token.content[:1].isalnum())
            for token in added
        )
    )


def _parts(text: str) -> Iterator[str]:
    """Pieces of PART characters and what follows up to a CUT."""
    begin = 0
    while len(text) - begin > PART and (cut := CUT.search(text, begin + PART)):
        yield text[begin : cut.start()]
        begin = cut.start()
    yield text[begin:]


def _id_of(token: str, vocab: dict[str, int], path: Path) -> int:
    if token not in vocab:
        raise TokenizerError(f"{path} has no token {token!r}")
    return vocab[token]


def _config_beside(path: Path) -> dict[str, str]:
    """The token names in tokenizer_config.json, which writes a name as a string or as {"content": name}."""
    file = path.with_name(SETTINGS)
    if path.name != HuggingFaceTokenizer.file or not file.is_file():
        return {}
    try:
        config = json.loads(file.read_bytes())
        names = {key: config[key] for key in ("eos_token", "bos_token") if config.get(key)}
        return {key: name if isinstance(name, str) else name["content"] for key, name in names.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TokenizerError(f"{file} cannot be read ({error!r}); mend it or remove it") from error


def _byte_characters() -> dict[str, int]:
    """GPT-2's byte-level alphabet: printable Latin-1 bytes are themselves, the others are U+0100 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF: Final = _byte_characters()
