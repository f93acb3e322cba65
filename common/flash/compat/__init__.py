"""Names and signatures of other packages over this one's calls; nothing here is imported early."""
