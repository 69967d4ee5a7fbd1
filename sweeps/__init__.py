"""What to run: recipes (complete configurations) and sweeps (grids of changes of one). Values only."""
