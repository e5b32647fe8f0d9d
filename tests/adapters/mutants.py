"""Wrong variants of adapters and merging, and whether their tests notice."""

from __future__ import annotations

import dataclasses

from tests import suites

# Which tests notice: of a file the name, else that of its folder counts.
_STARTS = ("test_adapt", "test_start_values", "test_targets")
_MERGING = ("test_merging_references", "test_merging")
TESTS: dict[str, tuple[str, ...]] = {
    "adapters": _STARTS,
    **dict.fromkeys(("_task_vectors", "task_arithmetic", "ties", "breadcrumbs"), _MERGING),
    **dict.fromkeys(("ist", "perp", "lora_plus"), ("test_training",)),
    **dict.fromkeys(
        ("pissa", "olora", "lora_ga", "corda", "miss", "dora", "lora"), ("test_parity",)
    ),
    **dict.fromkeys(("peft", "plain"), ("test_peft_folder",)),
    **{name: (f"test_{name}",) for name in ("eva", "join")},
    "_starts": ("test_starts", "test_start_values"),
    "_whole": ("test_whole",),
    "files": ("test_file_layouts", "test_file_wholes"),
    **dict.fromkeys(("_peft_config", "_places"), ("test_files",)),
    "_foreign": ("test_files", "test_other_libraries"),
    **dict.fromkeys(("mlx", "kohya"), ("test_other_libraries",)),
}


@dataclasses.dataclass(frozen=True)
class Mutant(suites.Mutant):
    """One replacement in a file of `jaxopt_lab/adapters`."""

    def tests(self) -> tuple[str, ...]:
        path, _ = self.source()
        chosen = TESTS.get(path.stem) or TESTS[path.parent.name]
        return tuple(f"adapters/{name}.py" for name in chosen)


