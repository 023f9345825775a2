"""A GGUF file, or a Hugging Face folder, into a model folder that the rest of the package loads."""
