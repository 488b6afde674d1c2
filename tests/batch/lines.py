"""Lines of the batch format, and reading what came of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def line(custom_id: str, url: str = "/v1/completions", **body: Any) -> bytes:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body}).encode() + b"\n"


def chat(custom_id: str, text: str, **body: Any) -> bytes:
    return line(custom_id, "/v1/chat/completions", messages=[{"role": "user", "content": text}], **body)


def write(path: Path, lines: Iterable[bytes]) -> Path:
    path.write_bytes(b"".join(lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    assert not data or data.endswith(b"\n")
    return [json.loads(raw) for raw in data.splitlines()]


def by_id(path: Path) -> dict[str, dict[str, Any]]:
    """The results by name: each once."""
    found = read(path)
    names = [record["custom_id"] for record in found if record["custom_id"] is not None]
    assert len(names) == len(set(names))
    return {record["custom_id"]: record for record in found if record["custom_id"] is not None}


def text(record: dict[str, Any], i: int = 0) -> str:
    choice = record["response"]["body"]["choices"][i]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def code(record: dict[str, Any]) -> str:
    assert record["response"] is None
    return record["error"]["code"]
