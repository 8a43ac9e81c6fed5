"""Centred keys: what is subtracted from keys before quantisation, and where it comes from."""
