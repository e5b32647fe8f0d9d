"""Cross-entropy of a linear layer: one public function (`api`), its definition (`reference`).

What a call means is decided in `arguments` (checks, canonical form) and `tokens` (what a row of
logits costs, reductions); `chunked` goes over the vocabulary block by block, and `core` gives that
its derivatives, by one of two plans.
"""
