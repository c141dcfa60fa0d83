"""Commands that turn raw corpora into token shards. Run from a checkout; they never import torch."""
