"""A timeline of one CTA of v3's forward kernel, from clock reads in a changed copy of it."""
