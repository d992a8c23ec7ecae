"""The loss of a causal model from this rank's span of hidden states."""
