"""Quality and speed of caches: perplexity, KLD, needle, benchmark, calibration."""
