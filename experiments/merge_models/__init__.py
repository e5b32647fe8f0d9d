"""What is left of three fine-tuned models when they are merged into one?"""
