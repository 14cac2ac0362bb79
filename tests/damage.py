"""Damages files as disks, editors and people do: one thing is otherwise, by a random draw."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bertscale.data.shards import MANIFEST_NAME
from bertscale.files import json_digest

VALUES: list[Any] = [None, -1, 0, 10**30, 1.5, 1e400, "x", "../x", [], {}, [[]], True, "\ud800"]


def edited_bytes(content: bytes, draw: random.Random) -> bytes:
    """`content` cut short, empty, or with another byte or more of them somewhere."""
    place = draw.randrange(len(content))
    byte = draw.choice([b"0", b'"', b"{", b"}", b"[", b"]", b"x", b",", b"\0", b"\n", b"\xff"])
    match draw.randrange(8):
        case 0:
            return b""
        case 1:
            return content[:place] + bytes(draw.randrange(256) for _ in range(9)) + content[place + 9 :]
        case 2 | 3:
            return content[:place]
        case _:
            return content[:place] + byte + content[place + 1 :]


def edited_json(value: Any, draw: random.Random) -> Any:
    """A copy of `value` in which one thing, at a random place, is gone, or another value, key or type."""
    value = json.loads(json.dumps(value))
    node = value
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = draw.choice(keys)
        if not isinstance(node[key], dict | list) or not node[key] or draw.random() < 0.3:
            break
        node = node[key]
    match draw.randrange(4):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[f"{key}?"] = node.pop(key)
        case 2:
            node[key] = [node[key]]
        case _:
            node[key] = draw.choice(VALUES)
    return value


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], None], *, signed: bool = True) -> None:
    """Changes the manifest of a data set and its digest; not `signed`: without one, as earlier versions."""
    path = folder / MANIFEST_NAME
    manifest = json.loads(path.read_bytes())
    del manifest["digest"]
    change(manifest)
    path.write_text(json.dumps({**manifest, "digest": json_digest(manifest)} if signed else manifest))


def edited_table(table: dict[str, Any], draw: random.Random) -> bytes:
    """The bytes of a file of JSON that was edited as a text or as a table."""
    if draw.random() < 0.3:
        return edited_bytes(json.dumps(table, indent=1).encode(), draw)
    return json.dumps(edited_json(table, draw), indent=1).encode(errors="surrogatepass")
