"""TOML into one frozen section for each part of a run."""
