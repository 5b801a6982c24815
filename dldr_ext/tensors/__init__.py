"""Tensors as everything here takes them: parameters, storage formats, matrices of rows."""
