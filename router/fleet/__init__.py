"""Who is there and what is known of them: workers that join and leave, their health, loads, tokens and blocks.

Begin with `fleet`; `crew` says what it tells to those who send requests.
"""
