"""Inputs of every format, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def jsonl_bytes(documents: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({key: text, "other": 1}) + "\n" for text in documents).encode()


def write_parquet(path: Path, documents: list[object], key: str = "text") -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({key: documents, "other": list(range(len(documents)))}), path)
    return path


def write_zst(path: Path, content: bytes, frames: int = 1) -> Path:
    zstandard = pytest.importorskip("zstandard")
    size = -(-len(content) // frames)
    parts = (content[i * size : (i + 1) * size] for i in range(frames))
    path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(part) for part in parts))
    return path


def save_dataset(path: Path, documents: list[str]) -> Path:
    pytest.importorskip("datasets").Dataset.from_dict({"text": documents}).save_to_disk(str(path))
    return path


def save_dataset_dict(path: Path, documents: list[str]) -> Path:
    datasets = pytest.importorskip("datasets")
    halves = {"a": documents[:1], "b": documents[1:]}
    parts = {name: datasets.Dataset.from_dict({"text": half}) for name, half in halves.items()}
    datasets.DatasetDict(parts).save_to_disk(str(path))
    return path


def write_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def warc_record(kind: str, payload: bytes, content_type: str = "text/plain") -> bytes:
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:1>\r\nWARC-Date: 2020-01-01T00:00:00Z\r\n"
        f"Content-Type: {content_type}\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    return head.encode() + payload + b"\r\n\r\n"


def warc_response(body: bytes, content_type: str = "text/html; charset=utf-8", status: str = "200 OK") -> bytes:
    answer = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\n\r\n".encode() + body
    return warc_record("response", answer, "application/http; msgtype=response")


def texts(corpus: Any, unit_bytes: int) -> list[str]:
    """Of all documents, read unit by unit."""
    return [record.text for unit in corpus.units(unit_bytes) for record in corpus.records(unit)]
