"""Attention: one public function (`api`), its plain definition (`reference`), and its routes.

What a call means is decided in `arguments` (checks, canonical form) and `mask` (who sees whom); a
route, one file or folder each, computes it; `core` differentiates a route and `mapped` batches and
shards it; `routes` chooses. Around them: `decode`, `context` (several devices), `merge`, `cost`.
"""
