"""What does one update step cost beside optax's, on the machine at hand?"""
