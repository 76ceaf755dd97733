"""Files and programs: what is measured, and the calls of llama.cpp's tools that measure it."""
