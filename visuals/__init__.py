"""Images and pages for people: sample grids, attention figures, curves, the attention explorer, the run report."""
