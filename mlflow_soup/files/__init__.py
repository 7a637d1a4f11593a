"""Files on disk. Our files are complete or absent; files of others are read only as data."""
