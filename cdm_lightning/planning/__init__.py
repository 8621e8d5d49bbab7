"""What a training costs: floating-point operations, memory, time, and what the machine at hand could do."""
