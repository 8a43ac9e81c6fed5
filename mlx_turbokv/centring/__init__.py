"""Centred keys: where a model's references come from. centre.py has what the caches do with them."""
