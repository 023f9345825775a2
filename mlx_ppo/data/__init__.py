"""Local JSONL files into records, records into tokens, tokens into batches."""
