"""Stage 3: weights -> numbers, tables, pictures."""

import train  # noqa: F401  # before torch: how its threads wait
