"""Web archives give the text of their pages."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import pytest

from data_prep.corpus import Corpus
from data_prep.records import Invalid
from data_prep.streams import CorpusError, UnreadableError
from tests.helpers.inputs import warc_record, warc_response, write_bytes, write_zst

pytest.importorskip("fastwarc")
pytest.importorskip("resiliparse")

PAGE = (
    "<html><head><title>t</title><script>var no = 1;</script></head><body><nav><a href='/'>Home</a></nav>"
    "<main><p>{}</p><p>A second paragraph of the same page.</p></main></body></html>"
)
WARC = [
    warc_record("warcinfo", b"software: test\r\n"),
    warc_record("request", b"GET / HTTP/1.1\r\n\r\n", "application/http; msgtype=request"),
    warc_response(PAGE.format("Caf\u00e9 in UTF-8.").encode()),
    warc_response(PAGE.format("Caf\u00e9 in Latin-1.").encode("latin-1"), "text/html; charset=iso-8859-1"),
    warc_response(b"plain text\n", "text/plain"),
    warc_response(b"\x89PNG", "image/png"),
    warc_response(b"<p>gone</p>", status="404 Not Found"),
    warc_record("metadata", b"x: y\r\n"),
]
WET = [
    warc_record("warcinfo", b"x: y\r\n"),
    warc_record("conversion", "Caf\u00e9\n".encode()),
    warc_record("conversion", b"two\n"),
]


def write(path: Path, records: list[bytes]) -> Path:
    if path.suffix == ".gz":  # a member each, as archives are written
        return write_bytes(path, b"".join(map(gzip.compress, records)))
    return write_zst(path, b"".join(records)) if path.suffix == ".zst" else write_bytes(path, b"".join(records))


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz", "a.warc.zst"])
def test_pages_of_a_warc_are_extracted(tmp_path: Path, name: str) -> None:
    documents = list(Corpus([write(tmp_path / name, WARC)]))
    assert [(d.text.split("\n")[0], d.line) for d in documents] == [
        ("Caf\u00e9 in UTF-8.", 3),
        ("Caf\u00e9 in Latin-1.", 4),
        ("plain text", 5),
    ]
    assert "A second paragraph" in documents[0].text
    assert not any(word in documents[0].text for word in ("Home", "var no", "<p>"))


@pytest.mark.parametrize("name", ["a.wet", "a.wet.gz", "a.warc.wet.gz"])
def test_conversions_of_a_wet_are_taken_as_they_are(tmp_path: Path, name: str) -> None:
    assert [d.text for d in Corpus([write(tmp_path / name, WET)])] == ["Caf\u00e9\n", "two\n"]


def test_chunks_and_compression_of_an_answer_are_undone(tmp_path: Path) -> None:
    body = gzip.compress(b"<html><body><p>zipped and in chunks</p></body></html>")
    head = "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = head.encode() + b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
    path = write(tmp_path / "a.warc", [warc_record("response", answer, "application/http; msgtype=response")])
    assert [d.text for d in Corpus([path])] == ["zipped and in chunks"]


def test_a_conversion_that_is_not_utf8_or_too_long_is_invalid(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wet", [warc_record("conversion", b"\xff"), warc_record("conversion", b"x" * 99), *WET])
    corpus = Corpus([path], on_error="skip", max_record_bytes=50)
    (unit,) = corpus.units()
    bad = [(r.line, r.reason) for r in corpus.records(unit) if isinstance(r, Invalid)]
    assert bad == [(1, "byte 0xff is not UTF-8"), (2, "it has more than 50 bytes (--max-record-bytes)")]
    assert [d.text for d in corpus] == ["Caf\u00e9\n", "two\n"]


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        ("Caf\u00e9", "utf-8"),
        ("<meta charset=iso-8859-2><p>\u0142\u00f3d\u017a</p>", "iso-8859-2"),
        ("\u65e5\u672c\u8a9e\u306e\u6587\u66f8\u3067\u3059\u3002" * 20, "shift_jis"),
    ],
)
def test_a_page_that_does_not_say_what_it_is_encoded_in_is_decoded(tmp_path: Path, content: str, encoding: str) -> None:
    page = warc_response(f"<html><body><p>{content}</p></body></html>".encode(encoding), "text/html")
    (document,) = Corpus([write(tmp_path / "a.warc", [page])])
    assert document.text == content.removeprefix("<meta charset=iso-8859-2><p>").removesuffix("</p>")


def test_an_answer_that_is_no_http_is_no_page(tmp_path: Path) -> None:
    bad = warc_record("response", b"garbage" * 9, "application/http; msgtype=response")
    assert [d.text for d in Corpus([write(tmp_path / "a.warc", [bad, WARC[4]])])] == ["plain text\n"]


@pytest.mark.parametrize("cut", [6, 8, 20, 60, 130])
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_a_truncated_archive_is_damaged(tmp_path: Path, cut: int, compression: str) -> None:
    whole = write(tmp_path / f"whole.wet{compression}", WET).read_bytes()
    if compression:
        cut = cut // 4 + 1
    path = write_bytes(tmp_path / f"a.wet{compression}", whole[:-cut])
    with pytest.raises(UnreadableError, match=r"a\.wet.* is damaged after record \d .*; get the file again"):
        list(Corpus([path]))


def test_what_is_no_archive_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match=r"a\.warc is damaged after record 0 "):
        list(Corpus([write_bytes(tmp_path / "a.warc", b"plain text\n" * 20)]))


@pytest.mark.parametrize("package", ["fastwarc", "resiliparse"])
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    for module in ("fastwarc.warc",) if package == "fastwarc" else ("resiliparse.parse.encoding",):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(CorpusError, match=rf"package {package}: pip install 'mamba-pretrain\[warc\]'") as caught:
        list(Corpus([write(tmp_path / "a.warc", WARC)], on_error="skip-files"))
    assert not isinstance(caught.value, UnreadableError)
