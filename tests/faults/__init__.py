"""Models that go wrong elsewhere, by kind: what comes out of each, as a table.

    python -m tests.faults [NAME ...] [--tokenizers DIR] [-o table.md]

Each input is a small model with one thing about it that tools are known to stumble over. It is
quantised and exported as a user would do it; right is a file that llama.cpp proves, or one line
before the first block. Anything else makes the command fail.
"""
