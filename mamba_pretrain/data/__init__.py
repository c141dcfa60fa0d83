"""Token shards, the order they are read in, and tokenizers."""
