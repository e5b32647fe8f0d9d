"""Operations that a layer of Flax takes in the place of jax's own."""
