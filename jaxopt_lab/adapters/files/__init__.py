"""Adapters in the files of other libraries: peft's folders, mlx-lm's, kohya's files."""
