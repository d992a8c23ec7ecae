"""The sequence-parallel region of an enabled model at work: the hooks that cut, exchange and gather."""
