"""Models in and out: Hugging Face's and mamba_ssm's directories, and our own.

`pretrained` reads any of them, `convert` writes any of them, `formats` knows how each describes a model, and
`tokenizer_files` takes the tokenizer along.
"""
