"""Files changed at random, and every reader of files on them.

    python -m tests.fuzz --cases 100000 --seed 7             all readers, a table of what happened
    python -m tests.fuzz --reader artifact --case 4711       one case again, with its traceback
    python -m tests.fuzz --programs 300                      programs of our llama.cpp on GGUF files
    python -m tests.fuzz --kernels 2000                      the C code under sanitizers, N shapes

A reader must give a value or one PT2Error line. The command exits with 1 where one gives anything
else, takes too long, or accepts what is wrong. A new reader is one entry in ``readers.py``.
"""
