"""Results as tables and figures; knows nothing of how they were measured."""
