"""The command line: what is in a file, whether it is whole, what is in a folder. Never loads a model."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from llamastate import __version__, batchcli, layout, logcli, snapfile, storecli
from llamastate.clitext import age, print_table, size
from llamastate.errors import BadMagicError, CorruptStateError, LlamaStateError, MediaTokensError
from llamastate.layout.infer import identify
from llamastate.layout.known import what_is
from llamastate.manager import list_sessions, saved_checkpoints
from llamastate.sessionfiles import unpack_tokens
from llamastate.snapshot import Snapshot
from llamastate.statefiles import MappedFile, naming, reading

__all__ = ["main"]

_EPILOG = """exit status:
  0  all is well
  1  a file is damaged, is of no known kind, or cannot be read
  2  wrong usage
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``llamastate``; its exit status.

    Parameters
    ----------
    arguments : sequence of str, optional
        Those of the process if not given.
    """
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):  # either may be closed
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # names of files can be anything, terminals cannot show everything
            reconfigure(errors="backslashreplace")
    try:
        status: int = options.run(options)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read this has seen enough. At its end Python would flush again, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except LlamaStateError as error:
        path = getattr(error, "path", None)
        named = path is None or path in str(error) or repr(path) in str(error)
        print(f"llamastate: {error}" if named else f"llamastate: {path}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


class _Parser(argparse.ArgumentParser):
    """One that tells its own usage, not that of the parser above it, of a flag that it does not know."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="llamastate",
        description="Look into saved states of llama.cpp models, and run batches. Only run-batch loads a model.",
        epilog=_EPILOG,
        formatter_class=form,
    )
    parser.add_argument("--version", action="version", version=f"llamastate {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect = commands.add_parser(
        "inspect",
        help="what is in a file",
        description="Tell what is in a .llsnap, GGSN or GGSQ file. Reads headers; verify reads everything.",
        epilog=_EPILOG,
        formatter_class=form,
    )
    inspect.add_argument("file", metavar="FILE")
    inspect.add_argument("--json", action="store_true", help="for programs")
    inspect.set_defaults(run=_inspect)
    verify = commands.add_parser(
        "verify",
        help="whether files are whole",
        description="Read files to the end. Snapshots carry checksums; of llama.cpp's own files only the structure can "
        "be checked.",
        epilog=_EPILOG,
        formatter_class=form,
    )
    verify.add_argument("files", metavar="FILE", nargs="+")
    verify.add_argument("--json", action="store_true", help="for programs")
    verify.set_defaults(run=_verify)
    sessions = commands.add_parser(
        "sessions", help="what is in a folder of sessions", epilog=_EPILOG, formatter_class=form
    )
    sessions.add_argument("folder", metavar="FOLDER")
    sessions.add_argument("--json", action="store_true", help="for programs")
    sessions.set_defaults(run=_sessions)
    logcli.add_commands(commands, _EPILOG, form)
    storecli.add_commands(commands, _EPILOG, form)
    batchcli.add_commands(commands, form)
    return parser


# --- commands ---------------------------------------------------------------------------------------------------------


def _inspect(options: argparse.Namespace) -> int:
    facts = describe(options.file)
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        _print_facts(facts)
    return 0


def _verify(options: argparse.Namespace) -> int:
    # all of them, also after a bad one
    found = []
    for path in options.files:
        found.append(_verified(path))
        if not options.json:
            _print_verdict(found[-1])
    if options.json:
        print(json.dumps(found, indent=2))
    return int(not all(verdict["ok"] for verdict in found))


def _verified(path: str) -> dict[str, Any]:
    verdict: dict[str, Any] = {"path": path, "ok": True, "checked": None, "section": None, "error": None}
    try:
        verdict["checked"] = verify_file(path)
    except LlamaStateError as error:
        section = error.section if isinstance(error, CorruptStateError) else None
        verdict.update(ok=False, section=section or None, error=str(error))
    return verdict


def _print_verdict(verdict: dict[str, Any]) -> None:
    if verdict["ok"]:
        print(f"{verdict['path']}: ok ({verdict['checked']})")
        return
    section = f" [{verdict['section']}]" if verdict["section"] else ""
    print(f"{verdict['path']}: FAILED{section}: {verdict['error']}")


def _sessions(options: argparse.Namespace) -> int:
    infos = list_sessions(options.folder)
    if options.json:
        print(json.dumps([info.to_dict() for info in infos], indent=2))
        return int(any(info.damaged for info in infos))
    rows = [("NAME", "TOKENS", "SIZE", "CHECKPOINTS", "AGE", "MODEL")]
    for info in infos:
        model = info.model or (info.fingerprint.architecture if info.fingerprint else "-")
        model = f"damaged: {info.error}" if info.damaged else model
        rows.append(
            (info.name, _or_dash(info.n_tokens), size(info.size), _or_dash(info.n_checkpoints), age(info.age), model)
        )
    print_table(rows, left=(0, 5))
    return int(any(info.damaged for info in infos))


# --- files ------------------------------------------------------------------------------------------------------------


