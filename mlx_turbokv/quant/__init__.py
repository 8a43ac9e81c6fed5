"""How rows of K and V are stored: formats, codebooks, rotations, the layout of tiles."""
