"""A controller that calls a storage plugin as SGLang 0.5.5, 0.5.10 and 0.5.23 call it. See README.md."""
