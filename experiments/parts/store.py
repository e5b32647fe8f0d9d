"""Finished results on disk: one JSON file each, written atomically, so that a run can be resumed.

    OUT/settings.json      what must be equal for results to be comparable
    OUT/runs/NAME.json     one finished result each

A file is written under a temporary name, synced and renamed: a killed process leaves either the
whole file or none.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.parts import UserError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces `path` by `content`, all or nothing, also when the machine loses power."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes strict JSON (no NaN) atomically."""
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, kind: str) -> dict[str, Any]:
    """Reads a file written with `"kind": kind`; anything else is an error that names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        reason = "" if isinstance(content, dict) and content.get("kind") == kind else f"no {kind}"
    except (OSError, ValueError) as error:
        content, reason = {}, str(error)
    if reason:
        raise UserError(
            f"{path}: not a complete results file ({reason}); nothing was changed. Remove this one "
            "file and run again: only what it held is repeated"
        )
    return content


class Store:
    """The results in one output directory, all made with the same settings.

    Args:
      out: the directory; created if needed.
      settings: what decides a result, apart from its name. Must survive JSON unchanged.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]):
        self.out, self._runs, self._results = out, out / "runs", {}
        try:
            self._runs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written ({error.strerror})") from error
        self._check_settings(out / "settings.json", settings)
        for path in sorted(self._runs.glob("*.json")):
            self._results[path.stem] = read_json(path, "result")

    def _check_settings(self, path: Path, settings: Mapping[str, Any]) -> None:
        if not path.exists():
            write_json(path, {"kind": "settings", **settings})
            return
        stored = read_json(path, "settings")
        del stored["kind"]
        differing = [
            f"{name} was {stored.get(name)!r}, is {settings.get(name)!r}"
            for name in sorted(stored.keys() | settings.keys())
            if stored.get(name) != settings.get(name)
        ]
        if differing:
            raise UserError(
                f"--out {self.out} holds results of other settings: {'; '.join(differing)}. "
                "Choose another --out"
            )

    def __contains__(self, name: str) -> bool:
        return name in self._results

    def load(self, name: str) -> dict[str, Any]:
        """The finished result of that name."""
        return self._results[name]

    def save(self, name: str, result: Mapping[str, Any]) -> dict[str, Any]:
        """Writes a finished result for good and returns it."""
        self._results[name] = {"kind": "result", **result}
        write_json(self._runs / f"{name}.json", self._results[name])
        return self._results[name]
