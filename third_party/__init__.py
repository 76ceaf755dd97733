"""llama.cpp as this project uses it: the overlay (``llama.cpp/``) and its build tool."""
