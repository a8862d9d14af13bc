"""What each process has: its device, its place among others, signals, output, and the run's folder."""
