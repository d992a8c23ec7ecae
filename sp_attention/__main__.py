"""`python -m sp_attention` is `sp-attention`."""

from sp_attention.cli import main

if __name__ == "__main__":
    main()
