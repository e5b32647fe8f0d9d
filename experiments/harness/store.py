"""Finished results on disk, written atomically one by one, so that a run can be resumed.

    OUT/settings.json      what must be equal for results to be comparable
    OUT/runs/NAME.json     one finished result each
    OUT/NAME.npz           trees of arrays, where an experiment keeps weights

A file is written under a temporary name, synced and renamed: a killed process leaves either the
whole file or none.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import UserError


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


def make_folder(path: Path, out: Path | None = None) -> None:
    """Makes a folder of `--out`, itself unless that is given."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out or path}: cannot be written ({error.strerror})") from error


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


def write_tree(path: Path, tree: Any, record: dict[str, Any]) -> None:
    """Replaces `path` by the leaves of `tree` and the record, which must survive JSON."""
    buffer = io.BytesIO()
    leaves = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
    np.savez(buffer, record=np.asarray(json.dumps(record)), **leaves)  # type: ignore[arg-type]
    write_atomically(path, buffer.getvalue())


def read_tree(path: Path, like: Any) -> tuple[Any, dict[str, Any]] | None:
    """What `write_tree` wrote, with the structure of `like`; None where there is no file.

    Raises:
      UserError: the file is something else, or holds other shapes.
    """
    if not path.exists():
        return None
    expected, structure = jax.tree.flatten(like)
    try:
        # Opened here, because numpy leaves a file that is no archive open.
        with open(path, "rb") as raw, np.load(raw) as file:
            leaves = [file[f"leaf{i}"] for i in range(len(expected))]
            record = json.loads(str(file["record"]))
        if [(x.shape, x.dtype) for x in leaves] != [(x.shape, x.dtype) for x in expected]:
            raise ValueError("other shapes")
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: no weights of a model of these settings ({error}); nothing was changed. "
            "Remove this one file and run again: only what it held is repeated"
        ) from error
    return jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in leaves]), record


class Store:
    """The results in one output directory, all made with the same settings.

    Args:
      out: the directory; created if needed.
      settings: what decides a result, apart from its name. Must survive JSON unchanged.
      follows: whether another process writes, with which this one trains.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], *, follows: bool = False):
        self.out, self._runs, self._follows = out, out / "runs", follows
        self._results: dict[str, dict[str, Any]] = {}
        make_folder(self._runs, out)
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
        if not self._follows:
            write_json(self._runs / f"{name}.json", self._results[name])
        return self._results[name]
