"""Stage 3: weights -> numbers, tables, pictures."""