MUTANTS = [
    # Merging
    Mutant("_task_vectors", "patterns, count - 1)", "patterns, count)"),
    Mutant("_task_vectors", "(place <= room)", "(place < room)"),
    Mutant("_task_vectors", "seen += jnp.sum(tied, dtype=jnp.uint32)", "pass"),
    Mutant("_task_vectors", "leaf.astype(update.dtype) +", ""),
    Mutant("_task_vectors", "[jnp.asarray(x).astype(dtype) - ", "[-"),
    Mutant("ties", '+ (keep == "authors")', ""),
    Mutant("ties", 'if elect == "mass"', 'if elect != "mass"'),
    Mutant("ties", 'if zero_sign == "majority":', "if False:"),
    Mutant("ties", "jnp.where(agrees, values, 0)", "values"),
    Mutant("ties", "jnp.sum(agrees, axis=0), 1)", "len(agrees), 1)"),
    Mutant("ties", "values = trimmed if weights is None", "values = trimmed if True"),
    Mutant("ties", 'if scope == "global":', "if True:"),
    Mutant("breadcrumbs", "top + kept if remove_first", "kept if remove_first"),
    Mutant("breadcrumbs", "outer & ~inner", "outer"),
    Mutant("breadcrumbs", '== "embedding" else 2', '== "embedding" else 1'),
    Mutant("breadcrumbs", "jnp.moveaxis(found, -1, along)", "found"),
    # Starts
    Mutant("pissa", "root = jnp.sqrt(s / kernel.scaling)", "root = jnp.sqrt(s)"),
    Mutant("olora", "jnp.linalg.qr(jnp.swapaxes(matrices, -1, -2))", "jnp.linalg.qr(matrices)"),
    Mutant("lora_ga", '"ArB2r": (every[:r], every[r:])', '"ArB2r": (every[r:], every[:r])'),
    Mutant("lora_ga", "(every[1::2], every[0::2])", "(every[0::2], every[1::2])"),
    Mutant("lora_ga", "kernel.matrix[1] ** 0.25", "kernel.matrix[0] ** 0.25"),
    Mutant("lora_ga", "c = jnp.mean(jnp.sqrt(first / s)", "c = jnp.mean(jnp.sqrt(first)"),
    Mutant("lora_ga", "b = sigma * b", "b = b"),
    Mutant("corda", "damping * mean * identity", "damping * identity"),
    Mutant("corda", "slice(-kernel.r, None)", "slice(None, kernel.r)"),
    Mutant("miss", "_kernels.product(block, tiles) + block", "_kernels.product(block, tiles)"),
    Mutant(
        "miss",
        "jnp.tile(block, (1, -(-fan_in // kernel.r), 1))",
        "jnp.repeat(block, -(-fan_in // kernel.r), 1)",
    ),
    Mutant("dora", "jax.lax.stop_gradient(lengths(kernel, whole))", "lengths(kernel, whole)"),
    Mutant("lora", "alpha / math.sqrt(r) if self.use_rslora", "alpha / r if self.use_rslora"),
    # Trees of adapters
    Mutant("adapt", "leaf.astype(dtype) - kernel.scaling * change", "leaf.astype(dtype) - change"),
    Mutant("adapt", "    if base.merged:\n        raise", "    if False:\n        raise"),
    Mutant("_svd", "q = jnp.linalg.qr(_kernels.product(transposed, q))[0]", "q = q"),
    Mutant("_targets", 'k.endswith(f".{dotted}")', "k.endswith(dotted)"),
    Mutant("_targets", 'rf"(.*\\.)?({pattern})"', 'rf".*({pattern})"'),
    Mutant("gradients", "sums[kernel.name] / count", "sums[kernel.name]"),
    Mutant(
        "factored",
        "[*of_outputs, *of_x] if dot.kernel_is_left",
        "[*of_x, *of_outputs] if dot.kernel_is_left",
    ),
    Mutant("factored", "(kernel.kernel.scaling * change)", "change"),
    Mutant("_trace", "dims=x.dims[1:], batch=x.batch[1:]", "dims=x.dims[1:], batch=x.batch"),
    Mutant("_trace", "if groups != (1, 1)", "if groups == (0, 0)"),
    Mutant(
        "covariances",
        "signed > 1e-6 * largest, signed, largest",
        "signed > largest, signed, largest",
    ),
    # Training, and folders
    Mutant("ist", "jax.nn.log_sigmoid(-scores), count", "jax.nn.log_sigmoid(scores), count"),
    Mutant("ist", "rewards - jnp.mean(rewards)", "rewards"),
    Mutant(
        "ist",
        "return jax.tree.map(jnp.zeros_like, part), old",
        "return jax.tree.map(jnp.zeros_like, part), train()[1]",
    ),
    Mutant("perp", "jnp.where(whole != 0, change, 0)", "change"),
    Mutant("lora_plus", "jnp.ndim(leaf) == 1", "False"),
    Mutant("plain", "jnp.concatenate([b, -b_0], -2)", "jnp.concatenate([b, b_0], -2)"),
    Mutant("plain", "math.sqrt(times) if config.use_rslora", "times if config.use_rslora"),
    # Files of other libraries
    Mutant("_pairs", "scaling * (math.sqrt(r) if use_rslora else r)", "scaling * r"),
    Mutant("_torch_layers", "*window, channels), -1, 1)", "*window, channels), -1, -1)"),
    Mutant("_torch_layers", "a = np.moveaxis(a, 1, -1)", "pass"),
    Mutant(
        "_torch_layers",
        "np.moveaxis(b.reshape(b.shape[0], -1, count), 2, 0)",
        "np.moveaxis(b.reshape(b.shape[0], count, -1), 1, 0)",
    ),
    Mutant("_torch_layers", "if legacy and fan_in == fan_out:", "if False:"),
    Mutant(
        "_torch_layers",
        "np.stack([b.T for _, b in pairs], axis=-1)",
        "np.stack([b.T for _, b in pairs], axis=1)",
    ),
    Mutant("_pairs", "* (pair.scaling / scaling)", "* 1"),
    Mutant("_pairs", "*changed[:1]", "*changed[:0]"),
    Mutant("_targets", '"^" + re.escape(', "re.escape("),
    Mutant("_pairs", "rows[index] = pair.magnitude", "pass"),
    Mutant("_places", "whole = not (place.is_part and its_place.is_part)", "whole = False"),
    Mutant("_places", "set(rows) & set(its_rows)", "rows == its_rows"),
    Mutant("_peft_config", 'rf"(.*\\.)?({pattern})$"', 'rf"({pattern})$"'),
    Mutant("_peft_config", "type(value) is type(x)", "True"),
    Mutant("_peft_tensors", "starts = [0 if shared else", "starts = [0 if True else"),
    Mutant("_peft_tensors", "np.array_equal(mine.a, first.a)", "True"),
    Mutant(
        "_peft_miss", 'block.swapaxes(-1, -2) if config.init_weights == "bat" else block)', "block)"
    ),
    Mutant("_peft_whole", "saved = not suffix and", "saved = suffix and"),
    Mutant("_peft_whole", "[np.argsort(rows)]", ""),
    Mutant("_peft_whole", "elif not _same(own[piece.index], value):", "elif False:"),
    Mutant("_foreign", 'adapter_name == "default" and', "False and"),
    Mutant("mlx", "a, b = a.swapaxes(1, 2), b.swapaxes(1, 2)", "pass"),
    Mutant("kohya", "Pair(a, b, alpha / r)", "Pair(a, b, alpha)"),
    Mutant("kohya", "else float(r)", "else 1.0"),
    Mutant("kohya", 'place.module.replace(".", "_")', "place.module"),
    Mutant("_peft_miss", "block[:, list(part.rows)] =", "block[:, : len(part.rows)] ="),
    Mutant("_pairs", "rows = np.array(lengths)", "rows = 0 * np.array(lengths)"),
    Mutant("_tensors", "np.ascontiguousarray(np.asarray(value))", "np.asarray(value)"),
    Mutant("_peft_tensors", 'if "original_module" in module.split("."):', "if False:"),
    Mutant("_foreign", "hada_(w[12]_[ab]|t[12])", "hada_(w[12]|t[12])"),
    Mutant("_foreign", '"LoHa",', '"LoKr",'),
    Mutant("_foreign", "lokr_(w[12](_[ab])?|t[12])", "lokr_(w[12]|t[12])"),
    Mutant("_foreign", "lokr_(w[12](_[ab])?|t[12])", "lokr_(w[12]_[ab]|t[12])"),
    Mutant("_foreign", r"[ab][12]\.weight", r"[ab]_[12]\.weight"),
    Mutant("_foreign", "oft_(blocks|diag)", "oft_(diag)"),
    Mutant("_foreign", "oft_(blocks|diag)", "oft_(blocks)"),
    Mutant("_foreign", 'r"on_input"', 'r"on_output"'),
    Mutant("_foreign", r'rf"\.{mark}$"', r'rf"\.{mark}"'),
    Mutant("_foreign", r'rf"\.{mark}$"', r'rf"^{mark}$"'),
    Mutant("_foreign", 'if ".lora_down." in key or', "if"),
    Mutant("_foreign", 'or ".lora_up." in key', ""),
    Mutant("_foreign", 'or ".lora.up." in key', ""),
    Mutant("_foreign", 'or "_lora.down." in key', ""),
    Mutant("_foreign", 'start[:2] == b"PK" or', ""),
    Mutant("_foreign", 'or path.suffix in (".bin", ".pt", ".pth")', ""),
    Mutant("_foreign", "found not in (_KOHYA, _UNKNOWN)", "found not in (_KOHYA,)"),
    Mutant(
        "_foreign",
        "for name in (WEIGHTS, PYTORCH_WEIGHTS):",
        "for name in (PYTORCH_WEIGHTS, WEIGHTS):",
    ),
    Mutant("_foreign", "if (folder / MLX_WEIGHTS).exists():", "if False:"),
    Mutant("_foreign", 'if "lora_parameters" in fields or', "if"),
    Mutant("_foreign", "if not key.startswith(prefix):", "if False:"),
    Mutant("_foreign", 'named.insert(0, "default")', "pass"),
    Mutant(
        "_peft_whole",
        '{"mean": "running_mean", "var": "running_var"}',
        '{"mean": "running_var", "var": "running_mean"}',
    ),
    Mutant("_peft_whole", "value = self.layer.read_weight(tensor.T, rows)", "pass"),
    Mutant("_peft_whole", "tensor = tensor.reshape(-1)[list(rows)]", "pass"),
    Mutant("_peft_whole", 'beside = fields.get("bias", "none") != "none"', "beside = True"),
    Mutant("_peft_whole", 'beside = fields.get("bias", "none") != "none"', "beside = False"),
    Mutant("_peft_whole", "if is_trained and _may_be_turned", "if False and _may_be_turned"),
    Mutant("_peft_whole", 'if fields.get("fan_in_fan_out"):', "if False:"),
    Mutant("_peft_whole", "bool(2 * np.linalg.norm", "bool(0 * np.linalg.norm"),
    Mutant("_peft_whole", "tensor.shape == tensor.shape[::-1] == own.shape", "True"),
    Mutant("_peft_whole", 'suffix = ".base_layer" if module in adapted else ""', 'suffix = ""'),
    Mutant("_peft_whole", '"bias": bias if biases else "none"', '"bias": bias'),
    Mutant("_peft_whole", "wanted |= {key for key in found if key[0] in saved}", "pass"),
    Mutant("_peft_whole", "if sorted(rows) != list(range(len(rows))):", "if False:"),
    Mutant("_peft_whole", "if other.endswith(module):", "if other == module:"),
    Mutant("_peft_whole", "        if module in adapted:", "        if False:"),
    Mutant("_peft_whole", "min(own.dtype, other.dtype", "max(own.dtype, other.dtype"),
    Mutant("_peft_whole", "beside.get(above, [])", "[]"),
    Mutant("_peft_whole", 'last == "beta" or ', ""),
    Mutant("_peft_whole", "    if own.shape != other.shape:\n        return False\n", ""),
    Mutant(
        "_peft_whole", "modules |= {_module(piece.leaf)} if saved else set()", "modules |= set()"
    ),
    Mutant("_peft_whole", "stack[piece.index] = value", "stack[0] = value"),
    Mutant("_peft_whole", "piece.layer is not None and piece.place.parameter is not None", "False"),
    Mutant(
        "_peft_whole",
        "for index, place in enumerate(own):",
        "for index, place in list(enumerate(own))[:1]:",
    ),
    # Starts from activations
    Mutant("eva", "vectors * np.sign(largest)", "vectors"),
    Mutant("eva", "if cost[name] > left:", "if False:"),
    Mutant("eva", "np.sqrt(singular[:, None, : kernel.r])", "singular[:, None, : kernel.r]"),
    Mutant("eva", "vectors[:, :, ::-1]", "vectors"),
    Mutant("eva", "rank / config.rank(name) if adjust", "1 if adjust"),
    Mutant("eva", "round(config.rank(name) * rho)", "config.rank(name)"),
    Mutant("eva", "part.count[:, None, None] * apart[:, :, None]", "apart[:, :, None]"),
    Mutant("eva", "jnp.where(counts, x - mean[:, None], 0)", "x - mean[:, None]"),
    Mutant("eva", "len(scatter[name]) for name in shares", "1 for name in shares"),
    # Joined adapters
    Mutant("join", "weight.astype(dtype) * kernel.scaling * a", "weight.astype(dtype) * a"),
    Mutant("join", "weight.astype(dtype) * move for", "move for"),
    Mutant("join", "_kernels.product(left, u) * root[:, None, :]", "_kernels.product(left, u)"),
    Mutant("join", '("all", "lora_only")', '("lora_only", "all")'),
    Mutant("join", "None for config in configs for", "None for config in configs[:1] for"),
    Mutant("join", "rank = max(k.r for", "rank = min(k.r for"),
    # Starts by name, and leaves that are trained whole
    Mutant("_starts", "bound = 1 / math.sqrt(fan_in)", "bound = 1 / math.sqrt(kernel.r)"),
    Mutant("_starts", "matrices.dtype) / kernel.r", "matrices.dtype)"),
    Mutant("_starts", "return a / 10, b / 10", "return a, b"),
    Mutant("_starts", "q[:, 0::2]", "q[:, 1::2]"),
    Mutant("_starts", "if kernel.is_embedding:\n        # The", "if False:\n        # The"),
    Mutant("_whole", 'own != "g" and ', ""),
    Mutant("_whole", 'dotted = f".{entry', 'dotted = f"{entry'),
    Mutant("_whole", "if any(_belongs(n, kernel.name) for kernel in kernels)", "if True"),
    Mutant("_whole", "above == module and ", ""),
    Mutant("_whole", "copy=True", "copy=False"),
]
