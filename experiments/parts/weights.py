"""Trees of arrays in one file, with a record beside them, written atomically."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.parts import UserError
from experiments.parts.store import write_atomically


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
