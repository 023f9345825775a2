"""Where scores come from beside models: a person's own functions, and rules."""
