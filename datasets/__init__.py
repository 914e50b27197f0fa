"""Image sources: find a dataset and decode its images."""
