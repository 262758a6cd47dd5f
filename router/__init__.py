"""The router: where a request is answered soonest. ARCHITECTURE.md names its modules."""
