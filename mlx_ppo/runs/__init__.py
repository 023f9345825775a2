"""The run folder: what is logged, saved and verified."""
