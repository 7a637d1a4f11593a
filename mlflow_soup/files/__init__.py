"""Files on disk: ours are complete or absent; those that others wrote are read only as data."""
