"""``pt2-llama``: fetch, patch, build, check and run the llama.cpp that knows our ternary types.

The other parts of the project use :mod:`pt2_llama.api` only.
"""
