"""How good a model is: perplexity and bits per byte, the compressors to beat, and the plots of a run."""
