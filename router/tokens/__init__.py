"""Tokens exactly as the worker makes them: from a request's body to token ids to the hashes of its KV events.

The rule of this package: either the ids are what the worker will compute, or there are none and a reason. It never
guesses. What it believes of a worker is proven by the parity probe, at registration and again every few minutes.
"""
