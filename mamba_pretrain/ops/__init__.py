"""The operations Mamba is made of: one public function each, with its equations, and a readable reference.

Shape suffixes used in this room and in `model`: B batch, L length, D model width, E inner width, N state per channel,
R rank of delta, K convolution width, V vocabulary, T a chunk of L. Everything is (batch, length, channel): no op
transposes its input.
"""
