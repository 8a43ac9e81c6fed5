"""Measuring what a cache costs in quality: perplexity, divergence, and the statistics of both."""
