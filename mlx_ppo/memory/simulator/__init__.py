"""What mlx would allocate, by tracing and replaying."""
