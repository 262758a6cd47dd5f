"""The router's own pages under /kvd/: what it decided, who its workers are, what was cached; health and metrics."""
