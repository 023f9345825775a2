"""A run's policy in forms that other programs load: mlx-lm adapters, a fused model folder, a GGUF file."""
