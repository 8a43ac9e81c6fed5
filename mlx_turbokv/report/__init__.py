"""The HTML report of a model's measurements, and memory plans."""
