"""What people look at: grids, attention figures, curves, the explorer and the report."""
