"""Images and pages for people: sample grids, attention figures, curves, attention explorer, playground, run report."""
