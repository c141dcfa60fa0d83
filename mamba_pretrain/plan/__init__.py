"""What a run will need and take, before it costs anything: memory, traffic, time, and the cheapest layout that fits."""
