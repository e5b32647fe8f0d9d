"""Scripts that each answer one question by training real models; see README.md."""
