"""Stage 1: videos -> verified HDF5 shards of frames, I-frames and motion vectors (CPU, no torch)."""
