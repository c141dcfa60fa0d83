"""Fast implementations of the ops, one module or more for each backend; `ops.dispatch` chooses among them."""
