"""Stage 1: videos -> verified HDF5 shards of frames, I-frames and motion vectors (CPU, no torch)."""

__version__ = "0.2.0"
"""Of all three stages; CHANGELOG.md says what each version brought."""
