"""Stage 2: shards -> weights (GPU or CPU; no video library)."""

import os

# Torch's threads spin for milliseconds where they wait for each other, which on a busy machine is time that the others
# need. libgomp reads this when torch is loaded; what the user set wins.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
