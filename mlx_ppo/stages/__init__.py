"""Prompts into new weights, a stage a file."""
