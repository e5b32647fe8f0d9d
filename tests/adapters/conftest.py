"""What the modules of this folder need to be imported."""

from __future__ import annotations

import importlib.util

collect_ignore: list[str] = []
if importlib.util.find_spec("torch") is None:
    collect_ignore += ["peft_kinds.py", "peft_matrix.py"]
