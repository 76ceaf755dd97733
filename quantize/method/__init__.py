"""The arithmetic of ternarization: pure functions of matrices."""
