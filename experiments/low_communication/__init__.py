"""How many bytes must replicas send to end at the loss of synchronous training?"""
