"""What tests and benches share: a receiver of OTLP, loops, a stopwatch, simulated ranks."""
