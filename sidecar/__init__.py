"""What SGLang loads into its own processes. Imports the core, msgspec, pyzmq, xxhash and what the worker has."""
