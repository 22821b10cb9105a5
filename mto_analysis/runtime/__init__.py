"""What everything else runs on: processes, devices, precision, memory, keyed randomness, settings, output files."""
