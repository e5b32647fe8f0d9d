"""Normalisation: functions of arrays (`norms`), and layers of Flax (`linen`, `nnx`)."""
