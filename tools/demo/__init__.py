"""`make demo`: what kvd is for, shown on real servers."""
