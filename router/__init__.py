"""The router: which worker a request goes to. ARCHITECTURE.md has a line for each module."""
