"""Where pages lie: one module per tier. Imports the core (`kvd.*`), never the daemon."""
