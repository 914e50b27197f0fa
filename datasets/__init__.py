"""Where images come from, and how each is decoded."""
