"""What a model is, and which weights a role has."""
