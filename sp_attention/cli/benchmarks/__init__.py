"""What `sp-attention bench` measures, a subject a module; each gives a record of plain numbers that JSON takes."""
