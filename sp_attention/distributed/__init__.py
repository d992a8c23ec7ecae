"""Ranks: who they are, what they send each other, what they agree on. Knows no models."""
