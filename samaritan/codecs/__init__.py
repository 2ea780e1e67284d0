"""How updates are written: number formats, sparsity, low rank, and one file format for all."""
