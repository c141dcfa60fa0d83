"""Triton's interpreter takes over kernels when they are defined: before any test module here imports them."""

import tests.helpers.triton  # noqa: F401
