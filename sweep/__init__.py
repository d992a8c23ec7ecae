"""Every type of model that transformers has, reduced, on several ranks: what is exact, refused, wrong."""
