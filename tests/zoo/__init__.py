"""Every decoder that transformers and llama.cpp both know, tiny and random, through the whole path.

    python -m tests.zoo [CLASS ...]      run and print the table
    python -m tests.zoo --write          run everything and put the table into README.md
    python -m tests.zoo --list           the classes, and what is expected of each

Each class gets a small config (:mod:`tests.zoo.configs`), random weights, and a tokenizer that was
trained on the spot. It is quantised, exported as each type, and run in our llama.cpp; the
predictions are compared with those of transformers' own class with the same dequantised weights.
"""
