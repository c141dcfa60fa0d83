"""Where and how the model runs: devices, signals, and engines behind one contract."""
