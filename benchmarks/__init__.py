"""Speed and memory, side by side with what people use otherwise: one script a question.

    python -m benchmarks.scan         how far is the scan from the cost of its exponentials?
    python -m benchmarks.train_step   how fast is a training step beside transformers, and beside its own products?
    python -m benchmarks.length       what does a token cost at longer contexts?
    python -m benchmarks.decode       how fast is generation, and does it stay so?
    python -m benchmarks.loss         what does the fused head and loss save?
    python -m benchmarks.all          all five

Every script explains itself with --help, prints a Markdown table, writes its figures with --json FILE, and with --check
exits 1 and names the goals that were missed. Figures are ratios of alternatives that took turns in one run: machines
are shared, and their clocks drift.
"""
