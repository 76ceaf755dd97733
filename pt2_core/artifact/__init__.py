"""What the quantiser writes and everybody reads: blocks, manifest, proof, sensitivities."""
