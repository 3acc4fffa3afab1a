"""Files, HDF5, streams and compiled loops."""
