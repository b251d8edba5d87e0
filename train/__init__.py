"""Stage 2: shards -> weights (GPU or CPU; no video library)."""
