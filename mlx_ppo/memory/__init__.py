"""How much memory a computation will need, found by tracing it and replaying mlx's evaluator; nothing is computed."""