def describe(path: str) -> dict[str, Any]:
    """What a file is and holds, as JSON types.

    Raises
    ------
    LoadError
        It is damaged, of no known kind, or cannot be read.
    """
    magic = _magic(path)
    if magic in layout.MAGIC.values():
        return _describe_native(path)
    _check_kind(path)
    with Snapshot.open(path) as snapshot:
        points = [
            {"n_tokens": p.n_tokens, "label": p.label, "created": _iso(p.created)} for p in saved_checkpoints(snapshot)
        ]
        return {
            "path": path,
            "format": "llsnap",
            "version": snapfile.VERSION,
            "size": snapshot.nbytes,
            "n_tokens": snapshot.n_tokens,
            "has_logits": (snapfile.Kind.LOGITS, 0) in snapshot._sections,
            "sampler": snapshot.sampler_state,
            "metadata": snapshot.metadata,
            "fingerprint": snapshot.fingerprint.to_dict(),
            "checkpoints": points,
            "sections": [
                {"name": snapfile.section_name(s), "offset": s.offset, "size": s.length}
                for s in sorted(snapshot._sections.values(), key=lambda s: s.offset)
            ],
        }


def verify_file(path: str) -> str:
    """Read a file to its end; what could be checked.

    Raises
    ------
    LoadError
        As :func:`describe`; of a damaged section its name.
    """
    if _magic(path) in layout.MAGIC.values():
        facts = _describe_native(path)
        known = facts["layout"] is not None
        return "structure; such files have no checksums" if known else "header; such files have no checksums"
    _check_kind(path)
    with Snapshot.open(path) as snapshot:
        for key in list(snapshot._sections):
            snapshot._section(key).release()
        _ = snapshot.fingerprint, snapshot.metadata, snapshot.sampler_state, saved_checkpoints(snapshot)
        return f"{len(snapshot._sections)} sections"


def _magic(path: str) -> int:
    with reading(path) as file:
        return int.from_bytes(file.read(4), "little")


def _check_kind(path: str) -> None:
    """Refuse what is no snapshot either, in words for somebody who may have meant another file."""
    with reading(path) as file:
        head = file.read(68)
    # a cut or damaged snapshot is for Snapshot.open to tell
    if sum(a == b for a, b in zip(head, snapfile.MAGIC, strict=False)) >= min(len(head), 4):
        return
    what = what_is(head)
    problem = "is neither .llsnap, GGSN nor GGSQ" if what is None else f"is {what.partition(':')[0]}, not a file of one"
    if head[:4] == b"GGUF":
        problem = "is a GGUF (a model), not a saved state"
    raise BadMagicError(
        f"{path} {problem}",
        path=path,
        reason=problem,
        expected=int.from_bytes(snapfile.MAGIC, "little"),
        found=int.from_bytes(head[:8], "little"),
    )


def _describe_native(path: str) -> dict[str, Any]:
    with MappedFile(path) as file, naming(path):
        view = file.view
        head = layout.read_header(view)
        start = head.state_offset
        facts: dict[str, Any] = {
            "path": path,
            "format": "ggsn" if head.kind == "context" else "ggsq",
            "version": head.version,
            "size": len(view),
            "n_tokens": len(head.tokens),
            "packed": head.packed,
            "media": 0,
            "architecture": None,
            "state_size": len(view) - start,
            "layout": None,
        }
        try:
            facts["n_tokens"] = len(unpack_tokens(head.tokens))
        except MediaTokensError as error:
            facts["media"], facts["n_tokens"] = error.n_chunks, int(head.tokens[2])
        if head.kind == "context":
            facts["architecture"], start = _architecture(view, start)
        parts = identify(view[start:], header=False)
        if parts is not None:
            facts["layout"] = [part.name for part in parts]
        elif head.kind == "sequence" and (facts["n_tokens"] or len(view) < start + 8):
            # of nothing no structure can be told; else every kind of memory that this package knows was tried
            raise CorruptStateError(
                "the state is of no known structure: it is damaged, or of a model that is not supported",
                reason="no known structure",
                offset=start,
                section="state",
            )
        return facts


def _architecture(view: memoryview, start: int) -> tuple[str, int]:
    n = int.from_bytes(view[start : start + 4], "little")
    end = start + 4 + n
    if start + 4 > len(view) or end > len(view):
        raise _cut(len(view))
    name = bytes(view[start + 4 : end])
    if not 0 < n <= 64 or not name.isascii():
        raise CorruptStateError(
            "corrupt session file: no architecture", reason="no architecture", offset=start, section="state"
        )
    return name.decode(), end


def _cut(n: int) -> CorruptStateError:
    reason = f"it ends after {n} bytes, in the state"
    return CorruptStateError(f"corrupt session file: {reason}", reason=reason, offset=n, section="state")


# --- for people -------------------------------------------------------------------------------------------------------


def _print_facts(facts: dict[str, Any]) -> None:
    for name, value in facts.items():
        if name in ("sections", "checkpoints"):
            continue
        if isinstance(value, dict):
            print(f"{name}:" if value else f"{name}: -")
            for key, item in value.items():
                print(f"  {key:<18} {item if isinstance(item, str) else json.dumps(item)}")
            continue
        text = f"{size(value)} ({value} bytes)" if name.endswith("size") else "-" if value is None else value
        print(f"{name:<20} {', '.join(text) if isinstance(text, list) else text}")
    for point in facts.get("checkpoints", ()):
        print(f"checkpoint           {point['n_tokens']:>8} tokens  {point['label'] or ''}")
    for section in facts.get("sections", ()):
        print(f"section              {section['name']:<24} {section['size']:>12} bytes at {section['offset']}")


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def _iso(ns: float) -> str | None:
    try:
        return datetime.fromtimestamp(ns / 1e9, timezone.utc).isoformat()
    except (OverflowError, ValueError, OSError):
        return None


if __name__ == "__main__":
    sys.exit(main())
