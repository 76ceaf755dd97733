"""Every source of text and tokens, and how a text becomes windows."""
